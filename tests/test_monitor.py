"""What is watched, when a run is warned, and a run that hacks its reward."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gcpo_t2i.cli import main
from gcpo_t2i.config import EvalConfig, MonitorConfig, RewardConfig, TrainConfig
from gcpo_t2i.data import Prompt
from gcpo_t2i.errors import UserError
from gcpo_t2i.monitor import Monitor, Watch, brightness, fell_since, saturation, sharpness, watched_rewards
from gcpo_t2i.scoring import RewardSet

# --- measuring ----------------------------------------------------------------


def plain(color: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGB", (4, 4), color)


def test_sharpness_by_hand() -> None:
    assert sharpness(plain((90, 10, 200))) == 0
    halves = np.zeros((4, 4), np.uint8)
    halves[:, 2:] = 255  # of the three differences in a row, one is 1
    assert sharpness(Image.fromarray(halves)) == pytest.approx(1 / 3)
    board = np.indices((4, 4)).sum(axis=0) % 2 * np.uint8(255)  # every neighbour differs, both ways
    assert sharpness(Image.fromarray(board.astype(np.uint8))) == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize(
    ("color", "expected"), [((255, 0, 0), 1), ((9, 0, 9), 1), ((80, 80, 80), 0), ((0, 0, 0), 0), ((200, 100, 150), 0.5)]
)
def test_saturation_by_hand(color: tuple[int, int, int], expected: float) -> None:
    assert saturation(plain(color)) == pytest.approx(expected)


def test_brightness_by_hand() -> None:
    assert brightness(plain((0, 0, 0))) == 0
    assert brightness(plain((255, 255, 255))) == 1
    assert brightness(plain((0, 255, 0))) == pytest.approx(0.587, abs=0.002)  # the weight of green in BT.601


def fake_batch(levels: list[int], prompts: int) -> Any:
    images = [plain((level, level, level)) for level in levels]
    named = [Prompt(f"prompt {p}") for p in range(prompts)]
    return SimpleNamespace(images=images, prompts=named, group=len(levels) // prompts)


def test_a_few_images_are_watched_evenly_over_the_prompts(reward_file: Path) -> None:
    watch = Watch(RewardSet.load([RewardConfig(f"{reward_file}:bright"), RewardConfig("geneval")]), images=3)
    seen = watch(fake_batch([0, 255, 51, 255, 102, 255], prompts=3))  # the first of each group of two
    assert seen["monitor/bright/mean"] == pytest.approx((0 + 0.2 + 0.4) / 3)
    assert seen["monitor/brightness"] == pytest.approx(0.2)
    assert seen["monitor/sharpness"] == seen["monitor/saturation"] == 0
    assert "monitor/geneval/mean" not in seen and not watch.failures  # it has no say without metadata
    few = Watch(RewardSet.load([RewardConfig(f"{reward_file}:bright")]), images=100)
    assert few(fake_batch([0, 255], prompts=1))["monitor/bright/mean"] == pytest.approx(0.5)


def test_a_watched_reward_that_fails_is_named_and_left_out(reward_file: Path) -> None:
    configs = [RewardConfig(f"{reward_file}:broken"), RewardConfig(f"{reward_file}:bright")]
    watch = Watch(RewardSet.load(configs), images=2)
    for _ in range(2):
        assert watch(fake_batch([255, 255], prompts=1))["monitor/bright/mean"] == 1
    (failure,) = watch.failures
    assert "the GPU caught fire" in failure and failure.endswith("'broken' is no longer watched")


def test_what_is_trained_on_is_not_held_out(reward_file: Path) -> None:
    bright, dark = (RewardConfig(f"{reward_file}:{name}") for name in ("bright", "dark"))
    held_out = [bright, dark, RewardConfig("geneval", kwargs={"score": "strict"})]
    served = RewardConfig("remote", kwargs={"url": "http://gpu7:8000", "reward": "geneval"})
    evaluation = RewardSet.load(held_out)
    for trained in (RewardConfig("geneval", kwargs={"score": "dense"}), served):
        config = TrainConfig(rewards=[bright, trained], eval=EvalConfig(rewards=held_out))
        assert list(watched_rewards(config, evaluation, "cpu").rewards) == ["dark"]
    config.monitor = MonitorConfig(rewards=[bright])
    assert list(watched_rewards(config, evaluation, "cpu").rewards) == ["bright"]
    config.monitor = MonitorConfig(rewards=[])
    assert not watched_rewards(config, evaluation, "cpu").rewards
    config.monitor = MonitorConfig(rewards=[RewardConfig("genval")])
    with pytest.raises(UserError, match="did you mean 'geneval'"):
        watched_rewards(config, evaluation, "cpu")


# --- judging ------------------------------------------------------------------


def noisy(*means: float) -> np.ndarray:
    """Ten steps around each mean, 0.1 above and below it in turns."""
    return np.concatenate([mean + np.tile([0.1, -0.1], 5) for mean in means])


def test_a_fall_counts_beyond_the_noise_only() -> None:
    # Sample variance in ten steps: 10 · 0.01 / 9. Standard error of the difference: √(2 · 0.0111 / 10) = 0.0471.
    # Four of them: 0.1886.
    assert fell_since(noisy(0, 1), noisy(1, 0.8), least=0.1) == 0
    assert fell_since(noisy(0, 1), noisy(1, 0.82), least=0.1) is None
    assert fell_since(noisy(0, 0.2), noisy(1, 0.5), least=0.1) == 0
    assert fell_since(noisy(0, 0.18), noisy(1, 0.5), least=0.1) is None  # the reward did not rise for certain


def test_a_fall_must_be_large_and_the_reward_must_rise() -> None:
    assert fell_since(noisy(0, 1), noisy(1, 0.8), least=0.19) == 0
    assert fell_since(noisy(0, 1), noisy(1, 0.8), least=0.21) is None
    assert fell_since(noisy(0, 1), noisy(-1, -1.2), least=0.19) == 0  # shares are of the size, whatever the sign
    assert fell_since(noisy(1, 0), noisy(1, 0.5), least=0.1) is None
    assert fell_since(noisy(0, 1), noisy(0.5, 1), least=0.1) is None


def test_a_decline_counts_from_its_own_beginning() -> None:
    # up with the reward for twenty steps, then down again to where it started
    assert fell_since(noisy(0, 1, 2, 3), noisy(1, 1.5, 2, 1), least=0.1) == 20
    assert fell_since(noisy(0, 1, 2), noisy(1, 1.5, 2), least=0.1) is None


def test_there_is_no_verdict_before_twenty_steps_nor_on_what_was_not_measured() -> None:
    assert fell_since(noisy(0, 1)[:19], noisy(1, 0)[:19], least=0.1) is None
    assert fell_since(noisy(0, 1), np.full(20, math.nan), least=0.1) is None


def made_rows(steps: int, **series: Any) -> list[dict[str, Any]]:
    """Rows with a slight wobble; a series is (value at the first, value at the last step)."""
    rows = []
    for i in range(steps):
        values = {key: a + (b - a) * i / (steps - 1) + 1e-3 * (-1) ** i for key, (a, b) in series.items()}
        rows.append({"step": i + 1, **values})
    return rows


HACK = {
    "reward": (0.2, 0.8),
    "monitor/clip/mean": (0.6, 0.2),
    "monitor/sharpness": (0.02, 0.02),
    "entropy": (0.1, 0.09),
}


def test_a_warning_says_what_fell_once() -> None:
    monitor, new = Monitor(), []
    for row in made_rows(40, **HACK):
        new += monitor.judge(row)
    assert [alarm.kind for alarm in new] == ["clip"] == monitor.active == list(monitor.alarms)
    # Steps 1 to 10 are on average 4.5/39 of the way, steps 11 to 20 14.5/39: 0.2 + 0.6 · 14.5/39 = 0.423
    assert new[0].step == 20
    assert "the reward rose from 0.269 to 0.423 while held-out clip fell from 0.554 to 0.451" in new[0].text
    assert "steps 1-10 and 11-20" in new[0].text
    assert monitor.alarms["clip"].step == 20 and "steps 1-10 and 31-40" in monitor.alarms["clip"].text


def test_a_warning_that_no_longer_holds_is_kept_but_not_active() -> None:
    monitor = Monitor(made_rows(20, **HACK))
    assert monitor.active == ["clip"]
    for row in made_rows(20, **{**HACK, "reward": (0.8, 0.8), "monitor/clip/mean": (0.7, 0.7)}):
        monitor.judge({**row, "step": row["step"] + 20})
    assert monitor.active == [] and list(monitor.alarms) == ["clip"]


def test_the_rows_alone_decide_so_that_a_resumed_run_is_warned_alike() -> None:
    rows = [json.loads(json.dumps(row)) for row in made_rows(40, **HACK)]
    whole, resumed = Monitor(rows), Monitor(rows[:25])
    assert [alarm for row in rows[25:] for alarm in resumed.judge(row)] == []
    assert (whole.alarms, whole.active) == (resumed.alarms, resumed.active)


def test_what_honest_runs_do_is_no_reason_to_warn() -> None:
    """The largest falls of 19 honest runs of the embedded model: entropy 24 %, diversity 14 %, held-out rewards none."""
    honest = {
        "reward": (0.54, 0.65),
        "entropy": (0.105, 0.08),
        "diversity": (0.75, 0.645),
        "monitor/clip/mean": (0.6, 0.67),
    }
    assert Monitor(made_rows(130, **honest)).alarms == {}
    assert list(Monitor(made_rows(130, **{**honest, "diversity": (0.75, 0.3)})).alarms) == ["diversity"]
    assert list(Monitor(made_rows(130, **{**honest, "entropy": (0.1, 0.02)})).alarms) == ["entropy"]


def constant_rows(*values: float) -> list[dict[str, Any]]:
    ends = [{"rewards/x/min": value, "rewards/x/max": value} for value in values]
    return [{"step": i + 1, "reward": 0.5, **row} for i, row in enumerate(ends)]


def test_a_reward_that_says_the_same_five_times_is_named() -> None:
    monitor = Monitor(constant_rows(0, 0, 0, 0))
    assert monitor.active == []
    (alarm,) = monitor.judge({**constant_rows(0)[0], "step": 5})
    assert (
        alarm.kind == "constant x"
        and "reward 'x' gave every image of the last 5 steps the same score, 0:" in alarm.text
    )
    assert Monitor(constant_rows(0, 0, 0, 0, 1)).active == []
    varied = constant_rows(0, 0, 0, 0, 0)
    varied[2]["rewards/x/max"] = 1.0
    assert Monitor(varied).active == []
    del varied[2]["rewards/x/max"]  # an unknown is no evidence
    assert Monitor(varied).active == []


def test_references_that_are_all_refused_are_a_warning_until_one_is_taken() -> None:
    def rows(*counts: tuple[int, int]) -> list[dict[str, Any]]:
        return [
            {"step": i + 1, "reward": 0.5, "gold/injected": taken, "gold/rejected": refused}
            for i, (taken, refused) in enumerate(counts)
        ]

    monitor = Monitor(rows((0, 3), (0, 4)))
    assert monitor.active == []
    (alarm,) = monitor.judge({"step": 3, "reward": 0.5, "gold/injected": 0, "gold/rejected": 1})
    assert alarm.kind == "references" and "the rewards refused all 8 references" in alarm.text
    assert monitor.judge({"step": 4, "reward": 0.5, "gold/injected": 1, "gold/rejected": 9}) == []
    assert monitor.active == []
    assert Monitor(rows((1, 0), (0, 90))).active == Monitor(constant_rows(0)).active == []


# --- runs ---------------------------------------------------------------------


@pytest.fixture
def command(tiny_folder: Path, reward_file: Path, tmp_path: Path) -> list[str]:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of a red circle\na blue square\ntwo red square\n")
    return [
        *("train", "--model", str(tiny_folder), "--train_prompts", str(prompts), "--eval.prompts", str(prompts)),
        *("--eval.rewards", json.dumps([{"name": f"{reward_file}:bright"}]), "--eval.num_prompts", "3"),
        *("--prompts_per_step", "2", "--group_size", "16", "--device", "cpu", "--output_dir", str(tmp_path / "run")),
        *("--optim.learning_rate", "1e-2", "--optim.schedule", "constant", "--log.images_every", "0"),
    ]


def train_rows(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "reward" in row]


LIGHT = """
import numpy as np

