"""What a command raises, as one message and an exit code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import click


class _Refused(click.ClickException):
    exit_code = 2


class OneLineErrors(click.Group):
    """Turns what is raised into one message and an exit code, never a traceback."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Read the options before the command's name."""
        with _one_line():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            with _one_line():
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except MemoryError as error:
            raise click.ClickException(f"out of memory: {error}; try a smaller problem") from error
        except (OSError, RuntimeError) as error:  # CompileError, CUDA's errors, a missing NVRTC
            raise click.ClickException(str(error)) from error


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """A usage error as its message alone, without the lines of usage that click puts above it."""
    try:
        yield
    except click.UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # click 8.2; it is the page of help
            raise
        message = error.format_message().replace("\n", " ")
        if message.startswith("No such") and error.ctx is not None:
            message += f" {error.ctx.command_path} --help shows what there is."
        raise _Refused(message) from error
