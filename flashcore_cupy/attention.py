"""The public function: describe -> select -> build -> launch."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from flashcore_cupy import jit, launch
from flashcore_cupy.arrays import (
    ArraySpec,
    check_elements,
    check_out,
    spec_of,
    spec_of_copy,
    usable,
    why_copied,
)
from flashcore_cupy.config import check_overrides
from flashcore_cupy.problem import (
    GATES,
    AttentionProblem,
    Causal,
    Gate,
    Layout,
    check_choice,
    describe,
    operand,
)
from flashcore_cupy.settings import kernels_override
from flashcore_cupy.tiles import KERNELS, select

if TYPE_CHECKING:
    import cupy

__all__ = ["attention", "explain", "plan"]


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    layout: Layout = "bhsd",
    softmax_scale: float | None = None,
    causal: Causal = False,
    return_lse: bool = False,
    kernel: str = "auto",
    config: Mapping[str, object] | None = None,
    gate: Gate | None = None,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """Scaled-dot-product attention, ``softmax(softmax_scale * q @ k.T) @ v``.

    By default one fused kernel, FlashAttention's algorithm (Dao et al. 2022, arXiv 2205.14135,
    algorithm 1): nothing of size Sq x Skv is stored. CuPy arrays run on their GPU, NumPy arrays on
    the CPU.

    Parameters
    ----------
    q : array, (B, Hq, Sq, D)
        float16, bfloat16 (``ml_dtypes.bfloat16``) or float32. Any strides; a last axis that is not
        contiguous costs a copy of that operand.
    k, v : array, (B, Hkv, Skv, D) and (B, Hkv, Skv, Dv)
        q's dtype; Hq is a multiple of Hkv (query head h uses key head h // (Hq // Hkv)).
    layout : "bhsd" or "bshd"
        The order of the axes of q, k, v and the output: (B, H, S, D) or (B, S, H, D).
    softmax_scale : float, optional
        Multiplies the scores; 1/sqrt(D) by default.
    causal : bool or "top-left"
        True: query i sees key j <= i + Skv - Sq (bottom-right aligned). "top-left": j <= i.
    return_lse : bool
        Also return the log-sum-exp of the scores, natural log, float32, (B, Hq, Sq).
    kernel : str
        "auto" for the fastest that can do the problem, or a name from the ladder:
        ``flashcore_cupy.KERNELS``. A kernel that cannot do the problem raises and says why.
    config : mapping, optional
        Overrides fields of the kernel's row in the table, such as ``{"block_n": 32}``.
    gate : None, "qk", "softmax" or "pv"
        Stop after a stage and return it: the scaled scores (-inf where masked) or the
        probabilities, float32, (B, Hq, Sq, Skv); or, for "pv", the output with all scores taken
        as 0, which is the mean of the v rows that the query sees.
    out : array, optional
        Written in place and returned; the output's shape and dtype, last axis contiguous, no
        element in common with q, k or v. Not with the gates "qk" and "softmax".
    stream : optional
        A CuPy stream, or anything with ``__cuda_stream__``; CuPy's current stream by default.

    Returns:
    -------
    o, or (o, lse) : arrays of the inputs' kind
        o has q's dtype, (B, Hq, Sq, Dv) in ``layout``. A query that sees no key gives o = 0,
        lse = -inf. The same call gives the same bits every time.

    Raises:
    ------
    TypeError, ValueError
        Before anything is launched; names the argument, what it got and what works.
    flashcore_cupy.jit.CompileError
        The kernel does not compile: the place and the compiler's words.
    flashcore_cupy.jit.UnknownArchError
        The installed NVRTC is too old for this GPU.
    """
    check_choice("gate", gate, GATES)
    if gate in ("qk", "softmax") and (return_lse or out is not None):
        name = "return_lse" if return_lse else "out"
        raise ValueError(f"{name}: gate {gate!r} stops before the output; leave one of them out")
    if _on_cpu(q, k, v):
        _refuse_gpu_arguments(kernel, config, stream)
        return _attention_numpy(q, k, v, layout, softmax_scale, causal, return_lse, gate, out)
    with _entered(q, stream):
        bound = plan(
            q,
            k,
            v,
            layout=layout,
            softmax_scale=softmax_scale,
            causal=causal,
            return_lse=return_lse,
            kernel=kernel,
            config=config,
            gate=gate,
            out=out,
        )
        bound.launch()
        if gate in ("qk", "softmax"):
            return bound.gate_output()
    o = bound.arrays["o"]
    return (o, bound.arrays["lse"]) if return_lse else o


def plan(
    q: cupy.ndarray,
    k: cupy.ndarray,
    v: cupy.ndarray,
    *,
    layout: Layout = "bhsd",
    softmax_scale: float | None = None,
    causal: Causal = False,
    return_lse: bool = False,
    kernel: str = "auto",
    config: Mapping[str, object] | None = None,
    gate: Gate | None = None,
    out: cupy.ndarray | None = None,
) -> launch.Plan:
    """``attention`` up to, but without, the launch, for CuPy arrays.

    ``plan(...).launch()`` enqueues the kernel on the current stream of the current device, as often
    as wanted, without allocating: for timing, and for capture into a CUDA graph. The arguments are
    ``attention``'s; the current device is the one that holds them.
    """
    import cupy

    if q.device != cupy.cuda.Device():
        raise ValueError(f"q: on GPU {q.device.id}, which is not the current device")
    problem = _describe(q, k, v, softmax_scale, causal, gate, layout)
    q, k, v = (usable(x, cupy) for x in (q, k, v))
    if out is None:
        out = cupy.empty(problem.output_shape, q.dtype)
    else:
        check_out(problem, out, (q, k, v), cupy)
    device = q.device.id
    place = launch.Place(device, jit.device_arch(device), kernels_override())
    changes = check_overrides(config or {})
    check_choice("kernel", kernel, ("auto", *KERNELS))
    prepared = _prepare(problem, spec_of(out), place, kernel, tuple(changes.items()))
    return launch.make_plan(prepared, q, k, v, out, want_lse=return_lse)


@functools.lru_cache(maxsize=4096)
def _prepare(
    problem: AttentionProblem,
    out: ArraySpec,
    place: launch.Place,
    kernel: str,
    changes: tuple[tuple[str, int | bool], ...],
) -> launch.Prepared:
    """Everything about a call but its addresses: the same for the next call of this shape."""
    selection = select(problem, place.arch, kernel=kernel, overrides=dict(changes))
    o = operand("o", out, problem.layout, out.address)
    return launch.prepare(problem, selection, o, place)


def explain(
    q: Any,
    k: Any,
    v: Any,
    *,
    layout: Layout = "bhsd",
    softmax_scale: float | None = None,
    causal: Causal = False,
    kernel: str = "auto",
    config: Mapping[str, object] | None = None,
    gate: Gate | None = None,
) -> str:
    """Tell which kernel a call takes, why faster ones were passed over, and what is copied.

    Builds and launches nothing. Takes ``attention``'s arguments, as far as they decide that.
    """
    on_cpu = _on_cpu(q, k, v)
    problem = _describe(q, k, v, softmax_scale, causal, gate, layout)
    if on_cpu:
        _refuse_gpu_arguments(kernel, config, None)
        return "NumPy arrays: tiled online-softmax attention on the CPU, fp32 accumulation"
    arch = jit.device_arch(q.device.id)
    selection = select(problem, arch, kernel=kernel, overrides=config)
    lines = [f"{selection.kernel.name} on {arch}: {selection.config.describe()}"]
    lines += [f"passed over {name}: {reason}" for name, reason in selection.passed_over]
    lines += [
        f"copied {name}: {why_copied(x)}"
        for name, x in (("q", q), ("k", k), ("v", v))
        if why_copied(x)
    ]
    return "\n".join(lines)


def _attention_numpy(
    q: Any,
    k: Any,
    v: Any,
    layout: Layout,
    softmax_scale: float | None,
    causal: Causal,
    return_lse: bool,
    gate: Gate | None,
    out: Any,
) -> Any:
    from flashcore_cupy import reference  # not imported where there is a GPU to do the work

    problem = _describe(q, k, v, softmax_scale, causal, gate, layout)
    q, k, v = (usable(x, np) for x in (q, k, v))
    if out is None:
        out = np.empty(problem.output_shape, q.dtype)
    else:
        check_out(problem, out, (q, k, v), np)
    views = [x if layout == "bhsd" else x.transpose(0, 2, 1, 3) for x in (q, k, v, out)]
    rules: dict[str, Any] = {"softmax_scale": problem.softmax_scale, "causal": causal}
    if gate == "qk":
        return reference.gate_scores(*views[:3], **rules).astype(np.float32)
    if gate == "softmax":
        return reference.gate_probabilities(*views[:3], **rules).astype(np.float32)
    if gate == "pv":  # all scores 0, whatever q and k hold
        views[0], views[1] = np.zeros_like(views[0]), np.zeros_like(views[1])
    _, lse = reference.tiled(*views[:3], **rules, out=views[3])
    return (out, lse) if return_lse else out


def _on_cpu(q: Any, k: Any, v: Any) -> bool:
    """Whether all are NumPy arrays; TypeError if they are neither all NumPy nor all CuPy arrays."""
    named = {"q": q, "k": k, "v": v}
    on_cpu = {name: isinstance(x, np.ndarray) for name, x in named.items()}
    if all(on_cpu.values()):
        return True
    for name, x in named.items():
        if not on_cpu[name] and type(x).__module__.partition(".")[0] != "cupy":
            raise TypeError(
                f"{name}: got {type(x).__name__}; use a CuPy array (GPU) or a NumPy array (CPU), "
                f"for example cupy.asarray({name})"
            )
    if any(on_cpu.values()):
        host = ", ".join(name for name in named if on_cpu[name])
        raise TypeError(
            f"{host}: on the CPU (NumPy) while the others are on a GPU (CuPy); "
            f"use cupy.asarray on it, or cupy.asnumpy on the others"
        )
    devices = {name: x.device.id for name, x in named.items()}
    for name, device in devices.items():
        if device != devices["q"]:
            raise ValueError(
                f"{name}: on GPU {device}, but q is on GPU {devices['q']}; q, k, v share one"
            )
    return False


def _refuse_gpu_arguments(kernel: str, config: Mapping[str, object] | None, stream: Any) -> None:
    check_choice("kernel", kernel, ("auto", *KERNELS))
    given = {"kernel": kernel != "auto", "config": config is not None, "stream": stream is not None}
    for name, present in given.items():
        if present:
            raise ValueError(
                f"{name}: chooses how a GPU runs, but q, k, v are NumPy arrays; "
                f"leave it out, or pass CuPy arrays"
            )


def _describe(
    q: Any,
    k: Any,
    v: Any,
    softmax_scale: float | None,
    causal: Causal,
    gate: Gate | None,
    layout: Layout,
) -> AttentionProblem:
    """The problem of arrays, a last axis that is not contiguous being copied; cached."""
    arrays = (q, k, v)
    for name, x in zip("qkv", arrays, strict=True):
        check_elements(name, x)
    specs = [spec_of_copy(x) if why_copied(x) else spec_of(x) for x in arrays]
    rules = (softmax_scale, causal, gate, layout)
    try:
        hash(rules)
    except TypeError:  # not hashable, hence not legal either: describe says which and why
        return _described.__wrapped__(*specs, *rules)
    return _described(*specs, *rules)


@functools.lru_cache(maxsize=4096, typed=True)  # True and 1 are not the same argument
def _described(
    q: ArraySpec,
    k: ArraySpec,
    v: ArraySpec,
    softmax_scale: float | None,
    causal: Causal,
    gate: Gate | None,
    layout: Layout,
) -> AttentionProblem:
    return describe(
        *(q, k, v),
        softmax_scale=softmax_scale,
        causal=causal,
        gate=gate,
        layout=layout,
        addresses=(q.address, k.address, v.address),
    )


def _stream_of(owner: Any, cupy: Any) -> Any:
    from_external = getattr(cupy.cuda.Stream, "from_external", None)
    if from_external is None:  # CuPy before 14.1
        return cupy.cuda.ExternalStream(owner.__cuda_stream__()[1])
    return from_external(owner)


@contextlib.contextmanager
def _entered(q: Any, stream: Any) -> Iterator[None]:
    """Q's device and the caller's stream, current."""
    import cupy

    with q.device:
        if stream is None:
            yield
            return
        if not isinstance(stream, cupy.cuda.Stream | cupy.cuda.ExternalStream):
            if not hasattr(stream, "__cuda_stream__"):
                raise TypeError(
                    f"stream: got {type(stream).__name__}; use a CuPy stream or an object with "
                    f"__cuda_stream__"
                )
            stream = _stream_of(stream, cupy)
        with stream:
            yield
