"""`gcpo-t2i compare`: intervals by hand; runs, resumption, refusals and failures from the command line.

Runs are made in this process, but for one: a start of Python and torch each would take longer than all the training.
"""

from __future__ import annotations

import json
import signal
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import binom

import gcpo_t2i.compare as package
from gcpo_t2i.algo.rows import ROWS
from gcpo_t2i.cli import main
from gcpo_t2i.compare import environments
from gcpo_t2i.compare.bootstrap import Estimate, bootstrap
from gcpo_t2i.compare.figure import band, smooth
from gcpo_t2i.compare.processes import Run, last_step
from gcpo_t2i.compare.results import Outcome, cells, compare_outcomes, markdown
from gcpo_t2i.config import CompareConfig, TrainConfig
from gcpo_t2i.errors import UserError
from gcpo_t2i.folders import locked
from gcpo_t2i.train import Trainer
from tests.test_train import TIMES, error, rows

# --- intervals ----------------------------------------------------------------


def test_equal_values_have_an_interval_of_no_width() -> None:
    assert bootstrap(np.zeros((5, 7)), ["a"] * 7) == Estimate(0.0, 0.0, 0.0)
    shifted = bootstrap(np.full((3, 4), 0.25), ["a", "a", "b", "b"])
    assert (shifted.mean, shifted.low, shifted.high) == pytest.approx((0.25, 0.25, 0.25))


def test_one_seed_leaves_the_interval_of_the_prompts() -> None:
    # 100 prompts, half of them 1: a replicate's mean is Binomial(100, 1/2) / 100, whose quantiles are known
    found = bootstrap(np.repeat([[0.0, 1.0]], 50, axis=1).reshape(1, 100), ["a"] * 100)
    assert found.mean == 0.5
    assert (found.low, found.high) == pytest.approx(
        (binom.ppf(0.025, 100, 0.5) / 100, binom.ppf(0.975, 100, 0.5) / 100)
    )


def test_prompts_that_agree_leave_the_interval_of_the_seeds() -> None:
    values = np.repeat(np.arange(16.0)[:, None] % 2, 9, axis=1)  # seeds of 0 and 1, prompts all alike
    found = bootstrap(values, ["a"] * 9)
    assert (found.low, found.high) == pytest.approx((binom.ppf(0.025, 16, 0.5) / 16, binom.ppf(0.975, 16, 0.5) / 16))


def test_every_tag_weighs_the_same_and_is_drawn_by_itself() -> None:
    found = bootstrap(np.array([[1.0, 1.0, 1.0, 0.0]]), ["a", "a", "a", "b"])
    assert (found.mean, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))  # no draw mixes the two tags


def test_seeds_share_the_drawn_prompts() -> None:
    # What prompts cost does not shrink with seeds that all agree on them: 8 seeds, the interval of one
    one = np.arange(20.0)[None] % 2
    many = bootstrap(np.repeat(one, 8, axis=0), ["a"] * 20)
    assert (many.low, many.high) == pytest.approx((binom.ppf(0.025, 20, 0.5) / 20, binom.ppf(0.975, 20, 0.5) / 20))


# --- tables -------------------------------------------------------------------


def outcome(algorithm: str, seed: int, after: list[float], tags: str = "ab") -> Outcome:
    prompts = [(tag, f"prompt {i}") for i, tag in enumerate(tags)]
    zero = dict.fromkeys(prompts, 0.0)
    means = {"s": dict(zip(prompts, after, strict=True))}
    return Outcome(algorithm, seed, {"s": zero}, means, rewards=[0.1, 0.2], images=16, minutes=2.0)


def test_a_constant_advantage_is_certain_however_much_prompts_and_seeds_differ() -> None:
    grpo = [outcome("grpo", seed, [0.4 * seed, 0.1]) for seed in range(3)]
    other = [outcome("dapo", one.seed, [value + 0.05 for value in one.after["s"].values()]) for one in grpo]
    first, second = compare_outcomes([*grpo, *other], ["grpo", "dapo"])["s"]
    effect = second.against["grpo"]
    assert effect and (effect.mean, effect.low, effect.high) == pytest.approx((0.05, 0.05, 0.05))
    assert first.against == {"grpo": None} and first.after.low < first.after.mean < first.after.high
    assert first.each == pytest.approx([0.05, 0.25, 0.45])
    assert second.change.mean == pytest.approx(0.3)


