"""The gradients of attention: describe a call, choose a kernel, build it, launch it."""

# No `from __future__ import annotations`: help() shows the types.
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import numpy as np

from flashcore_cupy.cuda import captures
from flashcore_cupy.launch import backward_cache
from flashcore_cupy.launch.backward import bind_backward
from flashcore_cupy.launch.backward import explain_backward as explain_on_gpu
from flashcore_cupy.problem import interop
from flashcore_cupy.problem.attention_problem import Causal, Layout
from flashcore_cupy.problem.gradients import (
    BACKWARD_ARGUMENTS,
    BackwardCall,
    BackwardGate,
    BackwardRequest,
    gathered,
)
from flashcore_cupy.problem.rules import NO_WINDOW
from flashcore_cupy.problem.stream import entered
from flashcore_cupy.problem.tracing import leave_dynamo, untraced
from flashcore_cupy.problem.values import check_names
from flashcore_cupy.select.backward_plan import BackwardPlan
from flashcore_cupy.select.backward_table import BACKWARD_KERNELS

__all__ = ["attention_backward", "explain_backward", "plan_backward"]

Mod = str | Callable[..., Any]

_NOT_KNOWN = ("config", "gate", "out")
_KNOWN_RULES = (
    *("alibi_slopes", "bias", "mask", "block_mask", "sink", "rng", "score_mod", "score_mod_grad"),
    *("mask_mod", "mod_args", "cu_seqlens_q", "cu_seqlens_k"),
)
_KNOWN_BY = (
    *("layout", "kernel", "causal", "softcap", "softmax_scale", "dropout_p"),
    *("batch_invariant", "deterministic"),
)


