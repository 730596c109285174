"""Options that commands share, and how their values are checked: a bad one is exit code 2."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from flashcore_cupy.cuda import targets
from flashcore_cupy.jit import compiler, nvrtc
from flashcore_cupy.launch import builds
from flashcore_cupy.measure.backward import INPUTS
from flashcore_cupy.problem.attention_problem import (
    DTYPES,
    GATES,
    LAYOUTS,
    MAX_HEAD_DIM,
    MAX_SEQLEN,
    Causal,
)
from flashcore_cupy.problem.gradients import BACKWARD_GATES
from flashcore_cupy.problem.values import shown
from flashcore_cupy.select import registry
from flashcore_cupy.select.backward_table import BACKWARD_KERNELS
from flashcore_cupy.select.config import Tile

Command = TypeVar("Command", bound=Callable[..., None])
PICTURES = (".pdf", ".png", ".svg")
_CAUSAL: Mapping[str, Causal] = {"bottom-right": True, "top-left": "top-left"}
_OLDEST_ARCH = min(map(targets.capability, targets.TARGETS))


class Whole(click.types.IntParamType):
    """A whole number, refused in words that say which ones there are."""

    def __init__(self, least: int, most: int | None = None) -> None:
        self._least, self._most = least, most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number."""
        with contextlib.suppress(ValueError):
            number = int(value)
            if self._least <= number and (self._most is None or number <= self._most):
                return number
        up_to = "" if self._most is None else f" to {self._most}"
        wanted = f"a whole number from {self._least}{up_to}"
        self.fail(f"got {shown(value)}; use {wanted}", param, ctx)


