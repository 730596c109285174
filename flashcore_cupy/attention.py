"""The public functions: describe a call, choose a kernel, build it, launch it."""

# No `from __future__ import annotations`: help() shows the types.
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from flashcore_cupy.backward import attention_backward
from flashcore_cupy.cuda import captures
from flashcore_cupy.integrations import dynamo, engine
from flashcore_cupy.launch import launch_cache, ruled_cache, tensors
from flashcore_cupy.launch.bind import bind
from flashcore_cupy.launch.bind import explain as explain_on_gpu
from flashcore_cupy.problem import interop
from flashcore_cupy.problem.attention_problem import Causal, Gate, Layout
from flashcore_cupy.problem.request import ARGUMENTS, Call, Request, check_results
from flashcore_cupy.problem.rules import NO_WINDOW
from flashcore_cupy.problem.stream import entered
from flashcore_cupy.problem.tracing import Traced, leave_dynamo, untraced
from flashcore_cupy.problem.values import check_names
from flashcore_cupy.select.plan import Plan

__all__ = ["attention", "explain", "plan"]

Mod = str | Callable[..., Any]

#: Arguments that a call is known by in ``ruled_cache``; without them it is in ``launch_cache``.
_KNOWN_RULES = (
    *("alibi_slopes", "bias", "mask", "block_mask", "sink", "rng", "score_mod", "mask_mod"),
    *("mod_args", "cu_seqlens_q", "cu_seqlens_k"),
)