@untraced
def attention_backward(
    do: Any,
    q: Any,
    k: Any,
    v: Any,
    o: Any,
    lse: Any,
    *,
    dlse: Any = None,
    wrt: tuple[str, ...] = ("q", "k", "v"),
    deterministic: bool = True,
    accumulate: bool = False,
    layout: Layout = "bhsd",
    softmax_scale: float | None = None,
    causal: Causal = False,
    window: tuple[int, int] = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    bias: Any = None,
    mask: Any = None,
    block_mask: Any = None,
    sink: Any = None,
    dropout_p: float = 0.0,
    rng: Any = None,
    score_mod: Mod | None = None,
    score_mod_grad: Mod | None = None,
    mask_mod: Mod | None = None,
    mod_args: Mapping[str, Any] | None = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    batch_invariant: bool = False,
    kernel: str = "auto",
    config: Mapping[str, object] | None = None,
    gate: BackwardGate | None = None,
    out: Any = None,
    stream: Any = None,
    **unknown: NoReturn,
) -> Any:
    """The gradients of ``attention``, from the gradient of its output.

    FlashAttention-2's backward pass (Dao 2023, arXiv 2307.08691, algorithm 2): scores are computed
    again, and the log-sum-exp makes them probabilities, so nothing of size Sq x Skv is stored. With
    s the scaled score, t the score after its rules, P = exp(t - lse) and
    delta = sum(do * o) - dlse over a row:

        dt = P * (do @ v.T - delta), ds = dt * (dt / ds)
        dq = softmax_scale * ds @ k, dk = softmax_scale * ds.T @ q, dv = P.T @ do
        dbias = dt, dalibi_slopes = -sum(dt * abs(i + off - j))
        dsink = -sum(exp(sink - lse) * delta)
        dmod_args[name] = sum(dt * (dt / dx)), x being an element that score_mod reads

    dbias is summed over the axes along which bias is broadcast. With dropout, Z being
    1 / (1 - dropout_p) where the forward pass has kept a probability and 0 elsewhere, dv is
    (P * Z).T @ do, and do @ v.T is multiplied by Z.

    Parameters
    ----------
    do : array, (B, Hq, Sq, Dv)
        The gradient of the output, in its layout and dtype. Any strides; a last axis that is not
        contiguous costs a copy.
    q, k, v : arrays
        As ``attention`` has taken them.
    o, lse : arrays, (B, Hq, Sq, Dv) and (B, Hq, Sq)
        What ``attention(..., return_lse=True)`` has returned; lse is float32. Of a packed batch
        do and o are (total, Hq, Dv), and lse (Hq, total).
    dlse : array, (B, Hq, Sq), optional
        The gradient of lse, float32.
    wrt : tuple of str
        Which gradients are computed: some of "q", "k", "v", "bias", "sink", "alibi_slopes", and
        "mod_args.table" for the array of that name. Of mod_args those have a gradient that
        score_mod reads at indices made of b, h and integers.
    deterministic : bool
        True: the same call gives the same bits. False lets a kernel add in any order.
    accumulate : bool
        True: the gradients are added to the arrays of ``out``, which are float32, one for each of
        ``wrt``. With the o and lse of all keys, and some of the keys at a time, that makes up the
        gradients of the whole.
    layout, softmax_scale, causal, window, softcap, alibi_slopes, bias, mask, sink
        As ``attention`` had them.
    block_mask : BlockMask, or one of torch's FlexAttention
        As ``attention`` had it, with the rule of its mixed blocks beside it if it has none itself.
        Kernels never load empty blocks, and ask no rule in full ones.
    dropout_p, rng, score_mod, mask_mod, mod_args, cu_seqlens_q, cu_seqlens_k, batch_invariant
        As ``attention`` had them.
    score_mod_grad : str or callable, optional
        The derivative of score_mod by its score, of the same form and arguments. Without it the
        formula is evaluated on dual numbers, which takes NumPy's elementwise functions, ``where``
        and ``clip``. At a kink, as of abs at 0, the derivative is that of one side, or 0.
    kernel, config
        "auto", or a kernel by its name and its overrides, as for ``attention``.
    gate : None, "dp" or "ds"
        Return a stage instead, as the pass of the first of ``wrt`` computes it, 0 where a key is
        hidden: do @ v.T or ds, float32, (B, Hq, Sq, Skv). A debugging aid that stores everything.
    out : Gradients, mapping or tuple of arrays, optional
        Arrays to be written: a mapping as ``{"dq": x, "dmod_args": {"table": y}}``, the
        ``Gradients`` of another call, or an array or None for each of ``wrt``. In their inputs'
        shapes; in the inputs' dtypes, or float32. Last axis contiguous, those of mod_args
        C-contiguous; no element in common with each other or an input.
    stream : optional
        As for ``attention``.
    **unknown
        No other name is taken; the error tells which one is meant.

    Returns
    -------
    Gradients : named tuple (dq, dk, dv, dbias, dsink, dalibi_slopes, dmod_args)
        Arrays of q's kind, None where not asked for; dmod_args is a dict of such. Each has its
        input's shape, layout and dtype; dsink and dalibi_slopes are float32. A query that sees no
        key gives zeros and gets zeros, so does a key that no query sees, whatever they hold. What
        is NaN reaches no more than what depends on it; in kernels, also other rows of its tile.
        With a gate: its array alone.

    Raises
    ------
    TypeError, ValueError
        Before anything is launched; names the argument, what it got and what works.
    flashcore_cupy.jit.CompileError, flashcore_cupy.jit.UnknownArchError, RuntimeError
        As ``attention``.
    """
    arguments = dict(
        layout=layout, softmax_scale=softmax_scale, causal=causal, window=window, softcap=softcap,
        alibi_slopes=alibi_slopes, bias=bias, mask=mask, block_mask=block_mask, sink=sink,
        dropout_p=dropout_p, rng=rng, score_mod=score_mod, mask_mod=mask_mod, mod_args=mod_args,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, batch_invariant=batch_invariant,
        kernel=kernel, config=config, wrt=wrt, deterministic=deterministic, accumulate=accumulate,
        score_mod_grad=score_mod_grad, out=out, gate=gate,
    )  # fmt: skip
    operands = {"do": do, "q": q, "k": k, "v": v, "o": o, "lse": lse, "dlse": dlse}
    known_by = None if unknown or stream is not None else _choices(arguments)
    if known_by and (done := backward_cache.launch_again(operands, *known_by)) is not None:
        return done
    leave_dynamo()
    check_names("attention_backward", unknown, BACKWARD_ARGUMENTS)
    request = BackwardRequest.taken(arguments)
    gpu = interop.gpu_of("q", q)
    if gpu is None:
        return _on_host(request, operands, stream)
    stream = interop.stream_of(q) if stream is None else stream
    with entered(gpu, stream), captures.captured_call():
        return _on_gpu(request, operands, known_by)


@untraced
def plan_backward(
    do: Any, q: Any, k: Any, v: Any, o: Any, lse: Any, *, dlse: Any = None, **arguments: Any
) -> BackwardPlan:
    """``attention_backward`` up to, but without, the launches.

    ``plan_backward(...).launch()`` enqueues the kernels on the current stream of the current
    device, as often as wanted, without allocating: for timing, and for capture into a CUDA graph.
    The arguments are ``attention_backward``'s but ``stream``; the current device is the one that
    holds the arrays. With NumPy arrays and a kernel by name, ``launch()`` emulates it.
    """
    leave_dynamo()
    check_names("plan_backward", arguments, set(BACKWARD_ARGUMENTS) - {"stream"})
    request = BackwardRequest.taken(arguments)
    operands = {"do": do, "q": q, "k": k, "v": v, "o": o, "lse": lse, "dlse": dlse}
    gpu = interop.gpu_of("q", q)
    if gpu is None:
        return _plan_on_host(request, operands)
    import cupy

    if gpu != cupy.cuda.runtime.getDevice():
        raise ValueError(f"q: on GPU {gpu}, which is not the current device")
    with entered(gpu, None), captures.captured_call():
        return bind_backward(_described(request, operands, on_gpu=True, empty=cupy.empty)[0])


