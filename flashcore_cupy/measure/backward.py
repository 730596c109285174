"""The backward pass, as the jobs of this folder try it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from flashcore_cupy.attention import attention
from flashcore_cupy.backward import attention_backward, plan_backward
from flashcore_cupy.check import verify_backward
from flashcore_cupy.check.inputs import inputs, output_gradient
from flashcore_cupy.check.verify import on_host
from flashcore_cupy.check.verify_backward import GradientsCheck
from flashcore_cupy.cpu.emulator.backward import EmulatedBackward, emulated_backward
from flashcore_cupy.launch.backward import GpuBackward
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
from flashcore_cupy.problem.gradients import (
    BackwardGate,
    BackwardProblem,
    Gradients,
    contiguous_gradients,
)
from flashcore_cupy.select.backward import BackwardSelection, select_backward
from flashcore_cupy.select.backward_table import BACKWARD_KERNELS

#: What has a gradient where all rules are values.
INPUTS = ("q", "k", "v")


@dataclass(frozen=True)
class Backward(Pass):
    """The gradients of attention on a problem of ``problem_of``."""

    problem: AttentionProblem
    wrt: tuple[str, ...] = INPUTS
    gate: BackwardGate | None = None
    deterministic: bool = True

    ladder: ClassVar = {n: BACKWARD_KERNELS[n].idea for n in reversed(tuple(BACKWARD_KERNELS))}

    @functools.cached_property
    def described(self) -> BackwardProblem:
        """What is asked for."""
        return contiguous_gradients(
            self.problem, self.wrt, self.gate, deterministic=self.deterministic
        )

    def choose(
        self, arch: str, kernel: str = "auto", overrides: Overrides = None
    ) -> BackwardSelection:
        """The kernels for it."""
        return select_backward(self.described, arch, kernel=kernel, overrides=overrides)

    @property
    def flops(self) -> float:
        """Of its products: 2.5 times the forward's for all three gradients."""
        return self.described.flops

    @property
    def memory_needed(self) -> int:
        """Bytes on the host: the arrays, and what is computed in float32 and float64."""
        problem = self.problem
        q, k, v, o = elements_of(problem)
        item = ITEMSIZE[problem.dtype] * (1 if problem.layout == "bhsd" else 2)
        if self.gate is not None:
            judged = 48 * math.prod(problem.scores)
        else:
            heads_kv = problem.batch * problem.heads_kv
            share = len(verify_backward.sample_heads(problem)) / heads_kv
            judged = int(32 * share * (q + k + v))  # each gradient in float64, several times
        judged += 64 * min(problem.seqlen_q * problem.seqlen_kv, 2**22)  # blocks of scores
        made = 4 * (q + k + v + o)  # random numbers in float32, before they are rounded
        return item * (2 * q + 2 * k + 2 * v + 2 * o) + max(made, judged)

    def to_json(self) -> dict[str, Any]:
        """Return its sizes and rules under the command line's names."""
        asked = [result.of for result in self.described.results]
        return problem_json(self.problem) | {
            "gate": self.gate,
            "wrt": asked,
            "deterministic": self.deterministic,
        }

    def trial(self, seed: int) -> BackwardTrial:
        """Draw q, k, v and the gradient of the output."""
        q, k, v = inputs(self.problem, seed)
        do = output_gradient(self.problem, seed)
        return BackwardTrial(self, {"do": do, "q": q, "k": k, "v": v})


