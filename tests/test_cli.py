"""The command line: help, what arguments and files become, what goes wrong and how it reads, exit codes."""

from __future__ import annotations

import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml

import gcpo_t2i
from gcpo_t2i.annotations import kinds_of
from gcpo_t2i.cli import main
from gcpo_t2i.commands import COMMANDS
from gcpo_t2i.config import PretrainConfig, RewardConfig, RewardsCheckConfig, SampleConfig, TrainConfig
from gcpo_t2i.errors import UserError
from gcpo_t2i.parsing import _parser, load_config, parse
from rewards.errors import RewardError

CALLED_SO = "; did you mean 'guidance_gcpo', 'gold_gcpo' or 'critical_gcpo'?"


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs `gcpo-t2i ARGUMENTS` in an empty folder; commands only record their config."""
    seen = []
    for command in COMMANDS.values():
        module, _, function = command.run.partition(":")
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{function: seen.append}))
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> SimpleNamespace:
        seen.clear()
        code = main(list(arguments))
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err, config=seen[0] if seen else None)

    return call


def error(result: SimpleNamespace) -> str:
    """The one line that a user sees; no stack trace, nothing on stdout, and nothing was run."""
    assert (result.code, result.out, result.config) == (2, "", None)
    prefix, _, message = result.err.partition("gcpo-t2i: error: ")
    assert prefix == "" and message.endswith("\n") and message.count("\n") == 1
    return message.rstrip("\n")


# --- help ---------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",), ("help",)])
def test_overview_names_every_command(run, arguments):
    result = run(*arguments)
    assert result.code == 0 and result.err == ""
    for name, command in COMMANDS.items():
        assert f"  {name} " in result.out and command.summary in result.out


def test_the_hubs_tries_are_not_told_one_by_one(caplog: pytest.LogCaptureFixture) -> None:
    main(["--version"])
    logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s")
    assert not caplog.messages


def test_version(run):
    assert run("--version").out == f"gcpo-t2i {gcpo_t2i.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_a_sentence_for_every_setting(run, name):
    kind = COMMANDS[name].config
    sentences = {action.dest: action.help for action in _parser(kind, "x", "")._actions}
    for key in kinds_of(kind):
        assert len(sentences[key].split()) >= 2, f"{key} has no sentence"
    result = run(*name.split(), "--help")
    assert result.code == 0 and result.config is None
    assert all(f"\n  --{key}" in result.out for key in kinds_of(kind))
    assert f"\n  gcpo-t2i {name}" in result.out  # an example, on a line of its own


def test_help_loads_nothing_heavy():
    code = """if True:
        import sys
        from gcpo_t2i.cli import main
        for arguments in (["--help"], ["train", "--help"], ["train", "--grup_size", "3"], ["heatmap", "--help"]):
            main(arguments)
        heavy = {"torch", "numpy", "transformers", "diffusers", "gradio", "PIL", "rich", "rewards", "open_clip", "matplotlib"}
        print("LOADED", sorted(heavy & set(sys.modules)))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED []"


