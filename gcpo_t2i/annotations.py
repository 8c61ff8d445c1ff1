"""The types of a config's settings, for the command line and its messages."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def kinds_of(kind: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key → type of every setting. Groups are left out."""
    kinds: dict[str, Any] = {}
    for name, annotation in get_type_hints(kind).items():
        kinds |= kinds_of(annotation, f"{prefix}{name}.") if is_dataclass(annotation) else {prefix + name: annotation}
    return kinds


def not_null(annotation: Any) -> Any:
    """`X` of the annotation `X | None`; any other as it is."""
    options = [option for option in get_args(annotation) if option is not NoneType]
    return options[0] if admits(annotation, NoneType) and len(options) == 1 else annotation


def item_class(annotation: Any) -> Any:
    """The dataclass of the items of a list annotation, else None."""
    annotation = not_null(annotation)
    item = get_args(annotation)[0] if get_origin(annotation) is list else None
    return item if is_dataclass(item) else None


def is_plain_list(annotation: Any) -> bool:
    return get_origin(annotation) is list and item_class(annotation) is None


def admits(annotation: Any, kind: type) -> bool:
    return annotation is kind or (get_origin(annotation) in (Union, UnionType) and kind in get_args(annotation))


def describe(annotation: Any) -> str:
    names = {int: "an int", float: "a number", bool: "true or false", str: "a string", NoneType: "null"}
    arguments = get_args(annotation)
    match get_origin(annotation):
        case origin if origin in (Union, UnionType):
            return " or ".join(describe(option) for option in arguments)
        case origin if origin is Literal:
            return f"{'one of ' if len(arguments) > 1 else ''}{', '.join(arguments)}"
        case origin if origin is tuple:
            return f"a list of {len(arguments)} numbers"
        case origin if origin is list and (item := item_class(annotation)):
            return f"a list of {{{', '.join(part.name for part in fields(item))}}}"
        case origin if origin is list:
            return "a list"
        case _:
            return names.get(annotation, "a mapping")
