"""A problem bound to its kernel and its arrays: what a GPU launches, and what a CPU emulates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from flashcore_cupy.problem.attention_problem import AttentionProblem, Operand
from flashcore_cupy.select import gates, grids
from flashcore_cupy.select.config import KernelConfig
from flashcore_cupy.select.selector import Selection
from flashcore_cupy.select.tensor_view import View
from flashcore_cupy.select.units import MAX_GRID

Params = np.ndarray[Any, Any]
"""The struct that a kernel takes, by the names of its fields."""
Empty = Callable[[tuple[int, ...], Any], Any]
"""Makes an array of a shape and a dtype, whatever it holds."""

_FLOAT32 = np.dtype(np.float32)


def copied(params: Params) -> Params:
    """The same struct again, with what lies between its fields, which NumPy's copy leaves out."""
    made: Params = np.frombuffer(bytearray(params.tobytes()), params.dtype).reshape(())
    return made


class Launch(NamedTuple):
    """One launch: an entry point of a kernel, and what it gets."""

    number: int
    """Which of the selection's kernels it is, in launch order."""
    config: KernelConfig
    entry: str
    grid: int
    """Thread blocks."""
    params: Params


class Work(NamedTuple):
    """How much there is to do, and the memory that it takes beside the arrays."""

    blocks: int
    """Thread blocks of the last launch."""
    partials_bytes: int
    """Of the partials of split keys."""
    counters_bytes: int
    """Of counters, which are 0 between launches."""


@dataclass
class Plan(ABC):
    """One problem bound to its arrays: ``launch()`` runs it, as often as wanted."""

    problem: AttentionProblem
    selection: Selection
    output: Operand
    arrays: dict[str, Any] = field(default_factory=dict)
    """All that a launch touches: q, k, v, the output "o" in its own layout, "lse" or the gate's
    arrays, those of the rules, scratch, the workspace of split keys, and "mod_args[0]", ..."""

    @property
    @abstractmethod
    def array_module(self) -> Any:
        """CuPy or NumPy."""

    @abstractmethod
    def launch(self) -> None:
        """Run the kernel, or enqueue it."""

    @property
    def views(self) -> tuple[View, ...]:
        """How the kernel's tensor maps see its arrays; empty if it has none."""
        return self.selection.config.views(self.problem, self.output)

    def gate_output(self) -> Any:
        """What the gate stopped at, fp32 (B, H, Sq, Skv): scores, or normalised probabilities."""
        xp = self.array_module
        return gates.output(self.problem, self.selection.config, self.arrays, xp)

    def add_results(self, *, want_lse: bool, empty: Empty) -> None:
        """Allocate what a launch writes besides "o"."""
        if want_lse:
            self.arrays["lse"] = empty(self.problem.lse_shape, _FLOAT32)
        config = self.selection.config
        self.arrays |= gates.allocate(self.problem, config, self.array_module)

    def add_scratch(self, empty: Empty) -> None:
        """Allocate what the launches leave for each other."""
        like_q = self.problem.dtype, self.arrays["q"].dtype  # NumPy may not know bfloat16 by name
        for name, (shape, dtype) in self.selection.config.scratch(self.problem).items():
            self.arrays[name] = empty(shape, like_q[1] if dtype == like_q[0] else np.dtype(dtype))

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to launch.

        Rows of a packed batch without sequences are zeros, which a launch writes.
        """
        problem = self.problem
        return problem.seqlen_q == 0 or (problem.batch == 0 and not problem.packed)

    def work(self, params: Params, multiprocessors: int) -> Work:
        """Return how much there is to do.

        There is a thread block per block of rows and split of its keys, or as many as the kernel
        takes at most: then they claim work from a counter.
        """
        config = self.selection.config
        blocks, splits = grids.query_blocks(self.problem, config), int(params["splits"])
        most = config.most_blocks(multiprocessors)
        return Work(min(blocks * splits, most), *config.workspace_bytes(blocks, splits, most))

    def launches(
        self, params: Params, addresses: Mapping[str, int], mod_args: Sequence[int], blocks: int
    ) -> Iterator[Launch]:
        """Return every launch, in order; the last kernel takes ``params``, its last entry blocks.

        ``addresses``: of the arrays, by their names; ``mod_args``: of the mods'. Raises
        ``ValueError`` for more thread blocks than a launch may have.
        """
        known = params.dtype.fields or {}
        for name, address in addresses.items():
            if name in known:
                params[name] = address
        for index, address in enumerate(mod_args):
            params["mod_args"][index] = address
        for number, config in enumerate(self.selection.configs):
            is_last = config is self.selection.config
            own = params if is_last else np.zeros((), config.params)
            config.bind(own, self.problem, addresses)
            for entry, grid in zip(config.entries, config.grids(self.problem, blocks), strict=True):
                if grid > MAX_GRID:
                    most = "a launch has at most 2**31 - 1"
                    raise ValueError(f"q: needs {grid} thread blocks, {most}")
                if grid:
                    yield Launch(number, config, entry, grid, own)
