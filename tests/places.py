"""Where attention runs in a test: by NumPy, by a kernel on this GPU, or by one that is emulated.

A test of what a kernel computes takes ``on``, a ``Place``; the ``conftest.py`` of its folder says
which. What it is tried with stands in ``each``.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from helpers import ROOT, TEST_ALL, gpu_skip_reason, one_at_a_time, runs_here

from flashcore_cupy.attention import attention, plan
from flashcore_cupy.check.selftest.case import Mod
from flashcore_cupy.cpu.emulator.plan import EmulatedPlan
from flashcore_cupy.cpu.emulator.run import Schedule
from flashcore_cupy.problem import varlen
from flashcore_cupy.select import registry

EXACT = tuple(name for name, kernel in registry.KERNELS.items() if not kernel.quantizes)
RULED = tuple(name for name, kernel in registry.KERNELS.items() if kernel.has_rules)
PACKED = tuple(name for name in RULED if registry.KERNELS[name].family.takes_packed)


def schedules() -> Iterator[Schedule]:
    """What a GPU does on its own ends at any moment, as late as it may, or at once, by turns."""
    return map(Schedule.seeded, itertools.count())


@dataclass(frozen=True)
class Place:
    """Where attention runs, by which kernel, and what every call is given besides."""

    kind: Literal["numpy", "gpu", "emulated"]
    kernel: str = "auto"
    also: Mapping[str, Any] = field(default_factory=dict)
    schedules: Iterator[Schedule] = field(default_factory=schedules)
    """Of emulated launches; from the first on in each test."""
    turn: int = 0
    """Of the test's rows, and of days: whose it is, where not all is tried at once."""

    @property
    def is_numpy(self) -> bool:
        return self.kind == "numpy"

    @property
    def is_emulated(self) -> bool:
        return self.kind == "emulated"

    @property
    def quantizes(self) -> bool:
        return not self.is_numpy and registry.KERNELS[self.kernel].quantizes

    @property
    def xp(self) -> Any:
        """The module of the arrays."""
        if self.kind != "gpu":
            return np
        import cupy

        return cupy

    def to_host(self, x: Any) -> np.ndarray:
        return x.get() if self.kind == "gpu" else x

    def attention(self, q: Any, k: Any, v: Any, **rules: Any) -> Any:
        """``attention`` of this place's arrays."""
        rules = {"kernel": self.kernel, **self.also, **rules}
        if self.is_emulated:
            build(plan(q, k, v, **rules))
        return attention(q, k, v, **rules)

    def run(self, q: Any, k: Any, v: Any, **rules: Any) -> Any:
        """``attention`` of NumPy arrays; emulated, each call has another schedule."""
        if self.is_emulated:
            bound = self.launched(q, k, v, **rules)
            if bound.problem.gate in ("qk", "softmax"):
                return bound.gate_output()
            o, lse = (bound.arrays.get(name) for name in ("o", "lse"))
            return o if lse is None else (o, lse)
        rules = {name: self._placed(name, value) for name, value in rules.items()}
        got = self.attention(*(self.xp.asarray(x) for x in (q, k, v)), **rules)
        return tuple(map(self.to_host, got)) if isinstance(got, tuple) else self.to_host(got)

    def launched(self, q: Any, k: Any, v: Any, **rules: Any) -> Any:
        """A plan for NumPy arrays that has been launched; not by NumPy."""
        rules = {name: self._placed(name, value) for name, value in rules.items()}
        arrays = (self.xp.asarray(x) for x in (q, k, v))
        bound = plan(*arrays, **{"kernel": self.kernel, **self.also, **rules})
        if self.is_emulated:
            build(bound)
            bound.launch(next(self.schedules))
        else:
            bound.launch()
        return bound

    def _placed(self, name: str, value: Any) -> Any:
        if isinstance(value, Mod):
            return value.python if self.is_numpy else value.cuda
        is_array = isinstance(value, np.ndarray) and not name.startswith("cu_seqlens")
        return self.xp.asarray(value) if is_array else value

    def few(self, *values: Any) -> tuple[Any, ...]:
        """These; emulated, every third."""
        return values[:: 3 if self.is_emulated else 1]

    def by_turns(self, kernels: tuple[str, ...]) -> tuple[str, ...]:
        """These; emulated, one of those that take rules, and two of the ladder's others."""
        if not self.is_emulated or TEST_ALL:
            return kernels
        large = [name for name in kernels if name in RULED]
        small = [name for name in kernels if name not in RULED]
        kept = {
            names[n % len(names)]
            for names, n in (
                (large, self.turn),
                (small, self.turn),
                (small, self.turn + len(small) // 2),
            )
            if names
        }
        return tuple(name for name in kernels if name in kept)

    def by(self, kernel: str, size: str | None = None) -> Place:
        """The same place with a kernel, and with the tile that a size gets on a GPU.

        A full grid would be too much to emulate; ``batch_invariant`` gives its tile to any.
        """
        is_full = self.is_emulated and size == "enough"
        return replace(self, kernel=kernel, also={"batch_invariant": True} if is_full else {})

    def takes(self, kernel: str, size: str | None = None, dtype: str | None = None) -> bool:
        """Whether a kernel is tried with this. Emulated, once per tile: the ladder has one each."""
        if dtype not in (None, *registry.KERNELS[kernel].dtypes):
            return False
        if self.kind == "gpu" and not runs_here(kernel):
            return False
        return not self.is_emulated or kernel in RULED or size in (None, "few blocks")


def build(bound: EmulatedPlan) -> None:
    """Build what a plan launches; of several workers that need it, one does."""
    configs = repr([step.config for step in bound.steps])
    with one_at_a_time(hashlib.sha256(configs.encode()).hexdigest()[:16]):
        bound.build()


_one_thread = threading.Lock()


@contextlib.contextmanager
def unchecked_boundaries() -> Iterator[None]:
    """Boundaries of packed batches are taken as they are, as those on a GPU are.

    For one thread at a time: whoever ends puts the check back.
    """
    with _one_thread, pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "_checked_on_host", lambda name, array, total: array.astype(np.int32))
        yield


