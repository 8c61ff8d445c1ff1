"""Command-line arguments and YAML files → a checked config; the messages where that fails.

jsonargparse makes the flags out of a config dataclass; this file adds what a person at a terminal needs: the nearest
name for a misspelt one, the file that a bad setting came from, yes/no flags without a value, and flags that win over
`--config` wherever they stand.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from gcpo_t2i.annotations import admits, describe, is_plain_list, item_class, kinds_of, not_null
from gcpo_t2i.config import ConfigError, CotTrainConfig, EvaluationConfig, TrainConfig, suggest, validate
from gcpo_t2i.errors import UserError, did_you_mean
from gcpo_t2i.yaml_files import Loader, read_yaml, to_yaml

METAVARS = {"an int": "N", "an int or auto": "N", "a number": "X", "a string": "TEXT"}

EXPLANATION = """\
Options are given as --key value, nested ones as --key.sub value, yes/no ones as --key alone. The same keys
make a YAML file for --config; an option on the command line wins over the file."""


def parse(
    kind: type[Any], argv: Sequence[str], prog: str = "gcpo-t2i", description: str = "", also: type[Any] | None = None
) -> Any:
    """A checked config of the class `kind` from command-line arguments, or from `--config=FILE` alone.

    What a file says that the class `also` knows and `kind` does not is left out.

    Raises UserError; SystemExit after --help and --print_config.
    """
    from jsonargparse import ArgumentError

    parser = _parser(kind, prog, description)
    paths, given, rest = _split(kind, argv)
    files = {path: _read(kind, path, group, also) for path, group in paths.items()}
    if saved := _run_to_resume(kind, given, files):
        files = {saved: read_yaml(saved)} | files
    parsed, in_files = None, {}
    for path, content in files.items():
        parsed, in_files[path] = _add_file(parser, parsed, kind, path, content)
    try:
        parsed = parser.instantiate(parser.parse_args(rest, parsed))
    except ArgumentError as error:
        raise UserError(_explain(str(error), kind, given)) from error
    config = kind(**{item.name: parsed[item.name] for item in fields(kind)})
    try:
        validate(config)
    except ConfigError as error:
        source = [path for path, keys in in_files.items() if error.key in keys and error.key not in given]
        if not source:
            raise
        raise ConfigError(error.key, f"{source[-1]}: {error}") from error
    if parsed["print_config"]:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


def load_config(path: str | Path, kind: type[Any] = TrainConfig) -> Any:
    """The `kind` of config that a YAML file holds, validated, with defaults where it is silent.

    Raises UserError, which names the file.
    """
    return parse(kind, [f"--config={path}"])


def _parser(kind: type[Any], prog: str, description: str) -> Any:
    from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

    class Formatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
        """Keeps the line breaks of the examples."""

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=prog,
        usage=f"{prog} [--config FILE] [--key value ...]",
        description=description,
        epilog=EXPLANATION,
        formatter_class=Formatter,
        exit_on_error=False,
        allow_abbrev=False,
        print_config=None,  # its own prints what it parsed; ours, further down, what was checked
    )
    parser.add_argument(
        "--config", metavar="FILE", default=argparse.SUPPRESS, help="YAML file with any of the options below."
    )
    parser.add_argument("--print_config", action="store_true", help="Print all settings as YAML and exit.")
    parser.add_class_arguments(kind, None, default=asdict(kind()))
    kinds, hints, groups = kinds_of(kind), get_type_hints(kind), _whole_configs(kind)
    for action in parser._actions:
        if kinds.get(action.dest) is bool:
            action.nargs, action.const = "?", True  # --resume is --resume true
        elif action.dest in kinds:
            action.metavar = METAVARS.get(describe(kinds[action.dest]).removesuffix(" or null"), action.metavar)
        elif action.dest in groups:
            action.metavar, action.help = "FILE", "YAML file with any of these settings, as for the command itself."
        elif action.dest in hints or action.dest.endswith(".help"):
            action.help = argparse.SUPPRESS  # a group's own file (--config does that), and help on list items
    return parser


def _whole_configs(kind: type[Any]) -> list[str]:
    """The settings that are the config of another command, and can be read from its files: `--train FILE`."""
    return [name for name, annotation in get_type_hints(kind).items() if annotation is TrainConfig]


def _split(kind: type[Any], argv: Sequence[str]) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Config files with the group that each is for ("" is all), options with the values as typed, and the arguments for
    jsonargparse, without the config files."""
    kinds, groups = kinds_of(kind), _whole_configs(kind)
    may_be_empty = {item.name for item in fields(kind) if item.metadata.get("or_empty")}
    files: dict[str, str] = {}
    given: dict[str, str] = {}
    rest: list[str] = []
    queue = list(argv)
    while queue:
        token = queue.pop(0)
        if not _is_option(token):
            raise UserError(f"unexpected argument '{token}'; options start with --, a settings file is --config FILE")
        option, equals, value = token.partition("=")
        key = option.removeprefix("--").removesuffix("+")
        if option in ("-h", "--help", "--print_config"):
            rest.append(token)
            continue
        if not option.startswith("--") or key not in (*kinds, *groups, "config"):
            known = (f"--{name}" for name in (*kinds, *groups, "config", "print_config", "help"))
            raise UserError(f"unknown option '{option}'{did_you_mean(option, known)}")
        if not equals and queue and not _is_option(queue[0]):
            equals, value = "=", queue.pop(0)  # --key value is --key=value
            while queue and not _is_option(queue[0]) and is_plain_list(kinds.get(key)):
                value += f",{queue.pop(0)}"  # --seeds 0 1 2
        empty_text = equals and not value and key in may_be_empty
        if not value and not empty_text and kinds.get(key) is not bool:
            raise UserError(f"{option} needs a value")
        if key == "config" or key in groups:
            files[value] = key if key in groups else ""
        else:
            given[key] = value
            rest.append(f"{option}={_as_json(key, value, kinds[key])}" if value or empty_text else option)
    return files, given, rest