def test_module_entry_point():
    done = subprocess.run([sys.executable, "-m", "gcpo_t2i", "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: gcpo-t2i COMMAND")


# --- arguments and files ------------------------------------------------------


def test_no_argument_is_the_default_run(run):
    result = run("train")
    assert (result.code, result.config) == (0, TrainConfig())
    assert run("pretrain").config == PretrainConfig()


def test_flags_of_every_type(run):
    config = run(
        "train", "--steps", "7", "--guidance=2", "--output_dir", "5", "--optim.learning_rate", "1e-5", "--seed", "3",
        "--optim.betas", "[0.5, 0.75]", "--credit.contrast", "abs", "--loss.clip_low", "0.1", "--scoring", "guided",
        "--log.report_to", "wandb,tensorboard", "--overwrite", "--loss.kl_reweight", "true", "--loss.beta", "0.1",
    ).config  # fmt: skip
    assert (config.steps, config.guidance, config.output_dir, config.seed) == (7, 2.0, "5", 3)
    assert (config.optim.learning_rate, config.optim.betas) == (1e-5, (0.5, 0.75))
    assert (config.credit.contrast, config.loss.clip_low, config.scoring) == ("abs", 0.1, "guided")
    assert config.log.report_to == ["wandb", "tensorboard"]
    assert (config.overwrite, config.resume, config.loss.kl_reweight, config.loss.beta) == (True, False, True, 0.1)
    assert isinstance(config.guidance, float)


def test_the_flags_that_scripts_use(run):
    names = ("output_dir", "steps", "seed", "algorithm", "prompts_per_step", "group_size", "guidance", "eval_every")
    assert {*names, "save_every", "resume", "overwrite"} <= set(kinds_of(TrainConfig))


def test_lists_take_commas_or_spaces(run):
    for words in (["grpo,dapo"], ["grpo", "dapo"], ["[grpo, dapo]"]):
        assert run("compare", "--algorithms", *words, "--seeds", "4").config.algorithms == ["grpo", "dapo"]
    assert run("compare", "--seeds", "3", "1", "--jobs", "2").config.seeds == [3, 1]


def test_yes_no_flags_take_a_value_or_none(run):
    assert run("train", "--overwrite", "--steps", "3").config.overwrite is True
    assert run("train", "--overwrite", "false").config.overwrite is False
    assert run("train", "--overwrite=true").config.overwrite is True


def test_texts_that_look_like_something_else_stay_texts(run):
    for text in ("a: b", "[1]", "{x: y}", "1e3", "true", "- a", "-5", "'q'", "a\nb"):
        assert run("sample", "--prompt", text).config.prompt == text
    assert run("sample", "--prompt=-x", "--negative", "-y z").config.negative == "-y z"
    for typed in (["--negative_template", ""], ["--negative_template="]):
        assert run("cot", "heatmap", *typed).config.negative_template == ""
    assert "--out needs a value" in run("sample", "--prompt", "x", "--out", "").err


def test_the_command_line_wins_over_files_and_later_files_over_earlier(run, tmp_path):
    (tmp_path / "a.yaml").write_text("steps: 3\nseed: 4\noptim: {learning_rate: 1e-3, betas: [0.1, 0.2]}\n")
    (tmp_path / "b.yaml").write_text("seed: 5\noptim:\n  warmup_steps: 9\n")
    config = run("train", "--steps", "8", "--config", "a.yaml", "--config=b.yaml").config
    assert (config.steps, config.seed) == (8, 5)
    assert (config.optim.learning_rate, config.optim.betas, config.optim.warmup_steps) == (1e-3, (0.1, 0.2), 9)


def test_an_empty_file_changes_nothing(run, tmp_path):
    (tmp_path / "a.yaml").write_text("# nothing\n")
    assert run("train", "--config", "a.yaml").config == TrainConfig()


def test_a_new_list_of_rewards_inherits_nothing_from_the_old(run, tmp_path):
    (tmp_path / "a.yaml").write_text("rewards:\n- {name: geneval, weight: 3, kwargs: {score: partial}}\n")
    (tmp_path / "b.yaml").write_text("rewards:\n- name: clip\n")
    clip = [RewardConfig("clip")]
    assert run("train", "--rewards", '[{"name": "clip"}]').config.rewards == clip
    assert run("train", "--rewards", "[{name: clip}]", "--config", "a.yaml").config.rewards == clip
    assert run("train", "--config", "b.yaml").config.rewards == clip
    assert run("train", "--config", "a.yaml", "--config", "b.yaml").config.rewards == clip
    assert run("train", "--eval.rewards", '[{"name": "clip"}]').config.eval.rewards == clip
    appended = run("train", "--config", "a.yaml", "--rewards+", '{"name": "clip", "kwargs": {"a": 1e-3}}').config
    assert appended.rewards == [
        RewardConfig("geneval", 3.0, {"score": "partial"}),
        RewardConfig("clip", 1, {"a": 1e-3}),
    ]


def test_a_list_that_may_be_null(run, tmp_path):
    (tmp_path / "a.yaml").write_text("monitor: {rewards: [{name: clip}]}\n")
    assert run("train").config.monitor.rewards is None
    assert run("train", "--config", "a.yaml").config.monitor.rewards == [RewardConfig("clip")]
    assert run("train", "--config", "a.yaml", "--monitor.rewards", "null").config.monitor.rewards is None
    assert run("train", "--monitor.rewards", "[]").config.monitor.rewards == []
    assert run("train", "--monitor.rewards", '[{"name": "a", "weight": 2}]').config.monitor.rewards == [
        RewardConfig("a", 2.0)
    ]


def test_rewards_check_reads_the_rewards_of_a_training_config(run, tmp_path):
    (tmp_path / "a.yaml").write_text(
        "steps: 3\noptim: {warmup_steps: 1}\nrewards: [{name: clip}]\n"
        "eval: {seed: 1, rewards: [{name: aesthetic}]}\ndevice: cpu\n"
    )
    config = run("rewards", "check", "--config", "a.yaml", "--num_images", "5").config
    assert (config.rewards, config.eval.rewards) == ([RewardConfig("clip")], [RewardConfig("aesthetic")])
    assert (config.device, config.num_images) == ("cpu", 5)
    by_default = [*TrainConfig().rewards, *TrainConfig().eval.rewards]
    assert run("rewards", "check").config == RewardsCheckConfig(rewards=by_default)
    (tmp_path / "b.yaml").write_text("stps: 3\n")
    assert error(run("rewards", "check", "--config", "b.yaml")).startswith("b.yaml: unknown key 'stps'")


def test_print_config_prints_what_load_config_reads(run, tmp_path):
    result = run("train", "--print_config", "--steps", "3", "--algorithm", "grpo", "--rewards", "[{name: clip}]")
    assert (result.code, result.config) == (0, None)
    (tmp_path / "x.yaml").write_text(result.out)
    assert load_config("x.yaml") == TrainConfig(steps=3, algorithm="grpo", rewards=[RewardConfig("clip")])


def test_resume_takes_the_settings_of_the_run(run, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.yaml").write_text("steps: 3\nseed: 9\ngroup_size: 4\nalgorithm: grpo\n")
    (tmp_path / "c.yaml").write_text("output_dir: old\nseed: 8\n")
    config = run("train", "--resume", "--output_dir", "old", "--steps", "6").config
    assert (config.steps, config.seed, config.group_size, config.algorithm) == (6, 9, 4, "grpo")
    config = run("train", "--config", "c.yaml", "--resume").config
    assert (config.steps, config.seed, config.output_dir, config.resume) == (3, 8, "old", True)
    assert run("train", "--output_dir", "old").config.seed == 0  # only to resume
    assert run("train", "--output_dir", "new", "--resume").config.seed == 0  # the run itself says that there is none


# --- bad input ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trian", "unknown command 'trian'; did you mean 'train'?"),
        ("--verson", "unknown option '--verson'; did you mean '--version'?"),
        ("rewards", "'rewards' goes on: gcpo-t2i rewards check, or gcpo-t2i rewards serve"),
        ("rewards chek", "unknown command 'rewards chek'; did you mean 'rewards check'?"),
        ("train --grup_size 4", "unknown option '--grup_size'; did you mean '--group_size'?"),
        ("train --grup_size=4", "unknown option '--grup_size'; did you mean '--group_size'?"),
        ("train --step 4", "unknown option '--step'; did you mean '--steps'?"),
        ("train -steps 4", "unknown option '-steps'; did you mean '--steps'?"),
        ("train --learning_rate 1", "unknown option '--learning_rate'; did you mean '--optim.learning_rate'?"),
        ("train --credit x.yaml", "unknown option '--credit'; did you mean '--credit.top'?"),
        ("train --rewards.name clip", "unknown option '--rewards.name'; did you mean '--rewards'?"),
        ("train x.yaml", "unexpected argument 'x.yaml'; options start with --, a settings file is --config FILE"),
        ("train --steps", "--steps needs a value"),
        ("train --steps --seed 3", "--steps needs a value"),
        ("train --config", "--config needs a value"),
        ("train --steps many", "steps: 'many' is not an int"),
        ("train --steps 3.5", "steps: '3.5' is not an int"),
        ("train --steps null", "steps: 'null' is not an int"),
        ("train --guidance big", "guidance: 'big' is not a number"),
        ("train --resume maybe", "resume: 'maybe' is not true or false"),
        ("train --loss.clip_low low", "loss.clip_low: 'low' is not a number or null"),
        ("train --optim.betas 0.9", "optim.betas: '0.9' is not a list of 2 numbers"),
        ("train --optim.schedule cosin", "optim.schedule 'cosin' is unknown; did you mean 'cosine'?"),
        ("train --log.report_to wandbb", "log.report_to 'wandbb' is unknown; did you mean 'wandb'?"),
        (
            "train --monitor.rewards [{nam:_clip}]",
            "unknown key 'monitor.rewards.nam'; did you mean 'monitor.rewards.name'?",
        ),
        ("train --monitor.rewards clip", "monitor.rewards: 'clip' is not a list of {name, weight, kwargs} or null"),
        ("train --rewards clip", "rewards: 'clip' is not a list of {name, weight, kwargs}"),
        ("train --rewards [{", "rewards: '[{' is not a list of {name, weight, kwargs}"),
        ("train --rewards [clip]", "rewards: 'clip' is not a group of settings"),
        ("train --rewards [{nam:_clip}]", "unknown key 'rewards.nam'; did you mean 'rewards.name'?"),
        ("train --rewards [{weight:_1}]", "rewards.name is missing"),
        ("train --rewards [{name:_a,weight:_x}]", "rewards.weight: 'x' is not a number"),
        (
            "train --algorithm gpco",
            f"algorithm 'gpco' is unknown{CALLED_SO}",
        ),
        ("train --steps 0", "steps must be > 0, not 0"),
        ("train --resume", "resume which run? Name its folder with --output_dir"),
        ("train --config none.yaml", "none.yaml: no such file"),
        ("train --config .", ".: cannot be read (Is a directory)"),
        ("pretrain --stage vqq", "stage 'vqq' is unknown; did you mean 'vq'?"),
        ("sample", "give either --prompt 'a photo of a red circle' or --prompts FILE"),
    ],
)
def test_bad_arguments(run, line, message):
    assert error(run(*(word.replace("_", " ") if "{" in word else word for word in line.split()))) == message


