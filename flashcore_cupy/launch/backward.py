"""A backward pass on a GPU: build its kernels, bind them to a call's arrays, launch them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from flashcore_cupy.jit import compiler
from flashcore_cupy.launch import tensor_map
from flashcore_cupy.launch.bind import place_of
from flashcore_cupy.launch.plan import LoadedKernel, Place, Step, launch_steps, load_kernel, step_of
from flashcore_cupy.problem import varlen
from flashcore_cupy.problem.gradients import BackwardCall, BackwardProblem
from flashcore_cupy.select import gates
from flashcore_cupy.select.backward import (
    BackwardSelection,
    arrays_of,
    backward_launches,
    backward_params,
    select_backward,
)
from flashcore_cupy.select.backward_plan import BackwardPlan
from flashcore_cupy.select.config import check_overrides
from flashcore_cupy.select.plan import Launch, Params, copied
from flashcore_cupy.select.tensor_view import View


@dataclass(frozen=True, eq=False)
class _Prepared:
    """A problem and its kernels, without any arrays."""

    selection: BackwardSelection
    kernels: tuple[LoadedKernel, ...]
    """In launch order."""
    params: Params
    """With all addresses 0."""


@dataclass
class GpuBackward(BackwardPlan):
    """A backward pass bound to CuPy arrays, which it keeps alive."""

    kernels: tuple[LoadedKernel, ...] = ()
    launches: tuple[Launch, ...] = ()
    steps: tuple[Step, ...] = ()
    params: Params | None = None
    """What the kernels take, without addresses."""

    def launches_at(
        self, addresses: Mapping[str, int], encode: Callable[[int, View], Params]
    ) -> list[Launch]:
        """All launches, if the arrays of these names lie there; ``encode`` makes tensor maps."""
        assert self.params is not None
        count = sum(name.startswith("mod_args[") for name in addresses)
        mod_args = [addresses[f"mod_args[{index}]"] for index in range(count)]
        params = copied(self.params)
        launches = backward_launches(
            self.problem, self.selection, params, addresses, mod_args, encode
        )
        return list(launches)

    @property
    def compiled(self) -> tuple[compiler.CompiledKernel, ...]:
        """What was built, in launch order."""
        return tuple(kernel.compiled for kernel in self.kernels)

    def launch(self) -> None:
        """Enqueue on the current stream; returns without waiting.

        A graph that the stream is captured into keeps the arrays, too.
        """
        launch_steps(self.steps, self.arrays)


def bind_backward(call: BackwardCall) -> GpuBackward:
    """Build and load the kernels if need be, and bind them to the call's CuPy arrays."""
    import cupy

    problem, forward = call.problem, call.forward
    changes = tuple(check_overrides(forward.config or {}).items())
    place = place_of(call.arrays["q"].device.id)
    prepared = _prepare(problem, place, forward.kernel, changes)
    inputs = arrays_of(call, cupy, boundaries=varlen.on_gpu)
    results = {result.name: call.arrays[result.name] for result in problem.results}
    shapes = prepared.selection.scratch(problem.attention)
    scratch = {name: cupy.empty(shape, np.float32) for name, shape in shapes.items()}
    arrays = {**inputs, **results, **scratch, **gates.allocate_backward(problem, cupy)}
    arrays |= {f"mod_args[{n}]": x for n, x in enumerate(forward.mod_args.values())}
    params = copied(prepared.params)
    params["rng_key"] = forward.rng_key
    bound = GpuBackward(problem, prepared.selection, arrays, prepared.kernels, params=params)
    addresses = {name: array.data.ptr for name, array in arrays.items()}
    launches = bound.launches_at(addresses, tensor_map.encode)
    bound.launches = tuple(launches)
    bound.steps = tuple(step_of(prepared.kernels[launch.number], launch) for launch in launches)
    return bound


def explain_backward(call: BackwardCall) -> str:
    """Tell which kernels a call on CuPy arrays takes, and what is copied."""
    arch = compiler.device_arch(call.arrays["q"].device.id)
    forward = call.forward
    selection = select_backward(call.problem, arch, kernel=forward.kernel, overrides=forward.config)
    copied = [f"copied {name}: {why}" for name, why in call.copied.items()]
    return "\n".join(selection.explained(arch) + copied)


@functools.lru_cache(maxsize=4096)
def _prepare(
    problem: BackwardProblem, place: Place, kernel: str, changes: tuple[tuple[str, int | bool], ...]
) -> _Prepared:
    """Everything about a call but its addresses: the same for the next call of this shape."""
    selection = select_backward(problem, place.arch, kernel=kernel, overrides=dict(changes))
    kernels = tuple(load_kernel(config, place) for config in selection.configs)
    return _Prepared(selection, kernels, backward_params(problem, selection))
