"""The forward pass, as the jobs of this folder try it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from flashcore_cupy.attention import attention, plan
from flashcore_cupy.check import verify
from flashcore_cupy.check.inputs import inputs
from flashcore_cupy.cpu.emulator.plan import EmulatedPlan, emulated_plan
from flashcore_cupy.launch.plan import GpuPlan
from flashcore_cupy.measure.passes import Choice, OnCpu, OnGpu, Overrides, Pass, Trial
from flashcore_cupy.measure.problems import (
    canonical,
    elements_of,
    in_layout,
    problem_json,
    rules_of,
    to_gpu,
)
from flashcore_cupy.problem.attention_problem import ITEMSIZE, AttentionProblem
from flashcore_cupy.problem.blocks import Array
from flashcore_cupy.select import registry, selector


@dataclass(frozen=True)
class Forward(Pass):
    """Attention on a problem of ``problem_of``."""

    problem: AttentionProblem

    ladder: ClassVar = {name: kernel.idea for name, kernel in registry.KERNELS.items()}

    def choose(
        self, arch: str, kernel: str = "auto", overrides: Overrides = None
    ) -> selector.Selection:
        """The kernel for it."""
        return selector.select(self.problem, arch, kernel=kernel, overrides=overrides)

    @property
    def gate(self) -> str | None:
        """The stage that it stops at."""
        return self.problem.gate

    @property
    def flops(self) -> float:
        """Of the two products."""
        return self.problem.flops

    @property
    def memory_needed(self) -> int:
        """Bytes on the host: the arrays, and what is computed in float32 and float64."""
        problem = self.problem
        heads = problem.batch * problem.heads_q
        q, k, v, o = elements_of(problem)
        item = ITEMSIZE[problem.dtype] * (1 if problem.layout == "bhsd" else 2)
        made = 4 * (q + k + v)  # random numbers in float32, before they are rounded
        rows = verify.sample_size(problem)
        judged = 16 * max(q, k)  # the lengths of rows, in float64
        if problem.gate in ("qk", "softmax"):
            judged += 12 * heads * problem.seqlen_q * problem.seqlen_kv
            judged += 32 * heads * rows * problem.seqlen_kv
        else:
            judged += 32 * heads * rows * problem.head_dim_v
        judged += 32 * min(rows * problem.seqlen_kv, 2**22)  # the oracle's block of scores
        return item * (q + k + v + o) + max(made, judged)

    def to_json(self) -> dict[str, Any]:
        """Return its sizes and rules under the command line's names."""
        return problem_json(self.problem)

    def trial(self, seed: int) -> ForwardTrial:
        """Draw q, k and v."""
        return ForwardTrial(self.problem, inputs(self.problem, seed))


@dataclass
class ForwardTrial(Trial):
    """q, k and v, canonical, and what they give."""

    problem: AttentionProblem
    host: tuple[Array, Array, Array]
    known: verify.Expectation | None = field(default=None, init=False)

    def expect(self, choice: Choice | None = None) -> None:
        """Find the output; a sample of its rows has those at the edges of a tile."""
        if self.known is None:
            tile = 64 if choice is None else choice.configs[-1].tile.block_m
            self.known = verify.expect(self.problem, *self.host, tile=tile)

    @property
    def extent(self) -> dict[str, int]:
        """Rows of the output."""
        self.expect()
        assert self.known is not None
        return {"rows_checked": len(self.known.rows)}

    def _chosen(self, kernel: str, overrides: Overrides) -> dict[str, Any]:
        given = {"gate": self.problem.gate, "kernel": kernel, "config": overrides}
        return rules_of(self.problem) | given

    @property
    def _wants_lse(self) -> bool:
        return self.problem.gate is None

    @property
    def _stops(self) -> bool:
        """Whether a gate stops before there is an output."""
        return self.problem.gate in ("qk", "softmax")

    @functools.cached_property
    def _arrays(self) -> list[Array]:
        """q, k and v in the problem's layout."""
        return in_layout(self.problem, *self.host)

    def _target(self) -> dict[str, Array]:
        """A new output."""
        if self._stops:
            return {}
        return {"out": np.full(self.problem.output_shape, np.nan, self.host[0].dtype)}

    @functools.cached_property
    def _gpu_arrays(self) -> list[Any]:
        return to_gpu(self._arrays)

    @functools.cached_property
    def _gpu_target(self) -> dict[str, Any]:
        """The output of all kernels there."""
        return {name: to_gpu([x])[0] for name, x in self._target().items()}

    def on_gpu(self, kernel: str, overrides: Overrides = None) -> GpuPlan:
        """Bind a kernel to q, k, v and an output."""
        for out in self._gpu_target.values():
            out.fill(np.nan)
        q, k, v = self._gpu_arrays
        given = self._chosen(kernel, overrides) | self._gpu_target
        bound = plan(q, k, v, return_lse=self._wants_lse, **given)
        assert isinstance(bound, GpuPlan)
        return bound

    def calls_on_gpu(self, kernel: str, overrides: Overrides = None) -> Callable[[], Any]:
        """Call ``attention``."""
        given = self._chosen(kernel, overrides) | self._gpu_target
        return lambda: attention(*self._gpu_arrays, **given)

    def emulated(self, arch: str, kernel: str, overrides: Overrides = None) -> EmulatedPlan:
        """Bind a kernel to q, k, v and an output."""
        q, k, v = self._arrays
        given = self._chosen(kernel, overrides) | self._target()
        return emulated_plan(q, k, v, arch, return_lse=self._wants_lse, **given)

    def by_numpy(self) -> Callable[[], Any]:
        """Call ``attention``."""
        given = self._chosen("auto", None) | self._target()
        return lambda: attention(*self._arrays, return_lse=self._wants_lse, **given)

    def check(self, bound: OnGpu | OnCpu) -> verify.Check:
        """Check the output and the log-sum-exp, or a stage."""
        assert isinstance(bound, GpuPlan | EmulatedPlan)
        if bound.selection.kernel.quantizes:
            return verify.check_plan(bound, *self.host)
        self.expect(bound.selection)  # of what was asked for, whatever the plan is of
        return verify.check_plan(bound, *self.host, known=self.known)

    def check_call(self, made: Any) -> verify.Check:
        """Check what NumPy has returned."""
        got, lse = made if self._wants_lse else (made, None)
        self.expect()
        assert self.known is not None
        return self.known.judge(got if self._stops else canonical(self.problem, got), lse)
