"""What a command prints on stdout: a page, or JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click
from rich.console import RenderableType

from flashcore_cupy.cli import tables


def report(as_json: bool, data: Any, page: Callable[[int], RenderableType]) -> None:
    """Print a result; ``page`` makes one for so many columns."""
    if as_json:
        click.echo(json_text(data))
    else:
        console = tables.console(fewest=tables.FEWEST_COLUMNS)
        console.print(page(console.width))


def json_text(data: Any) -> str:
    """A result as JSON, whatever numbers it has."""
    return json.dumps(tables.clean(data), indent=2, allow_nan=False)