@untraced
def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
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
    mask_mod: Mod | None = None,
    mod_args: Mapping[str, Any] | None = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    return_lse: bool = False,
    batch_invariant: bool = False,
    kernel: str = "auto",
    config: Mapping[str, object] | None = None,
    gate: Gate | None = None,
    out: Any = None,
    stream: Any = None,
    **unknown: NoReturn,
) -> Any:
    """Scaled-dot-product attention, ``softmax(rules(softmax_scale * q @ k.T)) @ v``.

    By default one fused kernel, FlashAttention's algorithm (Dao et al. 2022, arXiv 2205.14135,
    algorithm 1): nothing of size Sq x Skv is stored. CuPy arrays run on their GPU, NumPy arrays on
    the CPU; so does anything that exports its memory by DLPack or ``__cuda_array_interface__``,
    and the result is of q's kind (CuPy, NumPy, torch, JAX, Numba).

    Tensors of torch that require a gradient get one, and so do arrays of JAX: q, k, v, bias, sink
    and alibi_slopes. torch.compile and jax.jit keep a call in their graphs, torch.func and jax.vmap
    map it. There are no second derivatives and no forward-mode ones.

    A score goes through scale, softcap, ALiBi, bias, score_mod, in this order; then causal, window,
    mask and mask_mod hide keys; dropout comes after the softmax. off is Skv - Sq, or 0 with
    causal="top-left".

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
        Multiplies the scores; 1/sqrt(D) by default. This and softcap may be 0-d arrays; one on a
        GPU is waited for.
    causal : bool or "top-left"
        True: query i sees key j <= i + Skv - Sq (bottom-right aligned). "top-left": j <= i.
    window : (left, right)
        Query i sees i + off - left <= j <= i + off + right; -1 is no bound (Beltagy et al. 2020).
    softcap : float
        s becomes softcap * tanh(s / softcap); 0 or infinity is none (Gemma 2).
    alibi_slopes : array or list, (Hq,) or (B, Hq)
        s becomes s - slope * abs(i + off - j) (Press et al. 2022). Real numbers, taken as float32.
    bias : array, broadcastable to (B, Hq, Sq, Skv)
        Added to the scores; q's dtype or float32. The broadcast is not made.
    mask : array of bool, broadcastable to (B, Hq, Sq, Skv)
        True where a query attends.
    block_mask : BlockMask, or one of torch's FlexAttention
        Which blocks of scores are computed. Empty ones are never loaded; mask and mask_mod, or the
        rule that the block mask has itself, are asked in its mixed blocks alone. Not with
        cu_seqlens.
    sink : array or list, (Hq,)
        A logit per query head that joins the softmax's denominator, and so the LSE, without a value
        (gpt-oss). Real numbers, taken as float32.
    dropout_p : float
        Each probability is 0 with this chance, from 0 up to, but not, 1, and else divided by
        1 - dropout_p (Srivastava et al. 2014). Rounded to a multiple of 2**-16.
    rng : (seed, offset), or array, (2,), uint64 or int64
        Which ones dropout takes; asked for where dropout_p is not 0. Two integers from 0 to
        2**64 - 1; another offset is another draw. An array on the GPU is read by the kernel, so a
        captured graph draws with what it holds by then; it may be (4,), uint32 or int32, too, the
        low words first. ``dropout_mask`` shows the draw.
    score_mod, mask_mod : str, or on NumPy arrays without a kernel's name a callable
        CUDA expressions of ``b, h, q_idx, kv_idx`` and, for score_mod, ``score``, evaluated per
        element inside the kernel: ``score_mod="score + 0.1f * (kv_idx - q_idx)"``,
        ``mask_mod="kv_idx % 2 == 0"``. On NumPy arrays ``score_mod(score, b, h, q_idx, kv_idx,
        **mod_args)`` takes and returns blocks (M, N) of scores, q_idx (M, 1) and kv_idx (1, N);
        mask_mod, without score, returns booleans. Blocks are of any size, in several threads. A
        kernel that has much to do gets lists of blocks, for which mask_mod is asked ahead.
    mod_args : mapping of names to arrays
        What the mods use besides, C-contiguous; in an expression ``name[i]`` is element i.
    cu_seqlens_q, cu_seqlens_k : array, (B + 1,), int32
        Packed variable-length batches: sequence n is rows cu_seqlens[n] to cu_seqlens[n + 1] of q
        (total, Hq, D), and of k and v. On the host they are checked; on a GPU, where that would
        mean waiting, kernels clamp them. bias and mask have no meaning then.
    return_lse : bool
        Also return the log-sum-exp of the scores, natural log, float32, (B, Hq, Sq); (Hq, total)
        of a packed batch.
    batch_invariant : bool
        Choose tiles without regard to the batch: a sequence gives the same bits alone, in a batch
        and in a packed batch.
    kernel : str
        "auto" for the fastest that can do the problem, or a name from the ladder:
        ``flashcore_cupy.KERNELS``. A kernel that cannot do the problem raises and says why. On
        NumPy arrays "auto" is NumPy, and a named kernel is emulated: its own code, compiled for the
        CPU by a C++ compiler, as for FLASHCORE_ARCH, or sm_90a. That is for tests, and slow.
    config : mapping, optional
        Overrides fields of the kernel's row in the table, such as ``{"block_n": 32}``. On NumPy
        arrays only with a kernel's name.
    gate : None, "qk", "softmax" or "pv"
        Stop after a stage and return it: the scores after all rules (-inf where masked) or the
        probabilities, float32, (B, Hq, Sq, Skv); or, for "pv", the output with all scores taken
        as 0, which is the mean of the v rows that the query sees. Probabilities are those before
        dropout.
    out : array, optional
        Written in place and returned; the output's shape and dtype, last axis contiguous, no
        element in common with an input. Not with the gates "qk" and "softmax".
    stream : optional
        A CuPy stream, or anything with ``__cuda_stream__``, of q's GPU. By default CuPy's current
        stream; for torch tensors, where that is the default stream, torch's current one.
    **unknown
        No other name is taken; the error tells which one is meant.

    Returns
    -------
    o, or (o, lse) : arrays of the inputs' kind
        o has q's dtype, (B, Hq, Sq, Dv) in ``layout``, or (total, Hq, Dv). A query that sees no key
        gives o = 0, lse = -inf (with a sink: lse = sink). The same call gives the same bits.

    Raises
    ------
    TypeError, ValueError
        Before anything is launched; names the argument, what it got and what works.
    flashcore_cupy.jit.CompileError
        The kernel does not compile: the place (in a user's expression: its line) and the compiler's
        words.
    flashcore_cupy.jit.UnknownArchError
        The installed NVRTC is too old for this GPU.
    RuntimeError
        A kernel is to be emulated, and there is no C++ compiler; or the emulated kernel does
        something wrong.
    """
    choices = None
    if (
        config is None and gate is None and stream is None and not unknown
        and return_lse.__class__ is bool
    ):  # fmt: skip
        choices = (
            window, layout, kernel, causal, causal.__class__, softcap, softcap.__class__,
            dropout_p, dropout_p.__class__, softmax_scale, softmax_scale.__class__,
            batch_invariant, batch_invariant.__class__,
        )  # fmt: skip
        if (
            alibi_slopes is None and bias is None and mask is None and block_mask is None
            and sink is None and rng is None and score_mod is None and mask_mod is None
            and mod_args is None and cu_seqlens_q is None and cu_seqlens_k is None
            and (done := launch_cache.launch_again(q, k, v, out, return_lse, choices)) is not None
        ):  # fmt: skip
            return done
    leave_dynamo()
    check_names("attention", unknown, ARGUMENTS)
    arguments = dict(
        layout=layout, softmax_scale=softmax_scale, causal=causal, window=window, softcap=softcap,
        alibi_slopes=alibi_slopes, bias=bias, mask=mask, block_mask=block_mask, sink=sink,
        dropout_p=dropout_p, rng=rng, score_mod=score_mod, mask_mod=mask_mod, mod_args=mod_args,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, batch_invariant=batch_invariant,
        kernel=kernel, config=config, gate=gate,
    )  # fmt: skip
    return _attend(arguments, q, k, v, out, stream, check_results(gate, return_lse, out), choices)