def _is_option(token: str) -> bool:
    """Not a negative number, and not a text with spaces that starts with a dash."""
    return re.match(r"--?[A-Za-z_]", token) is not None and " " not in token.partition("=")[0]


def _as_json(key: str, value: str, annotation: Any) -> str:
    """A list of names may be typed as wandb,trackio; items of a list of dataclasses are checked and completed."""
    if get_origin(not_null(annotation)) is not list:
        return value
    if not (item := item_class(annotation)):
        return value if value.startswith("[") else json.dumps(value.split(","))
    try:
        content = yaml.load(value, Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{key}: {value!r} is not {describe(annotation)}") from error
    if isinstance(content, dict):  # for --rewards+
        return json.dumps(_complete(item, content, key))
    return json.dumps([_complete(item, element, key) for element in content]) if isinstance(content, list) else value


def _complete(item: Any, element: Any, key: str) -> dict[str, Any]:
    """An item with all of its fields; jsonargparse would fill a gap from the item of the list that is replaced."""
    _check_keys(item, element, f"{key}.")
    for part in fields(item):
        if part.default is MISSING and part.default_factory is MISSING and part.name not in element:
            raise UserError(f"{key}.{part.name} is missing")
    return asdict(item(**element))


def _run_to_resume(kind: type[Any], given: Mapping[str, str], files: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The saved settings of the run to go on with, if there are any. They yield to --config and to the command line."""
    if kind not in (CotTrainConfig, EvaluationConfig, TrainConfig) or given.get("resume", "false").lower() not in (
        "",
        "true",
        "yes",
    ):
        return None
    folders = [settings["output_dir"] for settings in (*files.values(), given) if settings.get("output_dir")]
    saved = Path(str(folders[-1])) / "config.yaml" if folders else None
    return str(saved) if saved and saved.is_file() else None


def _add_file(parser: Any, base: Any, kind: type[Any], path: str, content: dict[str, Any]) -> tuple[Any, set[str]]:
    """The settings of a file on top of `base`, and the dotted keys that it sets. Raises UserError with its path."""
    from jsonargparse import ArgumentError

    given: dict[str, Any] = {}
    try:
        given = _check_keys(kind, content)
        return parser.parse_object(deepcopy(content), base), set(given)  # a copy, because it writes into its argument
    except ArgumentError as error:
        raise UserError(f"{path}: {_explain(str(error), kind, given)}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _read(kind: Any, path: str, group: str | None, also: Any) -> dict[str, Any]:
    """The settings in a file: those of `group` if it is named, and none that only `also` has."""
    content = read_yaml(path)
    if also is not None:
        content = _without(also, kind, content)
    return {group: content} if group else content


def _without(other: Any, kind: Any, content: dict[str, Any]) -> dict[str, Any]:
    """A file's content without the settings of the class `other` that the class `kind` lacks."""
    own, others = get_type_hints(kind), get_type_hints(other)
    kept = {name: value for name, value in content.items() if name in own or name not in others}
    groups = [name for name in kept if name in others and is_dataclass(own.get(name)) and isinstance(kept[name], dict)]
    return kept | {name: _without(others[name], own[name], kept[name]) for name in groups}


def _check_keys(kind: Any, content: Any, prefix: str = "", root: Any = None) -> dict[str, Any]:
    """Dotted key → value of a nested mapping, whose list items it completes in place.

    Raises UserError for what jsonargparse lets pass or explains badly.
    """
    if not isinstance(content, dict):
        raise UserError(f"{prefix.rstrip('.')}: {content!r} is not a group of settings")
    known = kinds_of(root or kind, "" if root else prefix)
    hints = get_type_hints(kind)
    given: dict[str, Any] = {}
    for name, value in content.items():
        key = f"{prefix}{name}"
        if name not in hints and key in known:
            group, _, leaf = key.rpartition(".")
            raise UserError(f"'{key}' is written as a group: '{group}:', and '{leaf}: ...' indented under it")
        if name not in hints:
            raise UserError(f"unknown key '{key}'{suggest(key, known)}")
        annotation = hints[name]
        given[key] = value
        if is_dataclass(annotation):
            given |= _check_keys(annotation, value, f"{key}.", root or kind)
        elif value is None and not admits(annotation, NoneType):
            raise UserError(f"{key}: null is not {describe(annotation)}")
        elif (item := item_class(annotation)) and isinstance(value, list):
            content[name] = [_complete(item, element, key) for element in value]
    return given


# --- what went wrong ----------------------------------------------------------


def _explain(message: str, kind: type[Any], given: Mapping[str, Any]) -> str:
    """jsonargparse's message in one line: `steps: 'many' is not an int`. What it does not recognise it passes on."""
    kinds = kinds_of(kind)
    key, *inner = dict.fromkeys(re.findall(r'Parser key "([\w.]+)"', message)) or [""]
    if key not in kinds:
        return " ".join(message.split())
    annotation = kinds[key]
    found = re.search(r"(?:Got|Given) value: (.*)", message)
    value = given.get(key, found[1] if found else "")
    if inner and found and (item := item_class(annotation)):
        key, annotation, value = f"{key}.{inner[0]}", kinds_of(item).get(inner[0]), found[1]
    choice = get_args(annotation)[0] if get_origin(annotation) is list else annotation
    if get_origin(choice) is Literal and found:
        return f"{key} '{found[1]}' is unknown{did_you_mean(found[1], get_args(choice))}"
    return f"{key}: {value!r} is not {describe(annotation)}"