@untraced
def explain_backward(
    do: Any,
    q: Any,
    k: Any,
    v: Any,
    o: Any,
    lse: Any,
    *,
    dlse: Any = None,
    stream: Any = None,
    **arguments: Any,
) -> str:
    """Tell which kernels a call takes, why faster ones were passed over, and what is copied.

    Takes all of ``attention_backward``'s arguments, and refuses what it refuses. Builds and
    launches nothing.
    """
    leave_dynamo()
    check_names("explain_backward", arguments, BACKWARD_ARGUMENTS)
    request = BackwardRequest.taken(arguments)
    operands = {"do": do, "q": q, "k": k, "v": v, "o": o, "lse": lse, "dlse": dlse}
    gpu = interop.gpu_of("q", q)
    if gpu is None:
        from flashcore_cupy.cpu import host, host_gradients

        host.check_request(request.attention, stream, BACKWARD_KERNELS)
        return host_gradients.explain(
            _described(request, operands, on_gpu=False, empty=np.empty)[0]
        )
    import cupy

    with entered(gpu, stream):
        return explain_on_gpu(_described(request, operands, on_gpu=True, empty=cupy.empty)[0])


def _choices(arguments: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """What the launch cache may know a call by, choices and rules; None of one that it has not."""
    if arguments["accumulate"] is not False:
        return None
    for name in _NOT_KNOWN:
        if arguments[name] is not None:
            return None
    others = [arguments[name] for name in _KNOWN_BY]
    rules = {name: x for name in _KNOWN_RULES if (x := arguments[name]) is not None}
    choices = (arguments["wrt"], arguments["window"], *others, *[x.__class__ for x in others])
    return choices, rules


def _on_host(request: BackwardRequest, operands: dict[str, Any], stream: Any) -> Any:
    from flashcore_cupy.cpu import host, host_gradients  # not where a GPU does the work

    host.check_request(request.attention, stream, BACKWARD_KERNELS)
    call, kinds = _described(request, operands, on_gpu=False, empty=np.empty)
    stage = host_gradients.differentiate(call)
    return _returned(request, call, kinds, stage)


def _plan_on_host(request: BackwardRequest, operands: dict[str, Any]) -> BackwardPlan:
    from flashcore_cupy.cpu import host, host_gradients

    if request.attention.kernel == "auto":
        raise TypeError(
            "q: a plan is for arrays on a GPU, or for a kernel by name, as kernel='bwd_sm80', that "
            "is emulated on NumPy arrays; attention_backward() takes NumPy arrays without"
        )
    host.check_request(request.attention, None, BACKWARD_KERNELS)
    return host_gradients.bind(_described(request, operands, on_gpu=False, empty=np.empty)[0])


def _on_gpu(
    request: BackwardRequest,
    operands: dict[str, Any],
    known_by: tuple[tuple[Any, ...], dict[str, Any]] | None,
) -> Any:
    """Launch a call; ``known_by`` says what the launch cache is to know it by, if it may."""
    import cupy

    call, kinds = _described(request, operands, on_gpu=True, empty=cupy.empty)
    bound = bind_backward(call)
    bound.launch()
    if known_by is not None:
        backward_cache.remember(bound, operands, *known_by, tuple(call.forward.mod_args))
    return _returned(request, call, kinds, None if request.gate is None else bound.gate_output())


def _described(
    request: BackwardRequest, operands: dict[str, Any], *, on_gpu: bool, empty: Any
) -> tuple[BackwardCall, dict[str, interop.Kind]]:
    """Describe a call; with it the kinds of arrays that its results become."""
    q, k, v, kind = interop.taken_together(*(operands[name] for name in "qkv"))
    given = {n: interop.taken_out(x, f"out.{n}") for n, x in request.out.items()}
    out = {name: array for name, (array, _) in given.items()}
    call = request.call(operands | {"q": q, "k": k, "v": v}, out, on_gpu=on_gpu, empty=empty)
    kinds = {result.name: kind for result in call.problem.results}
    return call, kinds | {name: kind for name, (_, kind) in given.items()}


def _returned(
    request: BackwardRequest, call: BackwardCall, kinds: dict[str, interop.Kind], stage: Any
) -> Any:
    """The results as the caller's kinds of arrays, or what the gate has stopped at."""
    if stage is not None:
        return interop.returned(stage, kinds[call.problem.results[0].name])
    return gathered(
        {
            name: interop.returned(call.arrays[name], kind, request.out.get(name))
            for name, kind in kinds.items()
        }
    )
