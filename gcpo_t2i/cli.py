"""The command line: `gcpo-t2i COMMAND [--config FILE] [--key.sub value ...]`.

`gcpo_t2i.commands` holds the commands, and `gcpo_t2i.parsing` makes a command's config out of the arguments; the module that
does the work is imported last, when all settings have been checked.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Sequence

from gcpo_t2i import __version__
from gcpo_t2i.commands import COMMANDS
from gcpo_t2i.errors import Stopped, UserError, did_you_mean
from gcpo_t2i.files import cannot_write
from gcpo_t2i.parsing import EXPLANATION, parse


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: the command's own or 0, 2 for what the user can mend (one line on stderr),
    128 + the signal for a run that was asked to end (130 after Ctrl-C)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.getLogger("huggingface_hub").setLevel(
        logging.ERROR
    )  # each of its tries without a network; ours names the cure
    try:
        return _dispatch(argv)
    except SystemExit as stop:  # argparse's way to end --help
        return stop.code if isinstance(stop.code, int) else 0
    except Stopped as stopped:
        _say(str(stopped), stopped.everywhere)
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
        _say(f"error: {error}", getattr(error, "everywhere", False))
        return 2


def _say(line: str, everywhere: bool) -> None:
    """`everywhere`: all processes of a run have the same to say, and the first one says it."""
    if not everywhere or os.environ.get("RANK", "0") == "0":
        print(f"gcpo-t2i: {line}", file=sys.stderr)


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
    longer = [known for known in COMMANDS if known.startswith(f"{argv[0]} ")]
    words = 2 if longer and len(argv) > 1 and not argv[1].startswith("-") else 1
    name, rest = " ".join(argv[:words]), argv[words:]
    if name not in COMMANDS and words == 1 and longer:
        raise UserError(f"'{name}' goes on: {', or '.join(f'gcpo-t2i {known}' for known in longer)}")
    if name not in COMMANDS:
        kind = "option" if name.startswith("-") else "command"
        raise UserError(f"unknown {kind} '{name}'{did_you_mean(name, (*COMMANDS, '--help', '--version'))}")
    command = COMMANDS[name]
    config = parse(command.config, rest, prog=f"gcpo-t2i {name}", description=command.details, also=command.also)
    module, _, function = command.run.partition(":")
    result = getattr(importlib.import_module(module), function)(config)
    if isinstance(result, int):
        return result
    if result is not None and os.environ.get("RANK", "0") == "0":
        print(f"results: {result}")
    return 0


def _overview() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
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
