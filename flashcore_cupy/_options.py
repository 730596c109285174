"""Options that commands share, and how their values are checked: a bad one is exit code 2."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import click

from flashcore_cupy import builds, jit, nvrtc, tiles
from flashcore_cupy.config import Tile
from flashcore_cupy.problem import DTYPES, AttentionProblem, contiguous_problem

Command = TypeVar("Command", bound=Callable[..., None])
POSITIVE = click.IntRange(min=1)
PICTURES = (".pdf", ".png", ".svg")


@contextlib.contextmanager
def bad_input() -> Iterator[None]:
    """Around calls that check what the user asked for: a refusal is exit code 2."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise click.UsageError(str(error)) from error


def writable(*suffixes: str) -> Callable[..., Path | None]:
    """Callback of an option for a file: can it be written? Before any work; creates no folder."""

    def check(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
        if path is None:
            return None
        if suffixes and path.suffix.lower() not in suffixes:
            raise click.BadParameter(f"{path}: use a name that ends in {', '.join(suffixes)}")
        try:
            if not path.parent.is_dir():
                raise click.BadParameter(f"{path}: there is no folder {path.parent}")
            existed = path.exists()
            with path.open("ab"):
                pass
            if not existed:
                path.unlink()
        except OSError as error:
            raise click.BadParameter(f"{path} cannot be written: {error.strerror}") from error
        return path

    return check


def json_option(command: Command) -> Command:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON alone on stdout.")(
        command
    )


def problem_options(command: Command) -> Command:
    options = (
        click.option(
            "--B", "batch", type=POSITIVE, metavar="N", default=1, show_default=True, help="Batch."
        ),
        click.option(
            "--H",
            "heads",
            type=POSITIVE,
            metavar="N",
            default=8,
            show_default=True,
            help="Query heads.",
        ),
        click.option(
            "--S",
            "seqlen",
            type=POSITIVE,
            metavar="N",
            default=512,
            show_default=True,
            help="Queries per head.",
        ),
        click.option(
            "--D",
            "head_dim",
            type=POSITIVE,
            metavar="N",
            default=64,
            show_default=True,
            help="Head dim.",
        ),
        click.option(
            "--Hkv",
            "heads_kv",
            type=POSITIVE,
            metavar="N",
            help="Heads of k and v; H is a multiple. [H]",
        ),
        click.option("--Skv", "seqlen_kv", type=POSITIVE, metavar="N", help="Keys per head. [S]"),
        click.option("--dtype", type=click.Choice(DTYPES), default="float16", show_default=True),
        click.option("--causal", is_flag=True, help="Query i sees keys j <= i + Skv - S."),
        click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True),
    )
    for option in reversed(options):
        command = option(command)
    return command


def timing_options(command: Command) -> Command:
    iters = click.option(
        "--iters",
        type=POSITIVE,
        metavar="N",
        default=100,
        show_default=True,
        help="Timed samples of at least 1 ms each; fewer where that takes more than 4 s.",
    )
    warmup = click.option(
        "--warmup",
        type=click.IntRange(min=0),
        default=10,
        show_default=True,
        help="Samples before the timed ones.",
    )
    return iters(warmup(command))


arch_option = click.option(
    "--arch",
    metavar="TARGET",
    help=f"Target to compile for where there is no GPU [{builds.DEFAULT_ARCH}]; "
    "with a GPU, its own target is used.",
)


def problem_of(sizes: Mapping[str, Any], gate: Any = None) -> AttentionProblem:
    return contiguous_problem(
        sizes["batch"],
        sizes["heads"],
        sizes["seqlen"],
        sizes["head_dim"],
        heads_kv=sizes["heads_kv"],
        seqlen_kv=sizes["seqlen_kv"],
        dtype=sizes["dtype"],
        causal=sizes["causal"],
        gate=gate,
    )


def overrides_of(changes: tuple[str, ...]) -> dict[str, object] | None:
    """Parse ``block_n=32`` (several with commas or blanks between) by the field's type."""
    kinds = {
        f.name: type(f.default) if f.default is True or f.default is False else int
        for f in fields(Tile)
    }
    found: dict[str, object] = {}
    for change in " ".join(changes).replace(",", " ").split():
        name, equals, text = change.partition("=")
        if not equals or name not in kinds:
            raise click.UsageError(
                f"--set: got {change!r}; use FIELD=VALUE with a field of {', '.join(kinds)}"
            )
        found[name] = _value(change, text, kinds[name])
    return found or None


def _value(change: str, text: str, kind: type) -> object:
    words = {"true": True, "1": True, "false": False, "0": False}
    with contextlib.suppress(ValueError, KeyError):
        return words[text.lower()] if kind is bool else int(text)
    wanted = "true or false" if kind is bool else "a whole number"
    raise click.UsageError(f"--set: got {change!r}; its value is {wanted}")


def target_of(arch: str | None) -> str:
    on_gpu = jit.no_gpu_reason() is None
    if arch is not None:
        check_arch(arch)
        if on_gpu:
            click.echo("note: --arch is for machines without a GPU; this GPU decides", err=True)
    with bad_input():
        chosen = builds.target(arch, on_gpu=on_gpu)
    check_arch(chosen)
    return chosen


def check_arch(arch: str) -> None:
    with bad_input():
        tiles.capability(arch)
        with contextlib.suppress(RuntimeError):  # without NVRTC, nothing will be compiled
            nvrtc.check_arch(arch)


@contextlib.contextmanager
def missing_extra() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise click.UsageError(f"--plot: {error}") from error
