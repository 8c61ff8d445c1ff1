"""Objects by name: `pkg.module:name`, or `path/to/file.py:name` for a file that is part of no package."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from rewards.errors import RewardError, did_you_mean


def _module_from_file(path: Path) -> ModuleType:
    """Run the file as a module of its own. `sys.path` stays as it is, so the file cannot shadow anything."""
    path = path.expanduser().resolve()
    if not path.is_file():
        raise RewardError(f"no such file: {path}")
    name = f"_file_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # a .py suffix always has a loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look the module up by name
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise RewardError(f"{path} failed to load: {type(error).__name__}: {error}") from error
    return module


def _module_by_name(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise RewardError(f"module {name!r} failed to import: {error}") from error
        raise RewardError(
            f"no module named {error.name!r} (of {name!r}) is installed; a file is named as path/to/file.py:name"
        ) from error
    except Exception as error:
        raise RewardError(f"module {name!r} failed to import: {type(error).__name__}: {error}") from error


def load_object(spec: str) -> Any:
    """The object that `pkg.module:name` or `path/to/file.py:name` names. Raises RewardError with the reason."""
    source, _, attribute = spec.rpartition(":")
    if not source or not attribute:
        raise RewardError(f"{spec!r} is not of the form pkg.module:name or path/to/file.py:name")
    module = _module_from_file(Path(source)) if source.endswith(".py") else _module_by_name(source)
    if not hasattr(module, attribute):
        public = [name for name in vars(module) if not name.startswith("_")]
        raise RewardError(f"{source} has no {attribute!r}{did_you_mean(attribute, public)}")
    return getattr(module, attribute)


def make(label: str, target: Any, settings: Mapping[str, Any], device: str | None = None) -> Any:
    """What a name stands for: a class is instantiated with its settings, a function is taken as it is.

    A class with a parameter `device` gets this one, unless it is among the settings. RewardError, which begins with the label,
    for settings that the class does not have, and for what it raises.
    """
    if not inspect.isclass(target):
        if not callable(target):
            raise RewardError(f"{label} is {type(target).__name__}, not a function or a class")
        if settings:
            raise RewardError(f"{label} is a function and takes no settings, got {', '.join(settings)}")
        return target
    parameters = inspect.signature(target).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        for key in settings:
            if key not in parameters:
                raise RewardError(f"{label} has no setting {key!r}{did_you_mean(key, parameters)}")
    given = {"device": device} if device is not None and "device" in parameters else {}
    try:
        made = target(**given | dict(settings))
    except RewardError as error:
        raise RewardError(f"{label}: {error}") from error
    except Exception as error:
        raise RewardError(f"{label} could not be made: {type(error).__name__}: {error}") from error
    if not callable(made):
        raise RewardError(f"{label}: objects of class {target.__name__} are not callable")
    return made