@dataclass
class BackwardTrial(Trial):
    """do, q, k and v, canonical, and the gradients that they give."""

    wanted: Backward
    host: Mapping[str, Array]
    known: verify_backward.BackwardExpectation | None = field(default=None, init=False)

    def expect(self, choice: Choice | None = None) -> None:
        """Find the gradients of a sample of the heads."""
        if self.known is None and self.wanted.gate is None:
            wrt = [result.of for result in self.wanted.described.results]
            self.known = verify_backward.expect(self.wanted.problem, self.host, wrt)

    @property
    def extent(self) -> dict[str, int]:
        """All rows of some heads."""
        heads = verify_backward.sample_heads(self.wanted.problem)
        return {"rows_checked": self.wanted.problem.seqlen_q, "heads_checked": len(heads)}

    def _chosen(self, kernel: str, overrides: Overrides) -> dict[str, Any]:
        wanted = self.wanted
        given = {"wrt": wanted.wrt, "gate": wanted.gate, "deterministic": wanted.deterministic}
        return rules_of(wanted.problem) | given | {"kernel": kernel, "config": overrides}

    @functools.cached_property
    def _arrays(self) -> dict[str, Array]:
        """do, q, k, v, and o and lse by NumPy, in the problem's layout."""
        problem = self.wanted.problem
        do, q, k, v = in_layout(problem, *(self.host[name] for name in ("do", "q", "k", "v")))
        o, lse = attention(q, k, v, return_lse=True, **rules_of(problem))
        return {"do": do, "q": q, "k": k, "v": v, "o": o, "lse": lse}

    def _target(self) -> dict[str, Any]:
        """New gradients."""
        if self.wanted.gate is not None:
            return {}
        results = self.wanted.described.results
        like = {result.name: self.host[result.of] for result in results}
        made = in_layout(self.wanted.problem, *(np.full_like(x, np.nan) for x in like.values()))
        return {"out": dict(zip(like, made, strict=True))}

    @functools.cached_property
    def _gpu_arrays(self) -> dict[str, Any]:
        """The same, but o and lse by the fastest kernel."""
        problem = self.wanted.problem
        names = ("do", "q", "k", "v")
        placed = to_gpu(in_layout(problem, *(self.host[name] for name in names)))
        o, lse = attention(*placed[1:], return_lse=True, **rules_of(problem))
        return dict(zip(names, placed, strict=True)) | {"o": o, "lse": lse}

    @functools.cached_property
    def _gpu_target(self) -> dict[str, Any]:
        """The gradients that all kernels write there."""
        out = self._target().get("out", {})
        return {"out": dict(zip(out, to_gpu(list(out.values())), strict=True))} if out else {}

    def on_gpu(self, kernel: str, overrides: Overrides = None) -> GpuBackward:
        """Bind kernels to the inputs and to gradients."""
        for x in self._gpu_target.get("out", {}).values():
            x.fill(np.nan)
        given = self._chosen(kernel, overrides) | self._gpu_target
        bound = plan_backward(**self._gpu_arrays, **given)
        assert isinstance(bound, GpuBackward)
        return bound

    def calls_on_gpu(self, kernel: str, overrides: Overrides = None) -> Callable[[], Any]:
        """Call ``attention_backward``."""
        given = self._gpu_arrays | self._chosen(kernel, overrides) | self._gpu_target
        return lambda: attention_backward(**given)

    def emulated(self, arch: str, kernel: str, overrides: Overrides = None) -> EmulatedBackward:
        """Bind kernels to the inputs and to gradients."""
        name = self.wanted.choose(arch, kernel, overrides).name
        given = self._chosen(name, overrides) | self._target()
        return emulated_backward(self._arrays, arch, **given)

    def by_numpy(self) -> Callable[[], Any]:
        """Call ``attention_backward``."""
        given = self._arrays | self._chosen("auto", None) | self._target()
        return lambda: attention_backward(**given)

    def check(self, bound: OnGpu | OnCpu) -> GradientsCheck:
        """Check each gradient, or a stage."""
        assert isinstance(bound, GpuBackward | EmulatedBackward)
        if self.wanted.gate is None:
            return self.check_call(bound.gradients)
        given = {name: on_host(bound.arrays[name]) for name in ("o", "lse")}
        return self._check_stage(on_host(bound.gate_output()), given)

    def check_call(self, made: Any) -> GradientsCheck:
        """Check what NumPy has returned."""
        if not isinstance(made, Gradients):
            return self._check_stage(made, {name: self._arrays[name] for name in ("o", "lse")})
        self.expect()
        assert self.known is not None
        made = {name: x for name, x in made._asdict().items() if x is not None}
        problem = self.wanted.problem
        return self.known.judge({name: canonical(problem, on_host(x)) for name, x in made.items()})

    def _check_stage(self, got: Array, given: Mapping[str, Array]) -> GradientsCheck:
        problem = self.wanted.problem
        operands = {**self.host, "o": canonical(problem, given["o"]), "lse": given["lse"]}
        rules = rules_of(problem) | {"softmax_scale": problem.softmax_scale}
        del rules["layout"]
        assert self.wanted.gate is not None
        return verify_backward.check_stage(problem, self.wanted.gate, operands, got, rules)
