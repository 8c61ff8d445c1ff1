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
from gcpo_t2i.config import (
    EnvConfig,
    EvaluationConfig,
    PlanConfig,
    PretrainConfig,
    RewardsCheckConfig,
    SampleConfig,
    TrainConfig,
)
from gcpo_t2i.errors import Stopped, UserError, did_you_mean
from gcpo_t2i.files import cannot_write
from gcpo_t2i.parsing import EXPLANATION, parse


@dataclass(frozen=True)
class Command:
    """`run` is called with a `config` and returns where its results are, or None. A file for --config may hold `also` the
    settings of that class, which are left out."""

    config: type[Any]
    run: str
    summary: str
    details: str
    also: type[Any] | None = None


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
    "eval": Command(
        EvaluationConfig,
        "gcpo_t2i.evals.command:evaluate",
        "score a model, or a folder of images, on GenEval's kind of prompts; compare two",
        """\
Score a model on prompts in GenEval's format. Writes GenEval's own layout of images, results.jsonl,
scores.json, and the recipe that the numbers were made with; prints the scores per tag and over all tags,
with 95 % intervals. Or score a folder of images that somebody else made; or compare two evaluations.

  gcpo-t2i eval
  gcpo-t2i eval --model runs/grpo/policy --prompts evaluation_metadata.jsonl --output_dir evals/grpo
  gcpo-t2i eval --model runs/grpo/policy --against evals/base
  gcpo-t2i eval --images folder/of/images
  gcpo-t2i eval --results evals/grpo --against evals/base""",
    ),
    "plan": Command(
        PlanConfig,
        "gcpo_t2i.plan:plan",
        "what a training run will take: batches, passes, memory, time",
        """\
What a training run will take, before it is started: batch arithmetic, passes through the model, memory by
part, and the time per step and per run. Options are those of train; nothing is written.

  gcpo-t2i plan
  gcpo-t2i plan --group_size 16 --micro_batch_size 8
  gcpo-t2i plan --config configs/shapesworld_grpo.yaml --processes 4
  gcpo-t2i plan --measure false --device cuda               # without a GPU at hand: no times""",
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
  gcpo-t2i sample --model runs/grpo/policy --prompts shapesworld:heldout --num_images 2 --out samples/grpo""",
    ),
    "rewards check": Command(
        RewardsCheckConfig,
        "gcpo_t2i.rewards_check:check",
        "score known good, bad and blank images: what does each reward say?",
        """\
Score images that are known to be good, bad, blank and noise with each reward, and show what it says, how long it
takes, and whether it tells good from bad. The exit code is 1 if a reward fails: it raises, or returns NaN, a value
out of its range, or the wrong number of scores.

  gcpo-t2i rewards check
  gcpo-t2i rewards check --rewards '[{"name": "my_reward.py:score"}]'
  gcpo-t2i rewards check --config configs/shapesworld_grpo.yaml
  gcpo-t2i rewards check --images known.jsonl --rewards '[{"name": "clip"}]'""",
        also=TrainConfig,
    ),
    "env": Command(
        EnvConfig,
        "gcpo_t2i.env:env",
        "versions and hardware, for a bug report",
        """\
Versions and hardware as Markdown, to be pasted into a bug report. It names no user, host or folder.

  gcpo-t2i env
  gcpo-t2i env --json""",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 1 from a check that failed, 2 for what the user can mend (one line on
    stderr), 128 + the signal for a run that was asked to end (130 after Ctrl-C)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(argv)
    except SystemExit as stop:  # argparse's way to end --help, and that of a check that failed
        return stop.code if isinstance(stop.code, int) else 0
    except Stopped as stopped:
        print(f"gcpo-t2i: {stopped}", file=sys.stderr)
        return 128 + stopped.signal
    except KeyboardInterrupt:
        print("\ngcpo-t2i: stopped by Ctrl-C", file=sys.stderr)
        return 130
    except OSError as error:
        if not cannot_write(error):
            raise
        print(f"gcpo-t2i: error: {error.filename or 'a file'}: cannot be written ({error.strerror})", file=sys.stderr)
        return 2
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
    words = 2 if " ".join(argv[:2]) in COMMANDS else 1
    name, rest = " ".join(argv[:words]), argv[words:]
    if name not in COMMANDS:
        kind = "option" if name.startswith("-") else "command"
        raise UserError(f"unknown {kind} '{name}'{did_you_mean(name, (*COMMANDS, '--help', '--version'))}")
    command = COMMANDS[name]
    config = parse(command.config, rest, prog=f"gcpo-t2i {name}", description=command.details, also=command.also)
    module, _, function = command.run.partition(":")
    result = getattr(importlib.import_module(module), function)(config)
    if result is not None:
        print(f"results: {result}")
    return 0


def _overview() -> str:
    commands = "\n".join(f"  {name:<14} {command.summary}" for name, command in COMMANDS.items())
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
