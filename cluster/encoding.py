"""Configs to and from JSON, and their checks, by field name and type."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
from collections.abc import Callable, Mapping
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from cluster.outside import find_system
from sim import SYSTEMS, system_name
from sim.checks import require
from sim.system import System

hints_of: Callable[[Any], dict[str, Any]] = functools.cache(get_type_hints)
"""Annotations by field; kept, as sweeps have ten thousand configs of a handful of types."""


@functools.cache
def is_system(kind: type) -> bool:
    """Whether instances of the class are systems; `isinstance` with a protocol asks for every attribute every time."""
    return all(hasattr(kind, name) for name in ("rows", "draw", "relations", "diagnose"))


def encode(value: Any) -> Any:
    """JSON-able form of a config; a system carries its listed name as `type`. Numbers in float fields become floats."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = hints_of(type(value))
        body = {
            item.name: encode_field(getattr(value, item.name), hints[item.name]) for item in dataclasses.fields(value)
        }
        return {"type": system_name(cast(System, value)), **body} if is_system(type(value)) else body
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    return [encode(item) for item in value] if isinstance(value, tuple | list) else value


def encode_field(value: Any, hint: Any) -> Any:
    """JSON-able form of a field's value; a whole number in a float field becomes a float."""
    floats = float in (hint, *get_args(hint)) and int not in get_args(hint)
    return float(value) if floats and isinstance(value, int) and not isinstance(value, bool) else encode(value)


def decode(kind: Any, value: Any, name: str = "config") -> Any:
    """The inverse of `encode`, for a dataclass type or an annotation. ValueError names what is unknown or wrong.

    A system that is not listed is imported by its `module.Class` (see `cluster.outside` for what that allows).
    """
    if kind is System:
        listed = value.get("type") if isinstance(value, Mapping) else None
        outside = isinstance(listed, str) and "." in listed
        allowed = f"a mapping with a type among {', '.join(SYSTEMS)}, or the module.Class of another system"
        require(listed in SYSTEMS or outside, name, value, allowed)
        own = SYSTEMS[str(listed)] if listed in SYSTEMS else find_system(str(listed), name)
        return decode(own, {key: item for key, item in value.items() if key != "type"}, name)
    if dataclasses.is_dataclass(kind):
        require(isinstance(value, Mapping), name, value, "a mapping of fields")
        hints = hints_of(kind)
        for key in value:
            require_known(key, [item.name for item in dataclasses.fields(kind)], name)
        return cast(Any, kind)(**{key: decode(hints[key], item, f"{name}.{key}") for key, item in value.items()})
    if get_origin(kind) is tuple and isinstance(value, list | tuple):
        return tuple(decode(get_args(kind)[0], item, name) for item in value)
    if get_origin(kind) is not None and get_origin(kind) not in (tuple, Literal, Union, types.UnionType):
        require(isinstance(value, Mapping), name, value, "a mapping")
        return {key: decode(get_args(kind)[1], item, f"{name}.{key}") for key, item in value.items()}
    require(matches(value, kind), name, value, describe(kind))
    return value


def require_known(name: str, known: list[str], where: str) -> None:
    """Raise ValueError with the nearest known name unless `name` is among them."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it must be one of {', '.join(known)}"
        raise ValueError(f"{where}: {name!r} is unknown; {hint}")


def matches(value: Any, kind: Any) -> bool:
    """Whether a plain value has the annotated type; whole numbers count as floats, truth values never as numbers."""
    if get_origin(kind) in (Union, types.UnionType):
        return any(matches(value, option) for option in get_args(kind))
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(matches(item, get_args(kind)[0]) for item in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is type(None) or kind is None:
        return value is None
    return isinstance(value, kind if isinstance(kind, type) else get_origin(kind) or object)


def describe(kind: Any) -> str:
    """The annotation in words."""
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(describe(option) for option in get_args(kind))
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"a list of which each is {describe(get_args(kind)[0])}"
    words = {float: "a finite number", int: "a whole number", str: "a text", bool: "True or False", type(None): "None"}
    return words.get(kind, getattr(kind, "__name__", str(kind)))


def check(config: Any, prefix: str = "") -> None:
    """Raise ValueError by dotted field name where a value in a (nested) dataclass has a wrong type or is not finite."""
    hints = hints_of(type(config))
    for item in dataclasses.fields(config):
        value, kind, name = getattr(config, item.name), hints[item.name], prefix + item.name
        if dataclasses.is_dataclass(value):
            check(value, name + ".")
        elif isinstance(value, Mapping):
            for key, items in value.items():
                require(matches(items, get_args(kind)[1]), f"{name}.{key}", items, describe(get_args(kind)[1]))
        else:
            require(matches(value, kind), name, value, describe(kind))


def set_field(config: Any, values: Mapping[str, object], where: str) -> Any:
    """The dataclass with dotted fields replaced at once. ValueError by full name where one is unknown or wrong."""
    hints = hints_of(type(config))
    nested: dict[str, dict[str, object]] = {}
    plain: dict[str, object] = {}
    for name, value in values.items():
        head, _, rest = name.partition(".")
        require_known(head, [item.name for item in dataclasses.fields(config)], where)
        if rest:
            nested.setdefault(head, {})[rest] = value
        else:
            require(matches(value, hints[head]), f"{where}.{head}", value, describe(hints[head]))
            plain[head] = value
    deep = {head: set_field(getattr(config, head), rest, f"{where}.{head}") for head, rest in nested.items()}
    return dataclasses.replace(config, **plain, **deep)