def test_group_size_one(run):
    assert error(run("train", "--group_size", "1")).startswith("group_size 1 leaves no group to compare an image with")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "algorithm: gpco",
            f"x.yaml: algorithm 'gpco' is unknown{CALLED_SO}",
        ),
        ("credit: {top: 1.5}", "x.yaml: credit.top must be in (0, 1), not 1.5"),
        ("stps: 3", "x.yaml: unknown key 'stps'; did you mean 'steps'?"),
        ("learning_rate: 1", "x.yaml: unknown key 'learning_rate'; did you mean 'optim.learning_rate'?"),
        ("credit:\n  topp: 1", "x.yaml: unknown key 'credit.topp'; did you mean 'credit.top'?"),
        ("credit.top: 1", "x.yaml: 'credit.top' is written as a group: 'credit:', and 'top: ...' indented under it"),
        ("credit: 3", "x.yaml: credit: 3 is not a group of settings"),
        ("credit:", "x.yaml: credit: None is not a group of settings"),
        ("steps: many", "x.yaml: steps: 'many' is not an int"),
        ("steps: 3.5", "x.yaml: steps: 3.5 is not an int"),
        ("steps:", "x.yaml: steps: null is not an int"),
        ("output_dir: 5", "x.yaml: output_dir: 5 is not a string or null"),
        ("optim: {betas: [0.9]}", "x.yaml: optim.betas: [0.9] is not a list of 2 numbers"),
        ("dtype: float16", "x.yaml: dtype 'float16' is unknown; did you mean 'bfloat16'?"),
        ("log: {report_to: [wandbb]}", "x.yaml: log.report_to 'wandbb' is unknown; did you mean 'wandb'?"),
        ("rewards: clip", "x.yaml: rewards: 'clip' is not a list of {name, weight, kwargs}"),
        ("rewards: [clip]", "x.yaml: rewards: 'clip' is not a group of settings"),
        ("rewards: [{nam: clip}]", "x.yaml: unknown key 'rewards.nam'; did you mean 'rewards.name'?"),
        ("rewards: [{weight: 2}]", "x.yaml: rewards.name is missing"),
        ("rewards: [{name: a, weight: x}]", "x.yaml: rewards.weight: 'x' is not a number"),
        ("eval: {rewards: [{nam: clip}]}", "x.yaml: unknown key 'eval.rewards.nam'; did you mean 'eval.rewards.name'?"),
        ("steps: 3\nseed: 1\nsteps: 4", "x.yaml, line 3: the key 'steps' is there twice"),
        ("optim:\n  betas: [0, 0]\n  betas: [0, 0]", "x.yaml, line 3: the key 'betas' is there twice"),
        ("- a", "x.yaml: expected lines like 'steps: 40', got a list"),
        ("a: [1\nb: 2", "x.yaml, line 2: expected ',' or ']', but got ':'"),
        ("steps: *a", "x.yaml, line 1: found undefined alias 'a'"),
        ("{a: 1}: 2", "x.yaml, line 1: found unhashable key"),
        ("x: !!python/name:os.system", None),
        (b"steps: \xff", "x.yaml: not UTF-8 (byte 0xff at offset 7)"),
        (b"steps: \x07", None),
    ],
)
def test_bad_files(run, tmp_path, content, message):
    (tmp_path / "x.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    line = error(run("train", "--config", "x.yaml"))
    assert line.startswith("x.yaml") if message is None else line == message


def test_a_file_is_blamed_only_for_what_it_says(run, tmp_path):
    (tmp_path / "good.yaml").write_text("steps: 3\n")
    (tmp_path / "bad.yaml").write_text("steps: -3\nseed: -1\n")
    assert error(run("train", "--config", "bad.yaml", "--config", "good.yaml")) == "bad.yaml: seed must be >= 0, not -1"
    assert error(run("train", "--config", "good.yaml", "--steps", "-2")) == "steps must be > 0, not -2"
    assert error(run("train", "--config", "bad.yaml", "--steps", "-2")) == "steps must be > 0, not -2"


# --- exit codes ---------------------------------------------------------------


def runs(monkeypatch, effect) -> None:
    monkeypatch.setitem(sys.modules, "gcpo_t2i.train", SimpleNamespace(train=effect))


def raises(exception):
    def train(config):
        raise exception

    return train


def test_the_result_is_printed(monkeypatch, capsys):
    runs(monkeypatch, lambda config: "runs/grpo-1")
    assert main(["train"]) == 0
    assert capsys.readouterr().out == "results: runs/grpo-1\n"


@pytest.mark.parametrize("exception", [UserError("no such prompts"), RewardError("reward 'x' returned nan")])
def test_errors_of_a_command_are_one_line(monkeypatch, capsys, exception):
    runs(monkeypatch, raises(exception))
    assert main(["train"]) == 2
    assert capsys.readouterr() == ("", f"gcpo-t2i: error: {exception}\n")


def test_a_command_may_have_its_own_exit_code(monkeypatch, capsys):
    runs(monkeypatch, lambda config: 1)
    assert main(["train"]) == 1
    assert capsys.readouterr().out == ""


def test_ctrl_c(monkeypatch, capsys):
    runs(monkeypatch, raises(KeyboardInterrupt()))
    assert main(["train"]) == 130
    assert capsys.readouterr() == ("", "\ngcpo-t2i: stopped by Ctrl-C\n")


def test_a_bug_keeps_its_stack_trace(monkeypatch):
    runs(monkeypatch, raises(ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        main(["train"])


def test_arguments_default_to_those_of_the_process(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gcpo-t2i", "--version"])
    assert main() == 0
    assert capsys.readouterr().out.startswith("gcpo-t2i ")


def test_parse_of_a_file_alone(tmp_path):
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"prompt": "a cat"}))
    assert parse(SampleConfig, [f"--config={tmp_path / 's.yaml'}"]) == SampleConfig(prompt="a cat")