def light(images, prompts):  # the images of random codes lie between 0.58 and 0.61
    return [100 * (float(np.asarray(image).mean()) / 255 - 0.58) for image in images]

def dark(images, prompts):
    return [-value for value in light(images, prompts)]
"""


def test_a_run_that_hacks_is_warned_and_a_resumed_one_too(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reward likes dark images: images become alike, and a held-out reward that likes light ones falls."""
    rewards = tmp_path / "light.py"
    rewards.write_text(LIGHT)
    dark, light = (json.dumps([{"name": f"{rewards}:{name}"}]) for name in ("dark", "light"))
    run, every = tmp_path / "run", ["--optim.modules", "null", "--loss.beta", "0.02"]
    assert (
        main([*command, "--rewards", dark, "--eval.rewards", light, "--save_every", "25", "--steps", "30", *every]) == 0
    )
    rows, flat = train_rows(run), " ".join(capsys.readouterr().out.split())
    assert all(row["monitor/warnings"] == 0 for row in rows[:19])  # there is no verdict yet
    assert rows[-1]["monitor/warnings"] >= 2
    assert flat.count("while held-out light fell from") == flat.count("while entropy fell from") == 2
    summary = flat.partition("Is the reward being hacked?")[2].partition("metrics /")[0]
    assert "light (since step" in summary and "entropy (since step" in summary

    shutil.rmtree(run / "checkpoint-30")
    assert main(["train", "--resume", "--output_dir", str(run)]) == 0
    kept = [key for key in rows[-1] if key.startswith("monitor/")]
    assert [[row[key] for key in kept] for row in rows] == [[row[key] for key in kept] for row in train_rows(run)]
    assert summary in " ".join(capsys.readouterr().out.split())