def place_of(path: Path) -> Place:
    """By NumPy below ``tests/cpu``; else on the GPU, or emulated where there is none."""
    if ROOT / "tests" / "cpu" in path.parents:
        return Place("numpy")
    return Place("gpu" if gpu_skip_reason() is None else "emulated")


def each(
    names: str,
    values: Iterable[Any],
    *,
    numpy: Iterable[Any] | None = None,
    emulated: Iterable[Any] | None = None,
) -> pytest.MarkDecorator:
    """Try a test with each of the values; by NumPy, or emulated, with others.

    Of several, everything is tried with everything. Not so where kernels are emulated, for there
    each combination is a kernel to build: each value is tried with one of every other, in turn.
    """
    everything = tuple(values)
    chosen = {"gpu": None, "numpy": numpy, "emulated": emulated}
    kept = {kind: everything if x is None else tuple(x) for kind, x in chosen.items()}
    return pytest.mark.each(names, kept)


def parametrize(metafunc: pytest.Metafunc) -> None:
    """Do what ``each`` says of a test."""
    marks = list(metafunc.definition.iter_markers("each"))
    if not marks:
        return
    kind = place_of(metafunc.definition.path).kind
    axes = [(mark.args[0], mark.args[1][kind]) for mark in marks]
    if kind == "emulated":
        axes = [_in_turn(axes)]
    for names, values in axes:
        metafunc.parametrize(names, values, ids=_name_of)


def _in_turn(axes: list[tuple[str, tuple[Any, ...]]]) -> tuple[str, tuple[Any, ...]]:
    """Rows of one value per axis, as many as the longest axis has; another start in each round."""
    rows = []
    for n in range(max(len(values) for _, values in axes)):
        row: list[Any] = []
        for shift, (names, values) in enumerate(axes):
            value = values[(n + n // len(values) * shift) % len(values)]
            row += value if "," in names else [value]
        rows.append(tuple(row) if len(row) > 1 else row[0])
    return ", ".join(names for names, _ in axes), tuple(rows)


def _name_of(value: Any) -> str | None:
    """The same in each process: no functions' addresses."""
    if not isinstance(value, (dict, tuple)):
        return None
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def everywhere(*kernels: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test by NumPy, or, where its folder is of kernels, by each of these."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def on_each(on: Place, **rest: Any) -> None:
            if on.is_numpy:
                test(on=on, **rest)
                return
            failed = {}
            chosen = rest.get("size"), rest.get("dtype")
            taken = tuple(name for name in kernels if on.takes(name, *chosen))
            for name in on.by_turns(taken):
                try:
                    test(on=on.by(name, chosen[0]), **rest)
                except AssertionError as error:
                    failed[name] = error
                except ValueError as error:
                    if not _is_refusal(name, error):
                        raise
            assert not failed, "\n".join(f"{name}: {error}" for name, error in failed.items())

        return on_each

    return decorate


def _is_refusal(kernel: str, error: ValueError) -> bool:
    """Whether a kernel for one target, which has not all rules, says that it does not do this."""
    is_special = registry.KERNELS[kernel].family.row_align > 1
    return is_special and str(error).startswith(f"kernel {kernel!r}: ")
