"""From a call to a plan: choose the kernel, build it if need be, bind it to the call's arrays."""

from __future__ import annotations

import functools

from flashcore_cupy.jit import compiler
from flashcore_cupy.launch.plan import GpuPlan, Place, Prepared, make_plan, prepare
from flashcore_cupy.problem import varlen
from flashcore_cupy.problem.array_spec import ArraySpec, spec_of, usable
from flashcore_cupy.problem.attention_problem import AttentionProblem, check_choice, operand
from flashcore_cupy.problem.request import Call
from flashcore_cupy.select.config import check_overrides
from flashcore_cupy.select.registry import KERNELS
from flashcore_cupy.select.selector import select
from flashcore_cupy.settings import kernels_override


def bind(call: Call, *, want_lse: bool, own_workspace: bool) -> GpuPlan:
    """Build and load the kernel if need be, and bind it to the call's CuPy arrays."""
    import cupy

    problem, arrays = call.problem, call.arrays
    q, k, v = (usable(arrays[name], cupy) for name in "qkv")
    out = arrays.get("out")
    if out is None:
        out = cupy.empty(problem.output_shape, q.dtype)
    changes = check_overrides(call.config or {})
    check_choice("kernel", call.kernel, ("auto", *KERNELS))
    place = place_of(q.device.id)
    prepared = _prepare(problem, spec_of(out), place, call.kernel, tuple(changes.items()))
    rules = call.pointers(cupy, boundaries=varlen.on_gpu)
    return make_plan(
        prepared,
        {"q": q, "k": k, "v": v, "o": out, **rules},
        tuple(call.mod_args.values()),
        rng_key=call.rng_key,
        want_lse=want_lse,
        own_workspace=own_workspace,
    )


def explain(call: Call) -> str:
    """Tell which kernel a call on CuPy arrays takes, why, and what is copied."""
    arch = compiler.device_arch(call.arrays["q"].device.id)
    selection = select(call.problem, arch, kernel=call.kernel, overrides=call.config)
    copied = [f"copied {name}: {why}" for name, why in call.copied.items()]
    return "\n".join(selection.explained(arch) + copied)


def place_of(device: int) -> Place:
    """Where a call on a device runs, and what it is built from."""
    return Place(device, compiler.device_arch(device), _multiprocessors(device), kernels_override())


@functools.cache
def _multiprocessors(device: int) -> int:
    import cupy

    return int(cupy.cuda.Device(device).attributes["MultiProcessorCount"])


@functools.lru_cache(maxsize=4096)
def _prepare(
    problem: AttentionProblem,
    out: ArraySpec,
    place: Place,
    kernel: str,
    changes: tuple[tuple[str, int | bool], ...],
) -> Prepared:
    """Everything about a call but its addresses: the same for the next call of this shape."""
    selection = select(problem, place.arch, kernel=kernel, overrides=dict(changes))
    o = operand("o", out, "packed" if problem.packed else problem.layout, out.address)
    return prepare(problem, selection, o, place)
