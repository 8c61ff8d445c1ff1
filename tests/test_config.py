"""Settings: bounds, combinations, what they resolve to, and the way to YAML and back."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from gcpo_t2i.algo.rows import ROWS
from gcpo_t2i.config import (
    CompareConfig,
    ConfigError,
    CreditConfig,
    EvalConfig,
    LossConfig,
    OptimConfig,
    PretrainConfig,
    ProbeConfig,
    RewardConfig,
    SampleConfig,
    TrainConfig,
    resolve_algorithm,
    suggest,
    validate,
)
from gcpo_t2i.errors import UserError
from gcpo_t2i.folders import check_output_dir, next_run_dir
from gcpo_t2i.parsing import load_config
from gcpo_t2i.yaml_files import save_config, to_yaml

CONFIGS = sorted(Path(__file__).parent.parent.joinpath("configs").glob("shapesworld_*.yaml"))
CALLED_SO = "; did you mean 'guidance_gcpo', 'gold_gcpo' or 'critical_gcpo'?"


def fails(config) -> tuple[str, str]:
    with pytest.raises(ConfigError) as caught:
        validate(config)
    return caught.value.key, str(caught.value)


@pytest.mark.parametrize(
    "config", [TrainConfig(), SampleConfig(prompt="x"), PretrainConfig(), ProbeConfig(), CompareConfig()]
)
def test_defaults_are_valid(config):
    validate(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TrainConfig(steps=0), "steps must be > 0, not 0"),
        (TrainConfig(group_size=-2), "group_size must be > 0, not -2"),
        (TrainConfig(seed=-1), "seed must be >= 0, not -1"),
        (TrainConfig(guidance=-0.5), "guidance must be >= 0, not -0.5"),
        (TrainConfig(guidance=float("nan")), "guidance must be >= 0, not nan"),
        (TrainConfig(temperature=float("inf")), "temperature must be > 0, not inf"),
        (TrainConfig(top_p=1.01), "top_p must be in (0, 1], not 1.01"),
        (TrainConfig(credit=CreditConfig(top=1.0)), "credit.top must be in (0, 1), not 1.0"),
        (TrainConfig(credit=CreditConfig(mass=0.0)), "credit.mass must be in (0, 1), not 0.0"),
        (TrainConfig(credit=CreditConfig(temperature=0)), "credit.temperature must be > 0, not 0"),
        (TrainConfig(loss=LossConfig(beta=-0.1)), "loss.beta must be >= 0, not -0.1"),
        (TrainConfig(loss=LossConfig(clip_low=1.5)), "loss.clip_low must be in (0, 1], not 1.5"),
        (TrainConfig(optim=OptimConfig(learning_rate=0.0)), "optim.learning_rate must be > 0, not 0.0"),
        (TrainConfig(optim=OptimConfig(betas=(0.9, 1.0))), "optim.betas must be in [0, 1), not [0.9, 1.0]"),
        (TrainConfig(eval=EvalConfig(num_prompts=0)), "eval.num_prompts must be > 0, not 0"),
        (SampleConfig(prompt="x", num_images=0), "num_images must be > 0, not 0"),
        (PretrainConfig(threads=-1), "threads must be >= 0, not -1"),
    ],
)
def test_bounds_name_the_field_and_the_value(config, message):
    key, text = fails(config)
    assert text == message
    assert message.startswith(f"{key} ")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            TrainConfig(algorithm="gpco"),
            f"algorithm 'gpco' is unknown{CALLED_SO}",
        ),
        (
            TrainConfig(algorithm="gcpo"),
            f"algorithm 'gcpo' is unknown{CALLED_SO}",
        ),
        (TrainConfig(algorithm="grop"), "algorithm 'grop' is unknown; did you mean 'grpo'?"),
        (
            TrainConfig(credit=CreditConfig(rule="guidnce")),
            "credit.rule 'guidnce' is unknown; did you mean 'guidance'?",
        ),
        (TrainConfig(credit=CreditConfig(contrast="k33")), "credit.contrast 'k33' is unknown; did you mean 'k3'?"),
        (
            TrainConfig(credit=CreditConfig(normalizer="rank")),
            "credit.normalizer 'rank' is unknown; did you mean 'power_rank'?",
        ),
        (
            TrainConfig(loss=LossConfig(surrogate="zzz")),
            "loss.surrogate 'zzz' is unknown; known: sequence, token",
        ),
        (
            TrainConfig(loss=LossConfig(averaging="tokens")),
            "loss.averaging 'tokens' is unknown; did you mean 'token'?",
        ),
        (
            TrainConfig(loss=LossConfig(advantage_scale="grop")),
            "loss.advantage_scale 'grop' is unknown; did you mean 'group'?",
        ),
    ],
)
def test_unknown_names_come_with_the_nearest(config, message):
    key, text = fails(config)
    assert text == message
    assert message.startswith(f"{key} ")


def test_group_size_one_is_an_error_with_its_cure():
    for algorithm in ROWS:
        key, message = fails(TrainConfig(algorithm=algorithm, group_size=1))
        assert key == "group_size"
        assert message.startswith("group_size 1 leaves no group") and message.endswith("use group_size 2 or more")


@pytest.mark.parametrize(
    ("config", "key", "part"),
    [
        (TrainConfig(loss=LossConfig(kl_reweight=True, beta=0.0)), "loss.kl_reweight", "needs loss.beta > 0"),
        (TrainConfig(credit=CreditConfig(top=0.9, mass=0.8)), "credit", "top <= mass"),
        (TrainConfig(credit=CreditConfig(contrast="log_ratio", normalizer="mean")), "credit", "negative weights"),
        (TrainConfig(resume=True, overwrite=True, output_dir="x"), "resume", "exclude each other"),
        (TrainConfig(resume=True), "resume", "--output_dir"),
        (TrainConfig(rewards=[]), "rewards", "at least one reward"),
        (TrainConfig(rewards=[RewardConfig("clip", 0.0)]), "rewards", "at least one reward"),
        (TrainConfig(rewards=[RewardConfig("clip", float("nan"))]), "rewards", "weight of 'clip' must be finite"),
        (TrainConfig(rewards=[RewardConfig("clip"), RewardConfig("clip")]), "rewards", "'clip' is there twice"),
        (
            TrainConfig(eval=EvalConfig(rewards=[RewardConfig("a"), RewardConfig("a")])),
            "eval.rewards",
            "'a' is there twice",
        ),
        (PretrainConfig(resume=True, overwrite=True), "resume", "exclude each other"),
        (SampleConfig(), "prompt", "either --prompt"),
        (SampleConfig(prompt="x", prompts="y.txt"), "prompt", "either --prompt"),
    ],
)
def test_settings_that_do_not_go_together(config, key, part):
    assert fails(config)[0] == key
    assert part in fails(config)[1]


def test_kl_reweight_with_beta_is_fine():
    validate(TrainConfig(loss=LossConfig(kl_reweight=True, beta=0.01)))


def test_null_leaves_the_row_as_it_is_and_single_parts_can_be_replaced():
    row, settings = resolve_algorithm(TrainConfig(algorithm="dapo", loss=LossConfig(advantage_scale=None)))
    assert row == ROWS["dapo"]
    assert (settings.contrast, settings.normalizer, settings.top, settings.mass) == ("k3", "power_rank", 0.4, 0.8)
    config = TrainConfig(
        algorithm="dapo",
        credit=CreditConfig(rule="guidance", contrast="abs", temperature=2.0),
        loss=LossConfig(averaging="sequence", clip_low=0.1),
    )
    row, settings = resolve_algorithm(config)
    assert (row.name, row.credit.name, row.averaging, row.clip_low, row.clip_high) == (
        "dapo",
        "guidance",
        "sequence",
        0.1,
        0.28,
    )
    assert row.keep is ROWS["dapo"].keep
    assert (settings.contrast, settings.temperature) == ("abs", 2.0)


def test_suggest_prefers_the_same_letters_to_difflib():
    assert suggest("gcpo", ["grpo", "guidance_gcpo"]) == "; did you mean 'guidance_gcpo'?"
    assert suggest("grppo", ["grpo", "guidance_gcpo"]) == "; did you mean 'grpo'?"


def test_yaml_round_trip(tmp_path):
    config = TrainConfig(
        algorithm="grpo",
        output_dir="runs/ünïcode",
        dtype="bfloat16",
        rewards=[RewardConfig("clip", 0.5), RewardConfig("mine.py:score", 2, {"scale": 1e-7})],
        credit=CreditConfig(rule="random"),
        loss=LossConfig(beta=1e-4, kl_reweight=True, clip_low=0.1),
        optim=OptimConfig(betas=(0.5, 0.75), schedule="constant"),
        eval=EvalConfig(rewards=[RewardConfig("clip")]),
    )
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    sample = SampleConfig(prompt="1e3", negative="a: [b")
    save_config(sample, tmp_path / "sample.yaml")
    assert load_config(tmp_path / "sample.yaml", SampleConfig) == sample


def test_a_saved_config_does_not_repeat_resume_or_overwrite(tmp_path):
    assert {"resume", "overwrite"}.isdisjoint(yaml.safe_load(to_yaml(TrainConfig(overwrite=True))))


def test_load_config_names_the_file(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("algorithm: gpco\n")
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(caught.value) == f"{path}: algorithm 'gpco' is unknown{CALLED_SO}"


def test_next_run_dir_is_the_first_unused(tmp_path):
    assert next_run_dir("grpo", tmp_path / "runs") == tmp_path / "runs" / "grpo-1"
    for used in ("grpo-1", "grpo-3", "dapo-2"):
        (tmp_path / used).mkdir()
    assert next_run_dir("grpo", tmp_path) == tmp_path / "grpo-2"


def test_check_output_dir(tmp_path, monkeypatch):
    empty, used, new, file = (tmp_path / name for name in ("empty", "used", "new", "file"))
    empty.mkdir()
    used.mkdir()
    (used / "metrics.jsonl").touch()
    file.touch()
    assert check_output_dir(new, overwrite=False, resume=False) == new
    assert check_output_dir(str(empty), overwrite=False, resume=False) == empty
    assert check_output_dir(used, overwrite=True, resume=False) == used
    assert check_output_dir(used, overwrite=False, resume=True) == used
    assert not new.exists() and (used / "metrics.jsonl").exists()

    def message(path, **flags):
        with pytest.raises(ConfigError) as caught:
            check_output_dir(path, **flags)
        return str(caught.value)

    assert message(used, overwrite=False, resume=False) == (
        f"output folder '{used}' already holds files; add --resume to go on with it, --overwrite to replace it, "
        "or name another"
    )
    assert message(used, overwrite=False) == (
        f"output folder '{used}' already holds files; add --overwrite to replace it, or name another"
    )
    for path in (new, empty):
        assert message(path, overwrite=False, resume=True) == (
            f"output folder '{path}' holds no run to resume; drop --resume to start one"
        )
    monkeypatch.chdir(empty)
    for path in (".", "..", empty):
        assert message(path, overwrite=True).endswith("holds the current folder; name one that may be deleted")
    assert message(file, overwrite=True) == f"output folder '{file}' is a file; name another folder"


def test_there_is_one_config_file_per_row_and_one_with_another_credit():
    named = {path.stem.removeprefix("shapesworld_") for path in CONFIGS}
    assert named == set(ROWS) | {"gold_gcpo_guidance"}
    row, _ = resolve_algorithm(load_config(next(path for path in CONFIGS if path.stem.endswith("gcpo_guidance"))))
    assert (row.name, row.credit.name) == ("gold_gcpo", "guidance") and row.rescue is not None


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_files(path):
    text = path.read_text(encoding="utf-8")
    for field in ("command:", "hardware:", "time:", "expected:", "seed:"):
        assert f"# {field}" in text
    assert f"gcpo-t2i train --config configs/{path.name}" in text
    assert path.stem.removeprefix("shapesworld_").startswith(load_config(path).algorithm)
    defaults = dataclasses.asdict(TrainConfig())
    body = yaml.safe_load(text)
    assert [key for key, value in body.items() if value == defaults[key] and key != "algorithm"] == []