POSITIVE = Whole(1)


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
    """Add --json."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON alone on stdout.")(
        command
    )


def _size(name: str, variable: str, help_text: str, **more: Any) -> Callable[[Any], Any]:
    limit = MAX_HEAD_DIM if name.startswith("--D") else MAX_SEQLEN
    return click.option(name, variable, type=Whole(1, limit), metavar="N", help=help_text, **more)


def _number(name: str, metavar: str, help_text: str) -> Callable[[Any], Any]:
    return click.option(name, type=float, metavar=metavar, default=0.0, help=help_text)


def problem_options(command: Command) -> Command:
    """Add what describes a problem: sizes, dtype, rules, and which pass."""
    with_default: dict[str, Any] = {"show_default": True}
    options = (
        _size("--B", "batch", "Batch.", default=1, **with_default),
        _size("--H", "heads", "Query heads.", default=8, **with_default),
        _size("--S", "seqlen", "Queries per head.", default=512, **with_default),
        _size("--D", "head_dim", "Head dim of q and k.", default=64, **with_default),
        _size("--Hkv", "heads_kv", "Heads of k and v; H is a multiple. [H]"),
        _size("--Skv", "seqlen_kv", "Keys per head. [S]"),
        _size("--Dv", "head_dim_v", "Head dim of v and the output. [D]"),
        click.option("--dtype", type=click.Choice(DTYPES), default=DTYPES[0], **with_default),
        click.option(
            "--causal",
            type=click.Choice(tuple(_CAUSAL)),
            is_flag=False,
            flag_value="bottom-right",
            callback=lambda ctx, param, value: _CAUSAL.get(value, False),
            help="Query i sees keys j <= i + Skv - S (bottom-right, the same as --causal alone), "
            "or j <= i.",
        ),
        click.option(
            "--window",
            type=(Whole(-1), Whole(-1)),
            metavar="LEFT RIGHT",
            help="Query i sees LEFT keys to the left and RIGHT to the right of key i + Skv - S "
            "(of key i with --causal top-left); -1: no bound.",
        ),
        _number("--softcap", "CAP", "s becomes CAP tanh(s / CAP)."),
        _number("--dropout-p", "P", "Drop probabilities with this chance; of seed 0 and offset 0."),
        click.option(
            "--layout",
            type=click.Choice(LAYOUTS),
            default=LAYOUTS[0],
            help="Order of the axes: (B, H, S, D) or (B, S, H, D).",
            **with_default,
        ),
        click.option("--backward", is_flag=True, help="The gradients instead of the output."),
        click.option(
            "--wrt",
            type=click.Choice(INPUTS),
            multiple=True,
            help="With --backward: only the gradient of this input; may be repeated. [q, k, v]",
        ),
        click.option(
            "--deterministic/--no-deterministic",
            default=True,
            help="With --backward: the same bits each time, or sums in any order.",
            **with_default,
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def selection_options(command: Command) -> Command:
    """Add what chooses the kernel and its tile."""
    names = ("auto", *registry.KERNELS, *BACKWARD_KERNELS)
    kernel = click.option("--kernel", type=click.Choice(names), default="auto", show_default=True)
    gate = click.option(
        "--gate",
        type=click.Choice(("none", *filter(None, (*GATES, *BACKWARD_GATES)))),
        default="none",
        show_default=True,
        callback=lambda ctx, param, value: None if value == "none" else value,
        help="Stop after a stage: scores, probabilities, P V with uniform P; with --backward "
        "after dP or dS, as the first of --wrt needs it.",
    )
    changes = click.option(
        "--set",
        "changes",
        metavar="FIELD=VALUE",
        multiple=True,
        help="Override a field of the kernel's configuration, such as block_n=32; may be repeated. "
        f"Fields: {', '.join(f.name for f in fields(Tile))}.",
    )
    return kernel(gate(changes(command)))


def timing_options(command: Command) -> Command:
    """Add the seed and how often a call is timed."""
    seed = click.option("--seed", type=Whole(0), metavar="N", default=0, show_default=True)
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
        type=Whole(0),
        metavar="N",
        default=10,
        show_default=True,
        help="Samples before the timed ones.",
    )
    return seed(iters(warmup(command)))


emulate_option = click.option(
    "--emulate/--no-emulate",
    default=True,
    show_default=True,
    help="Without a GPU, run the kernels themselves on the CPU; needs a C++ compiler.",
)

arch_option = click.option(
    "--arch",
    metavar="TARGET",
    help=f"Target to compile for where there is no GPU [{targets.DEFAULT_ARCH}]; "
    "with a GPU, its own target is used.",
)


def finite(ctx: click.Context, param: click.Parameter, values: tuple[float, ...]) -> Any:
    """Callback of an option for positive numbers, each finite."""
    for value in values:
        if not 0 < value < math.inf:  # so written that NaN fails
            raise click.BadParameter(f"got {value:g}; use a finite number above 0")
    return values


def refuse_beside(source: str, allowed: Collection[str]) -> None:
    """Refuse every option on the command line that means nothing beside ``source``."""
    ctx = click.get_current_context()
    given = [
        option.opts[0]
        for option in ctx.command.params
        if option.name not in allowed
        and ctx.get_parameter_source(option.name or "") is ParameterSource.COMMANDLINE
    ]
    if given:
        raise click.UsageError(
            f"{', '.join(given)}: not with {source}, which shows what was measured; leave it out"
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


def target_of(arch: str | None, *, gpu_decides: bool = True) -> str:
    """Return the target to compile for: the one named, else the GPU's."""
    on_gpu = gpu_decides and compiler.no_gpu_reason() is None
    if arch is not None:
        check_arch(arch)
        if on_gpu:
            click.echo("note: --arch is for machines without a GPU; this GPU decides", err=True)
    with bad_input():
        chosen = builds.target(arch, on_gpu=on_gpu)
    check_arch(chosen)
    return chosen


def check_arch(arch: str) -> None:
    """Raise ``click.BadParameter`` unless NVRTC can compile for a target."""
    found = re.fullmatch("sm_([0-9]{2,4})[af]?", arch)
    if found is None:
        raise click.UsageError(f"arch: got {shown(arch)}; use a target such as 'sm_90a'")
    if int(found[1]) < _OLDEST_ARCH:
        raise click.UsageError(
            f"arch: got {arch!r}; kernels need sm_{_OLDEST_ARCH} or later, such as 'sm_90a'"
        )
    with bad_input(), contextlib.suppress(RuntimeError):  # without NVRTC, nothing will be compiled
        nvrtc.check_arch(arch)


@contextlib.contextmanager
def missing_extra() -> Iterator[None]:
    """Turn a missing optional package into a message that names its extra."""
    try:
        yield
    except RuntimeError as error:
        raise click.UsageError(f"--plot: {error}") from error
