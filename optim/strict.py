"""Reading a mapping into a frozen dataclass: unknown keys and wrong types are refused by name."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from optim.errors import ConfigError

T = TypeVar("T")
Prepare = Mapping[str, Callable[[Mapping[Any, Any]], Mapping[Any, Any]]]


def read_section(
    path: str,
    section: Any,
    cls: type[T],
    *,
    prepare: Prepare | None = None,
    given: Mapping[str, Callable[[], Any]] | None = None,
) -> T:
    """Build `cls` from a mapping, section by section.

    `path` is the section's place in the file, for the messages; `prepare` rewrites a named subsection before
    it is read; `given` are fields whose values come from elsewhere. Raises ConfigError for anything but a mapping,
    an unknown key or a value of another type.
    """
    if section is None:
        section = {}
    if not isinstance(section, Mapping):
        raise ConfigError(path, section, "use a mapping of keys to values")
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in section.items():
        if key not in hints:
            raise ConfigError(f"{path}.{key}", value, _unknown(str(key), list(hints)))
        wanted = hints[key]
        if dataclasses.is_dataclass(wanted):
            if value is not None and prepare and key in prepare and isinstance(value, Mapping):
                value = prepare[key](value)
            values[key] = read_section(f"{path}.{key}", value, typing.cast(type[Any], wanted))
        else:
            values[key] = _check_type(f"{path}.{key}", value, wanted)
    values.update({key: make() for key, make in (given or {}).items()})
    return cls(**values)


def _unknown(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"there is no such key; {hint}known here: {', '.join(known)}"


def _check_type(path: str, value: Any, wanted: Any) -> Any:
    options = get_args(wanted) if get_origin(wanted) in (Union, types.UnionType) else (wanted,)
    for option in options:
        if _matches(value, option):
            if option is float:
                return float(value)
            if isinstance(value, tuple):
                return list(value)
            return dict(value) if isinstance(value, Mapping) else value
    raise ConfigError(path, value, f"use {' or '.join(_name(option) for option in options)}")


def _matches(value: Any, wanted: Any) -> bool:
    origin = get_origin(wanted)
    if origin is Literal:
        return isinstance(value, str) and value in get_args(wanted)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    if origin is list:
        return isinstance(value, list | tuple) and all(_matches(item, get_args(wanted)[0]) for item in value)
    if isinstance(value, bool):  # a bool is an int to isinstance, but not to a reader of YAML
        return wanted is bool
    if wanted is float:
        return isinstance(value, int | float)
    return isinstance(value, wanted)


def _name(wanted: Any) -> str:
    if get_origin(wanted) is Literal:
        return " or ".join(repr(choice) for choice in get_args(wanted))
    if get_origin(wanted) is Mapping:
        return "a mapping"
    if get_origin(wanted) is list:
        return f"a list, each item {_name(get_args(wanted)[0])}"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", types.NoneType: "nothing"}
    return names.get(wanted, str(wanted))