@untraced
def plan(
    q: Any,
    k: Any,
    v: Any,
    *,
    return_lse: bool = False,
    out: Any = None,
    **arguments: Any,
) -> Plan:
    """``attention`` up to, but without, the launch.

    ``plan(...).launch()`` enqueues the kernel on the current stream of the current device, as often
    as wanted, without allocating: for timing, and for capture into a CUDA graph. The arguments are
    ``attention``'s but ``stream``; the current device is the one that holds the arrays. With NumPy
    arrays and a kernel by name, ``launch()`` emulates it.
    """
    leave_dynamo()
    check_names("plan", arguments, set(ARGUMENTS) - {"stream"})
    request = Request.of(arguments)
    return_lse = check_results(request.gate, return_lse, out)
    gpu = interop.gpu_of("q", q)
    if gpu is None:
        return _plan_on_host(request, q, k, v, out, return_lse)
    import cupy

    if gpu != cupy.cuda.runtime.getDevice():
        raise ValueError(f"q: on GPU {gpu}, which is not the current device")
    with entered(gpu, None), captures.captured_call():
        q, k, v, _ = interop.taken_together(q, k, v)
        return bind(
            request.call(q, k, v, out, on_gpu=True), want_lse=return_lse, own_workspace=True
        )


@untraced
def explain(
    q: Any,
    k: Any,
    v: Any,
    *,
    return_lse: bool = False,
    out: Any = None,
    stream: Any = None,
    **arguments: Any,
) -> str:
    """Tell which kernel a call takes, why faster ones were passed over, and what is copied.

    Takes all of ``attention``'s arguments, and refuses what it refuses. Builds, launches and writes
    nothing.
    """
    leave_dynamo()
    check_names("explain", arguments, ARGUMENTS)
    request = Request.of(arguments)
    check_results(request.gate, return_lse, out)
    gpu = interop.gpu_of("q", q)
    if gpu is None:
        from flashcore_cupy.cpu import host

        return host.explain(_call_on_host(request, q, k, v, out, stream)[0])
    with entered(gpu, stream):
        q, k, v, _ = interop.taken_together(q, k, v)
        target = None if out is None else interop.taken_out(out)[0]
        return explain_on_gpu(request.call(q, k, v, target, on_gpu=True))


