"""Configs as YAML, and what people write in YAML files: 1e-4 is a number, a repeated key is an error."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import yaml

from gcpo_t2i.errors import UserError
from gcpo_t2i.files import write_text


class Loader(yaml.SafeLoader):
    """Takes 1e-4 for a number, as everybody but YAML 1.1 does, and a repeated key for an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []  # a list, since a key may be unhashable: the base class says so
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                problem = f"the key '{key}' is there twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.append(key)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Quotes what `Loader` would take for a number."""


for _kind in (Loader, Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


Dumper.add_representer(tuple, Dumper.represent_list)  # YAML has no tuples


def to_yaml(config: Any) -> str:
    """All settings as YAML, except those that concern one invocation only (resume, overwrite)."""
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in ("resume", "overwrite")}
    return yaml.dump(settings, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def save_config(config: Any, path: str | Path) -> None:
    """Writes `to_yaml` to a file, which `--config` and `load_config` read."""
    write_text(Path(path), to_yaml(config))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The settings in a file, {} if it is empty. Raises UserError, which names the file and the line."""
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8-sig"), Loader)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(f"{path}: not UTF-8 (byte 0x{byte:02x} at offset {error.start})") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: {error.problem}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if content is not None and not isinstance(content, dict):
        raise UserError(f"{path}: expected lines like 'steps: 40', got a {type(content).__name__}")
    return content or {}
