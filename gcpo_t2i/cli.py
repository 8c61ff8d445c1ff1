"""The command line: `gcpo-t2i COMMAND [--config FILE] [--key.sub value ...]`.

A command is a row of `COMMANDS`: a config dataclass, and the function that gets it. `gcpo_t2i.parsing` makes the config out
of the arguments; the module that does the work is imported last, when all settings have been checked.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gcpo_t2i import __version__
from gcpo_t2i.config import CompareConfig, PretrainConfig, ProbeConfig, SampleConfig, TrainConfig
from gcpo_t2i.errors import UserError, did_you_mean
from gcpo_t2i.parsing import EXPLANATION, parse


@dataclass(frozen=True)
class Command:
    """`run` is called with a `config` and returns where its results are, an exit code, or None."""

    config: type[Any]
    run: str
    summary: str
    details: str


COMMANDS = {
    "train": Command(
        TrainConfig,
        "gcpo_t2i.train:train",
        "fine-tune a text-to-image model by reinforcement learning",
        """\
Fine-tune an autoregressive text-to-image model by reinforcement learning. Without any option: the model,
prompts and rewards that ship with the package, on the CPU if there is no GPU, results in runs/.

  gcpo-t2i train
  gcpo-t2i train --algorithm grpo --steps 100 --output_dir runs/grpo
  gcpo-t2i train --config configs/shapesworld_grpo.yaml --optim.learning_rate 5e-5
  gcpo-t2i train --rewards '[{"name": "clip", "weight": 0.5}, {"name": "my_reward.py:score"}]'
  gcpo-t2i train --output_dir runs/grpo --resume""",
    ),
    "probe": Command(
        ProbeConfig,
        "gcpo_t2i.probe:probe",
        "does a set-up learn at all? A minute's answer, with the likely cause if not",
        """\
Does this set-up learn at all? A few steps with the model, algorithm, batch, precision and learning rate of a
run, on four fixed prompts and with a reward that every model can raise: the redness of the image.
Says learns, does not learn or unclear, shows the curve, and names the likely cause if it does not.
Exit code 0 if it learns, else 1.

It takes every option of train, so that the command or the settings file of a run can be probed as it is.
Rewards, evaluation, checkpoints, warm-up and schedule of the run are not used.

  gcpo-t2i probe
  gcpo-t2i probe --model my/policy --algorithm grpo --optim.learning_rate 1e-5 --dtype bfloat16
  gcpo-t2i probe --config my_run.yaml --steps 20 --output_dir runs/probe""",
    ),
    "compare": Command(
        CompareConfig,
        "gcpo_t2i.compare:compare",
        "train several algorithms with several seeds; a table and a figure with intervals",
        """\
Train every algorithm with every seed, with the same settings otherwise and in parallel processes, and compare
them on the same held-out images: one table and one figure, with intervals over seeds and prompts, and each
algorithm's difference to grpo and to random_credit. The same command again goes on where it was.

Settings that all runs share are given as --train.KEY, or as --train FILE with the settings of a run; its
algorithm, seed and output_dir are replaced.

  gcpo-t2i compare
  gcpo-t2i compare --algorithms grpo guidance_gcpo random_credit --seeds 0 1 2 3 4 --output_dir runs/credit
  gcpo-t2i compare --train.steps 50 --train.updates_per_rollout 2 --jobs 2
  gcpo-t2i compare --train my_run.yaml --train.optim.learning_rate 2e-4""",
    ),
    "pretrain": Command(
        PretrainConfig,
        "gcpo_t2i.shapes.pretrain:pretrain",
        "make the shipped ShapesWorld checkpoints again from nothing",
        """\
Make the checkpoints that ship with the package again, from nothing: image tokenizer (vq), generator,
tiny CLIP, aesthetic head.

  gcpo-t2i pretrain --output_dir checkpoints
  gcpo-t2i pretrain --output_dir checkpoints --resume""",
    ),
    "sample": Command(
        SampleConfig,
        "gcpo_t2i.sample:sample",
        "make images from prompts",
        """\
Make images from a prompt, or from a file of prompts: one PNG each, and a grid of them all.

  gcpo-t2i sample --prompt "a photo of a red circle"
  gcpo-t2i sample --model runs/grpo --prompts shapesworld:heldout --num_images 2 --out samples/grpo""",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: the command's own or 0, 2 for bad input (one line on stderr), 130
    after Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(argv)
    except SystemExit as stop:  # argparse's way to end --help
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        print("\ngcpo-t2i: stopped by Ctrl-C", file=sys.stderr)
        return 130
    except ValueError as error:
        if not isinstance(error, UserError) and not _is_reward_error(error):
            raise
        print(f"gcpo-t2i: error: {error}", file=sys.stderr)
        return 2


def _is_reward_error(error: ValueError) -> bool:
    """By name, because a command line that imports `rewards` would pay for it in every --help."""
    return any(kind.__name__ == "RewardError" and kind.__module__.startswith("rewards") for kind in type(error).__mro__)


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        print(f"gcpo-t2i {__version__}")
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        kind = "option" if name.startswith("-") else "command"
        raise UserError(f"unknown {kind} '{name}'{did_you_mean(name, (*COMMANDS, '--help', '--version'))}")
    command = COMMANDS[name]
    config = parse(command.config, rest, prog=f"gcpo-t2i {name}", description=command.details)
    module, _, function = command.run.partition(":")
    result = getattr(importlib.import_module(module), function)(config)
    if isinstance(result, int):
        return result
    if result is not None:
        print(f"results: {result}")
    return 0


def _overview() -> str:
    commands = "\n".join(f"  {name:<10} {command.summary}" for name, command in COMMANDS.items())
    return f"""\
usage: gcpo-t2i COMMAND [--config FILE] [--key value ...]

Reinforcement learning for autoregressive text-to-image models, with more credit for the image
tokens that the prompt decided.

commands:
{commands}

  gcpo-t2i train                   trains the built-in model, in minutes and on a laptop
  gcpo-t2i COMMAND --help          every option of a command, with its default
  gcpo-t2i --version               the version

{EXPLANATION}"""