def test_a_constant_reward_is_named_after_five_steps(
    command: list[str], reward_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewards = [{"name": f"{reward_file}:bright"}, {"name": f"{reward_file}:constant"}]
    assert main([*command, "--rewards", json.dumps(rewards), "--steps", "6"]) == 0
    assert [row["monitor/warnings"] for row in train_rows(tmp_path / "run")] == [0, 0, 0, 0, 1, 1]
    flat = " ".join(capsys.readouterr().out.split())
    assert "step 5: reward 'constant' gave every image of the last 5 steps the same score, 1" in flat
    assert "constant constant (since step 5)" in flat


def test_a_watched_reward_that_fails_does_not_end_the_run(
    command: list[str], reward_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    watched = json.dumps([{"name": f"{reward_file}:nan"}, {"name": f"{reward_file}:dark"}])
    trained = json.dumps([{"name": f"{reward_file}:bright"}])
    assert main([*command, "--rewards", trained, "--monitor.rewards", watched, "--steps", "2"]) == 0
    assert all("monitor/dark/mean" in row and "monitor/nan/mean" not in row for row in train_rows(tmp_path / "run"))
    flat = " ".join(capsys.readouterr().out.split())
    assert flat.count("'nan' is no longer watched") == 1 and "not finite" in flat