def _attend(
    arguments: dict[str, Any],
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    stream: Any,
    return_lse: bool,
    known_by: tuple[Any, ...] | None,
) -> Any:
    """Have a call computed: as it is known, or where q lies, or by who traces or differentiates."""
    rules = {name: x for name in _KNOWN_RULES if (x := arguments[name]) is not None}
    if rules and known_by is not None:
        done = ruled_cache.launch_again(q, k, v, out, return_lse, known_by, rules)
        if done is not None:
            return done
    try:
        if known_by is not None and tensors.differentiates(q, k, v):  # as would be found out below
            raise Traced("q", "torch", "requires a gradient")
        request = Request.of(arguments)
        gpu = interop.gpu_of("q", q)
        given = interop.in_autocast(q, k, v)
        if gpu is None:
            return _on_host(request, *given, out, stream, return_lse)
        return _on_gpu(gpu, request, *given, out, stream, return_lse, known_by, rules)
    except Traced as traced:
        by = traced.by
    return _integrated(by, q, k, v, arguments | dict(return_lse=return_lse, out=out, stream=stream))


def _integrated(by: str, q: Any, k: Any, v: Any, arguments: dict[str, Any]) -> Any:
    """Have a call done by what knows of the gradients and traces of a library."""
    defaults = attention.__kwdefaults__ or {}
    given = {name: x for name, x in arguments.items() if x is not defaults[name]}
    if by == "jax":
        from flashcore_cupy.integrations import jax_attention

        return jax_attention.attend(q, k, v, given)
    from flashcore_cupy.integrations import torch_again, torch_attention

    torch_again.connect()
    return torch_attention.eager_attend()(q, k, v, given)


def _on_host(
    request: Request, q: Any, k: Any, v: Any, out: Any, stream: Any, return_lse: bool
) -> Any:
    from flashcore_cupy.cpu.host import attend  # not imported where there is a GPU to do the work

    call, kind, out_kind = _call_on_host(request, q, k, v, out, stream)
    o, lse = attend(call)
    o = interop.returned(o, out_kind, out)
    return (o, interop.returned(lse, kind)) if return_lse else o


def _plan_on_host(request: Request, q: Any, k: Any, v: Any, out: Any, return_lse: bool) -> Plan:
    from flashcore_cupy.cpu import host

    if request.kernel == "auto":
        raise TypeError(
            "q: a plan is for arrays on a GPU, or for a kernel by name, as kernel='mma_sm80', that "
            "is emulated on NumPy arrays; attention() takes NumPy arrays without"
        )
    return host.bind(_call_on_host(request, q, k, v, out, None)[0], want_lse=return_lse)


def _call_on_host(
    request: Request, q: Any, k: Any, v: Any, out: Any, stream: Any
) -> tuple[Call, interop.Kind, interop.Kind]:
    """Describe a call; with it the kinds of arrays that its results become, o's last."""
    from flashcore_cupy.cpu.host import check_request

    q, k, v, kind = interop.taken_together(q, k, v)
    target, out_kind = (None, kind) if out is None else interop.taken_out(out)
    check_request(request, stream)
    return request.call(q, k, v, target, on_gpu=False), kind, out_kind


def _on_gpu(
    gpu: int,
    request: Request,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    stream: Any,
    return_lse: bool,
    known_by: tuple[Any, ...] | None,
    rules: dict[str, Any],
) -> Any:
    """Launch a call.

    ``known_by``, with the rules that are given: what a launch cache is to know it by, if it may.
    """
    stream = interop.stream_of(q) if stream is None else stream
    with entered(gpu, stream), captures.captured_call():
        given = (q, k, v)
        q, k, v, kind = interop.taken_together(q, k, v)
        target, out_kind = (None, kind) if out is None else interop.taken_out(out)
        call = request.call(q, k, v, target, on_gpu=True)
        bound = bind(call, want_lse=return_lse, own_workspace=False)
        bound.launch()
        if request.gate in ("qk", "softmax"):
            return interop.returned(bound.gate_output(), kind)
        out_given = out is not None
        if known_by is not None and not rules:
            launch_cache.remember(bound, known_by, out_given=out_given, given=given)
        elif known_by is not None:
            names = tuple(call.mod_args)
            ruled_cache.remember(bound, given, rules, known_by, mod_args=names, out_given=out_given)
        o = interop.returned(bound.arrays["o"], out_kind, out)
        return (o, interop.returned(bound.arrays["lse"], kind)) if return_lse else o


engine.connect(attention, attention_backward)
dynamo.let_compile(attention)
