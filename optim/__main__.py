"""`python -m optim package.module:factory package.module:example`: compile a module and print what was found.

The factory is called without arguments and returns the module; the example is called as `example(batch_size, length)`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from optim import CompileError, CompileReport, ConfigError, ModelError, compile_model
from optim.config import Pt2Config
from optim.device import ensure_cache_folder
from optim.report import group_refusals
from optim.share import finish_offers


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile as told and print the report; return 0, 1 where the model or its compilation failed, 2 for a mistake."""
    options = _make_parser().parse_args(arguments)
    logging.basicConfig(format="%(relativeCreated)8d ms  %(message)s", stream=sys.stderr)
    logging.getLogger("optim").setLevel(logging.INFO)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    ensure_cache_folder()  # what is imported from now on may import Dynamo
    try:
        factory = _find("factory", options.factory)
        example = _find("example", options.example)
        model = compile_model(
            factory(),
            example,
            Pt2Config.parse(_read_pt2(options.pt2)).at_start(),
            batch_sizes=options.batch_sizes,
            lengths=options.lengths,
            device=options.device,
        )
    except ConfigError as error:
        print(f"configuration error: {error}", file=sys.stderr)
        return 2
    except (ModelError, CompileError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    finish_offers()  # what does not arrive is told in the report
    print(format_report(model.report))
    if options.json is not None:
        options.json.write_text(json.dumps(model.report.to_dict(), indent=2) + "\n")
    return 0


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m optim", description=__doc__)
    parser.add_argument("factory", help="package.module:callable that returns the module")
    parser.add_argument("example", help="package.module:callable(batch_size, length) that returns its inputs")
    parser.add_argument("--pt2", default="", help="a backend's name, or the pt2 section as JSON (default: auto)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="N")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the whole report there")
    return parser


def _find(key: str, path: str) -> Callable[..., Any]:
    module_name, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(key, path, f"use package.module:callable ({error})") from error
    if not callable(found):
        raise ConfigError(key, path, "name something that can be called")
    return found  # type: ignore[no-any-return]


def _read_pt2(text: str) -> Any:
    if not text.startswith("{"):
        return text or None
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError("--pt2", text, f"use a backend's name or JSON ({error})") from error


def format_report(report: CompileReport) -> str:
    """Return the report as a table with its notes and refusals, for a terminal."""
    rows = [("bucket", "engine", "ms", "eager ms", "ratio", "max error")]
    for b in report.buckets:
        error = "-" if b.max_abs_error is None else f"{b.max_abs_error:.1e}"
        figures = (f"{b.ms or 0:.3g}", f"{b.eager_ms or 0:.3g}", f"{b.speedup or 0:.2f}x")
        rows.append((str(b.bucket), b.engine, *figures, error))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.append(f"{report.device['name']}, {report.device['threads']} threads, torch {report.torch_version}")
    lines += [f"seconds: {', '.join(f'{name} {seconds:.1f}' for name, seconds in report.seconds.items())}"]
    lines += [f"note: {note}" for note in report.notes]
    lines += [f"refused: {reason}" for reason in group_refusals(report.all_refusals())]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