def test_effects_are_over_the_seeds_that_both_finished() -> None:
    found = [outcome("grpo", 0, [0.0, 0.0]), outcome("grpo", 1, [1.0, 1.0]), outcome("dapo", 1, [0.5, 0.5])]
    first, second = compare_outcomes(found, ["grpo", "dapo"])["s"]
    assert second.against["grpo"] == Estimate(-0.5, -0.5, -0.5)
    assert (first.seeds, second.seeds) == ([0, 1], [1])
    assert compare_outcomes([*found[:1], *found[2:]], ["grpo", "dapo"])["s"][1].against == {"grpo": None}


def test_prompts_to_which_a_score_does_not_apply_are_left_out() -> None:
    nan = float("nan")
    found = [outcome("grpo", 0, [0.2, nan, 0.4], "aab"), outcome("dapo", 0, [nan, 0.7, 0.4], "aab")]
    assert compare_outcomes(found, ["grpo", "dapo"])["s"][0].after.mean == pytest.approx(0.4)
    nothing = [outcome("grpo", 0, [nan, nan])]
    assert compare_outcomes(nothing, ["grpo"])["s"] == []
    with pytest.raises(UserError, match="none of the scores of the evaluation applies"):
        package.report(Path(), nothing, ["grpo"], Console())


def test_other_prompts_are_an_error() -> None:
    with pytest.raises(UserError, match="dapo with seed 0 was evaluated on other prompts than grpo with seed 0"):
        compare_outcomes([outcome("grpo", 0, [0, 0]), outcome("dapo", 0, [0, 0], "ac")], ["grpo", "dapo"])


def test_the_table_by_hand() -> None:
    found = [outcome("grpo", 0, [0.25, 0.25]), outcome("random_credit", 0, [0.5, 0.5])]
    own = compare_outcomes(found, ["grpo", "random_credit"])["s"]
    assert markdown("Held-out s", own).splitlines()[2:] == [
        "| algorithm | seeds | before | after | change | images | minutes | against grpo | against random_credit |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| `grpo` | 1 | 0.000 | 0.250 [0.250, 0.250] | +0.250 [+0.250, +0.250] | 16 | 2.0 | – "
        "| -0.250 [-0.250, -0.250] |",
        "| `random_credit` | 1 | 0.000 | 0.500 [0.500, 0.500] | +0.500 [+0.500, +0.500] | 16 | 2.0 "
        "| +0.250 [+0.250, +0.250] | – |",
    ]
    assert cells(compare_outcomes([outcome("dapo", 0, [0, 0])], ["dapo"])["s"])[0][-1] == "minutes"  # no baseline


# --- the figure ---------------------------------------------------------------


def test_smooth_and_band_by_hand() -> None:
    assert smooth(np.array([[0.0, 3.0, 6.0, 3.0]]), 3)[0] == pytest.approx([1.5, 3.0, 4.0, 4.5])
    mean, half = band(np.array([[0.0, 1.0], [2.0, 1.0]]))
    # two seeds: t with 1 degree of freedom is 12.706; standard deviation √2, of the mean 1
    assert mean == pytest.approx([1, 1]) and half == pytest.approx([12.7062, 0], rel=1e-5)
    assert band(np.array([[1.0, 2.0]]))[1] == pytest.approx([0, 0])


@pytest.mark.parametrize("algorithms", [["grpo", "random_credit", "dapo"], ["dapo", "gspo"]])
def test_the_figure_is_drawn(tmp_path: Path, algorithms: list[str]) -> None:
    from PIL import Image

    found = [outcome(name, seed, [0.1 * seed, 0.5]) for name in algorithms for seed in (0, 1)]
    package.draw(tmp_path / "x.png", "s", compare_outcomes(found, algorithms)["s"], found)
    with Image.open(tmp_path / "x.png") as image:
        assert image.format == "PNG" and image.width > 800
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


