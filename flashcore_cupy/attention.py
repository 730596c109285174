"""The public function: describe -> select -> build -> launch."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from flashcore_cupy import jit, launch, reference
from flashcore_cupy.problem import (
    MAX_ALIGN,
    AttentionProblem,
    Causal,
    Gate,
    Layout,
    check_choice,
    describe,
    operand,
)
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
    """Scaled-dot-product attention, ``softmax(softmax_scale * q @ k.T) @ v``, in one fused kernel.

    FlashAttention's algorithm (Dao et al. 2022, arXiv 2205.14135, algorithm 1): nothing of size
    Sq x Skv is stored. CuPy arrays run on their GPU, NumPy arrays on the CPU.

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
        Written in place and returned; the output's shape and dtype, last axis contiguous.
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
    """
    if return_lse and gate in ("qk", "softmax"):
        raise ValueError(f"return_lse: gate {gate!r} stops before the log-sum-exp; leave one out")
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
    """``attention`` up to, but without, the launch, for CuPy arrays on the current device.

    ``plan(...).launch()`` enqueues the kernel on the current stream, as often as wanted, without
    allocating: for timing, and for capture into a CUDA graph. The arguments are ``attention``'s.
    """
    import cupy

    q, k, v = (_usable(x, cupy) for x in (q, k, v))
    problem = _describe(q, k, v, softmax_scale, causal, gate, layout)
    if out is None:
        out = cupy.empty(problem.output_shape, q.dtype)
    else:
        _check_out(problem, out, (q, k, v), cupy)
    prepared = _prepare(
        problem, _spec(out), jit.device_arch(q.device.id), kernel, tuple((config or {}).items())
    )
    return launch.make_plan(prepared, q, k, v, out, want_lse=return_lse)


@functools.lru_cache(maxsize=4096)
def _prepare(
    problem: AttentionProblem,
    out: _Spec,
    arch: str,
    kernel: str,
    config: tuple[tuple[str, object], ...],
) -> launch.Prepared:
    """Everything about a call but its addresses: the same for the next call of this shape."""
    selection = select(problem, arch, kernel=kernel, overrides=dict(config))
    o = operand("o", out, problem.layout, out.address)
    return launch.prepare(problem, selection, arch, o)


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

    Builds and launches nothing; the arguments are ``attention``'s.
    """
    on_cpu = _on_cpu(q, k, v)
    problem = _describe(q, k, v, softmax_scale, causal, gate, layout)
    if on_cpu:
        return "NumPy arrays: tiled online-softmax attention on the CPU, fp32 accumulation"
    arch = jit.device_arch(q.device.id)
    selection = select(problem, arch, kernel=kernel, overrides=config)
    lines = [f"{selection.kernel.name} on {arch}: {selection.config.describe()}"]
    lines += [f"passed over {name}: {reason}" for name, reason in selection.passed_over]
    lines += [
        f"copied {name}: its last axis is not contiguous (strides {x.strides} bytes)"
        for name, x in (("q", q), ("k", k), ("v", v))
        if not _usable_as_is(x)
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
    q, k, v = (_usable(x, np) for x in (q, k, v))
    problem = _describe(q, k, v, softmax_scale, causal, gate, layout)
    if out is None:
        out = np.empty(problem.output_shape, q.dtype)
    else:
        _check_out(problem, out, (q, k, v), np)
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


class _Spec(NamedTuple):
    """What ``describe`` looks at: an array without its data. Keys the cache of problems."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: Any
    address: int
    """Modulo the widest load: all that matters of it is the alignment."""

    @property
    def ndim(self) -> int:
        return len(self.shape)


def _spec(x: Any) -> _Spec:
    return _Spec(x.shape, x.strides, x.dtype, _address(x) % MAX_ALIGN)


def _address(x: Any) -> int:
    return int(x.ctypes.data if isinstance(x, np.ndarray) else x.data.ptr)


def _spec_of_copy(x: Any) -> _Spec:
    """A C-contiguous copy of ``x`` that has not been made."""
    strides = [x.dtype.itemsize]
    for n in reversed(x.shape[1:]):
        strides.insert(0, strides[0] * n)
    return _Spec(x.shape, tuple(strides), x.dtype, 0)


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
    specs = [_spec(x) if _usable_as_is(x) else _spec_of_copy(x) for x in arrays]
    try:
        return _described(*specs, softmax_scale, causal, gate, layout)
    except TypeError:  # an argument that cannot be hashed, for one: say what is wrong with it
        return _described.__wrapped__(*specs, softmax_scale, causal, gate, layout)


@functools.lru_cache(maxsize=4096, typed=True)  # True and 1 are not the same argument
def _described(
    q: _Spec,
    k: _Spec,
    v: _Spec,
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


def _usable_as_is(x: Any) -> bool:
    """Whether kernels can address ``x``: last axis contiguous, strides and start whole elements."""
    size = x.dtype.itemsize
    if x.ndim and x.shape[-1] > 1 and x.strides[-1] != size:
        return False
    return not any(s % size for s in x.strides) and _address(x) % size == 0


def _usable(x: Any, xp: Any) -> Any:
    return x if _usable_as_is(x) else xp.ascontiguousarray(x)


def _check_out(problem: AttentionProblem, out: Any, inputs: tuple[Any, ...], xp: Any) -> None:
    q, k, v = inputs
    if not isinstance(out, xp.ndarray):
        raise TypeError(f"out: got {type(out).__name__}; use a {xp.__name__} array like q")
    if out.shape != problem.output_shape:
        raise ValueError(f"out: got shape {out.shape}; this problem's is {problem.output_shape}")
    if out.dtype != q.dtype:
        raise TypeError(f"out: got dtype {out.dtype.name}; q's is {q.dtype.name}")
    if xp is not np and out.device != q.device:
        raise ValueError(f"out: on GPU {out.device.id}, but q is on GPU {q.device.id}")
    if not _usable_as_is(out):
        raise ValueError("out: its last axis is not contiguous; use a contiguous array")
    if any(n > 1 and s == 0 for n, s in zip(out.shape, out.strides, strict=True)):
        raise ValueError("out: is a broadcast view, whose elements share memory; use a real array")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if xp.may_share_memory(out, x):
            raise ValueError(f"out: overlaps {name} in memory; use another array")


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
