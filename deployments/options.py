"""`python -m deployments.options`: the README's table of options, read off the configuration classes."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Iterator
from typing import Any

from deployments.args import ModelArgs


def field_docs(cls: type[Any]) -> dict[str, str]:
    """Return the docstring that stands under each field of a class."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for statement, following in zip(definition.body, definition.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            docs[statement.target.id] = " ".join(str(following.value.value).split())
    return docs


def describe_options(cls: type[Any], path: str = "") -> Iterator[tuple[str, str]]:
    """Yield (key, description) of every option, those of sections under their section's key."""
    hints, docs = typing.get_type_hints(cls), field_docs(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from describe_options(hints[field.name], f"{path}{field.name}.")
        else:
            yield f"{path}{field.name}", docs[field.name]


def make_table() -> str:
    """Return the options as a Markdown table."""
    rows = [f"| `{key}` | {text.replace('|', chr(92) + '|')} |" for key, text in describe_options(ModelArgs)]
    return "\n".join(["| key under `args` | meaning |", "|---|---|", *rows])


if __name__ == "__main__":
    print(make_table())