# --- runs ---------------------------------------------------------------------


class InProcess:
    """Stands in for subprocess.Popen: the same command, here and at once."""

    started: list[list[str]]

    def __init__(self, command: list[str], *, stdout: Any, **_: Any) -> None:
        self.started.append(command)
        with open(stdout.fileno(), "w", closefd=False) as log, redirect_stdout(log), redirect_stderr(log):
            self.returncode = self.make(command[command.index("gcpo_t2i") + 1 :])

    def make(self, arguments: list[str]) -> int:
        return main(arguments)

    def poll(self) -> int:
        return self.returncode


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands of the runs that were started."""
    monkeypatch.setattr(InProcess, "started", [], raising=False)
    monkeypatch.setattr("gcpo_t2i.compare.processes.subprocess.Popen", InProcess)
    monkeypatch.setattr("gcpo_t2i.compare.processes.POLL_SECONDS", 0)
    return InProcess.started


@pytest.fixture
def command(tiny_folder: Path, reward_file: Path, tmp_path: Path) -> list[str]:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of a red circle\na blue square\ntwo red square\n")
    reward = json.dumps([{"name": f"{reward_file}:bright"}])
    settings = {
        **{"model": tiny_folder, "train_prompts": prompts, "eval.prompts": prompts, "rewards": reward, "steps": 2},
        **{"eval.rewards": reward, "prompts_per_step": 2, "group_size": 4, "device": "cpu", "log.images_every": 0},
        **{"eval.num_prompts": 3, "eval.samples_per_prompt": 2, "save_every": 1, "optim.learning_rate": 1e-2},
    }
    shared = [text for key, value in settings.items() for text in (f"--train.{key}", str(value))]
    own = ["--algorithms", "grpo", "random_credit", "--seeds", "0", "1", "--output_dir", str(tmp_path / "c")]
    return ["compare", *own, *shared]


def test_two_algorithms_with_two_seeds(
    command: list[str], tmp_path: Path, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 0
    folder = tmp_path / "c"
    names = ["grpo-seed0", "random_credit-seed0", "grpo-seed1", "random_credit-seed1"]
    assert [Path(line[line.index("--output_dir") + 1]).name for line in started] == names
    results = json.loads((folder / "compare.json").read_text())["bright"]
    last = {name: [row for row in rows(folder / name) if "eval/bright" in row] for name in names}
    for name in ("grpo", "random_credit"):
        own = [last[f"{name}-seed{seed}"] for seed in (0, 1)]
        # the means are those that the runs report, and come from the images one by one
        assert results[name]["after"]["mean"] == pytest.approx(np.mean([run[-1]["eval/bright"] for run in own]))
        assert results[name]["before"]["mean"] == pytest.approx(own[0][0]["eval/bright"])
        assert results[name]["each"] == pytest.approx([run[-1]["eval/bright"] for run in own])
        assert (results[name]["images"], results[name]["seeds"]) == (16, [0, 1])
    effect = results["random_credit"]["against"]["grpo"]
    difference = results["random_credit"]["after"]["mean"] - results["grpo"]["after"]["mean"]
    assert effect["mean"] == pytest.approx(difference) and effect["low"] <= difference <= effect["high"]
    assert results["grpo"]["against"]["random_credit"]["mean"] == pytest.approx(-difference)
    table = (folder / "compare.md").read_text()
    assert table.startswith("## Held-out bright") and "| `random_credit` | 2 |" in table
    shown = capsys.readouterr().out
    assert "Held-out bright" in shown and f"results: {folder}" in shown

    started.clear()  # again: nothing is repeated; with one more seed: only that
    assert main(command) == 0 and started == []
    assert main([*command, "--seeds", "0", "2", "--algorithms", "grpo"]) == 0
    assert [line[line.index("--seed") + 1] for line in started] == ["2"]
    assert list(json.loads((folder / "compare.json").read_text())["bright"]) == ["grpo"]


def test_every_algorithm_can_be_compared(command: list[str], tmp_path: Path, started: list[list[str]]) -> None:
    prompts = tmp_path / "gold.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text, "gold": [3] * 16}) + "\n" for text in ("red", "blue")))
    own = ["--train.train_prompts", str(prompts), "--train.success_reward", "2", "--train.steps", "1", "--seeds", "0"]
    assert main([*command, *own, "--algorithms", *ROWS]) == 0
    assert list(json.loads((tmp_path / "c" / "compare.json").read_text())["bright"]) == list(ROWS)
    assert len(started) == len(ROWS) and all(
        f"| `{name}` | 1 |" in (tmp_path / "c" / "compare.md").read_text() for name in ROWS
    )


def test_scores_of_every_image_are_kept(command: list[str], tmp_path: Path, started: list[list[str]]) -> None:
    assert main([*command, "--algorithms", "grpo", "--seeds", "0"]) == 0
    folder = tmp_path / "c" / "grpo-seed0"
    assert {path.name for path in (folder / "eval").iterdir()} == {"step-000000.jsonl", "step-000002.jsonl"}
    images = [json.loads(line) for line in (folder / "eval" / "step-000002.jsonl").read_text().splitlines()]
    assert [image["sample"] for image in images] == [0, 1] * 3 and images[0]["tag"] is None
    assert len({image["prompt"] for image in images}) == 3
    mean = np.mean([image["scores"]["bright"] for image in images])
    assert mean == pytest.approx([row for row in rows(folder) if "eval/bright" in row][-1]["eval/bright"])


def test_a_run_that_was_stopped_goes_on(
    command: list[str], tmp_path: Path, started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*command, "--algorithms", "grpo", "--seeds", "1", "--train.optim.schedule", "constant"]
    assert main([*command, "--output_dir", str(tmp_path / "whole")]) == 0
    step = Trainer.step

    def stopped(self: Trainer) -> Any:
        if self.state.step == 1:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stopped)
        assert main(command) == 2
    started.clear()
    assert main(command) == 0
    ((*_, last),) = started
    assert last == "--resume"
    whole, parts = (rows(tmp_path / name / "grpo-seed1") for name in ("whole", "c"))
    assert [{k: row[k] for k in row.keys() - TIMES} for row in whole] == [
        {k: row[k] for k in row.keys() - TIMES} for row in parts
    ]


def test_a_run_that_fails_is_named_and_the_others_are_kept(
    command: list[str], tmp_path: Path, started: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def make(self: InProcess, arguments: list[str]) -> int:
        if "random_credit" in arguments:
            print("Traceback ...\nRuntimeError: the GPU caught fire\n")
            return 1
        return main(arguments)

    command = [*command, "--seeds", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(InProcess, "make", make)
        assert main(command) == 2
    line = error(capsys)
    assert "1 of 2 runs failed (random_credit-seed1)" in line and "RuntimeError: the GPU caught fire" in line
    results = json.loads((tmp_path / "c" / "compare.json").read_text())["bright"]
    assert list(results) == ["grpo"] and set(results["grpo"]["against"].values()) == {None}
    started.clear()
    assert main(command) == 0 and len(started) == 1


def test_other_settings_are_refused_by_name(
    command: list[str], tmp_path: Path, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--algorithms", "grpo", "--seeds", "0"]) == 0
    started.clear()
    assert main([*command, "--train.steps", "3", "--train.loss.beta", "0.5"]) == 2
    line = error(capsys)
    assert "train.steps (there 2, now 3), train.loss.beta (there 0.0, now 0.5)" in line and started == []
    taken = ["compare", "--train", str(tmp_path / "c" / "compare.yaml"), "--output_dir", str(tmp_path / "c")]
    assert main([*taken, "--algorithms", "grpo", "--seeds", "0"]) == 0 and started == []


def test_a_folder_with_something_else_is_left_alone(command: list[str], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.tex").write_text("chapter 1")
    assert main(command) == 2
    assert "already holds files" in error(capsys)
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["thesis.tex"]


def test_one_run_in_a_process_of_its_own(command: list[str], tmp_path: Path) -> None:
    assert main([*command, "--algorithms", "grpo", "--seeds", "3", "--train.steps", "1"]) == 0
    assert "held-out bright after step 1" in (tmp_path / "c" / "grpo-seed3.log").read_text()
    assert json.loads((tmp_path / "c" / "compare.json").read_text())["bright"]["grpo"]["seeds"] == [3]


# --- parts --------------------------------------------------------------------


def test_two_comparisons_do_not_share_a_folder(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(UserError, match="is in use by another process"), locked(tmp_path):
        pass
    with locked(tmp_path):  # free again
        pass


def test_what_a_killed_run_says(tmp_path: Path) -> None:
    from gcpo_t2i.compare.processes import _last_words

    run = Run("grpo", 0, tmp_path / "grpo-seed0")
    assert "killed by signal 9 (SIGKILL); too little memory" in _last_words(run, -signal.SIGKILL)
    run.log.write_text("")
    assert _last_words(run, 1) == "exit code 1, and an empty log"


def test_the_last_whole_line_of_a_run_that_is_writing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert last_step(path) == {}
    path.write_text(
        '{"step": 0, "eval/bright": 1}\n{"step": 1, "reward": 0.5}\n{"step": 1, "eval/x": 0}\n{"step": 2, "re'
    )
    assert last_step(path) == {"step": 1, "reward": 0.5}


def test_as_many_runs_as_cores_or_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)), raising=False)
    cpu = TrainConfig(device="cpu")
    assert environments(CompareConfig(threads=3, train=cpu)) == [{"OMP_NUM_THREADS": "3"}] * 2
    assert environments(CompareConfig(threads=99, train=cpu)) == [{"OMP_NUM_THREADS": "99"}]
    assert len(environments(CompareConfig(jobs=5, train=cpu))) == 5
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [place["CUDA_VISIBLE_DEVICES"] for place in environments(CompareConfig(jobs=3))] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert [place["CUDA_VISIBLE_DEVICES"] for place in environments(CompareConfig())] == ["4", "7"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--algorithms grpo gpco",
            "algorithms: algorithm 'gpco' is unknown; did you mean 'guidance_gcpo', 'gold_gcpo' or",
        ),
        ("--algorithms grpo,grpo", "algorithms: grpo is there twice"),
        ("--seeds 0 1 0", "seeds: 0 is there twice"),
        ("--seeds 0 x", "seeds: '0,x' is not a list"),
        ("--seeds []", "seeds: at least one is needed"),
        ("--train.group_size 0", "train.group_size must be > 0, not 0"),
        ("--train.loss.beta 0 --train.loss.kl_reweight", "needs loss.beta > 0"),
        ("--train.resume", "train.resume: finished runs stay"),
        ("--train.stps 3", "unknown option '--train.stps'; did you mean '--train.steps'?"),
        ("--train none.yaml", "none.yaml: no such file"),
    ],
)
def test_bad_input(capsys: pytest.CaptureFixture[str], arguments: str, message: str) -> None:
    assert main(["compare", *arguments.split()]) == 2
    assert message in error(capsys)


def test_shared_settings_from_a_file_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("steps: 7\nseed: 5\noptim: {learning_rate: 1e-3}\n")
    assert main(["compare", "--train", str(path), "--train.optim.warmup_steps", "9", "--print_config"]) == 0
    shown = capsys.readouterr().out
    assert "  steps: 7\n" in shown and "    learning_rate: 0.001\n" in shown and "    warmup_steps: 9\n" in shown
    path.write_text("steps: 7\nstps: 5\n")
    assert main(["compare", "--train", str(path)]) == 2
    assert f"{path}: unknown key 'train.stps'; did you mean 'train.steps'?" in error(capsys)
