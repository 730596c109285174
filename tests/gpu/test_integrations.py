"""Gradients of torch's tensors and JAX's arrays on a GPU: those of CuPy's, bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from flashcore_cupy import attention, attention_backward
from flashcore_cupy.problem import interop

DTYPES = ("float16", "bfloat16", "float32")
RULES = {"causal": True, "window": (40, -1), "softcap": 3.0}


def arrays(dtype: str = "float16", batch: int = 2) -> dict[str, Any]:
    """q, k, v, and the gradient of the output; grouped heads, (B, S, H, D)."""
    import cupy
    import ml_dtypes

    element = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    rng = np.random.default_rng(0)
    shapes = {"q": (batch, 65, 4, 64), "k": (batch, 130, 2, 64), "v": (batch, 130, 2, 64)}
    shapes["do"] = shapes["q"]
    return {
        n: cupy.asarray(rng.standard_normal(s, np.float32).astype(element))
        for n, s in shapes.items()
    }


def wanted(given: dict[str, Any], **rules: Any) -> list[Any]:
    """The output and the gradients of q, k and v, as CuPy has them."""
    q, k, v, do = given.values()
    o, lse = attention(q, k, v, layout="bshd", return_lse=True, **rules)
    return [o, *attention_backward(do, q, k, v, o, lse, layout="bshd", **rules)[:3]]


def equal(got: Any, expected: Any) -> None:
    import cupy

    got, _ = interop.taken("x", got)
    bits = f"u{expected.dtype.itemsize}"
    cupy.testing.assert_array_equal(got.view(bits), expected.view(bits))


@pytest.fixture
def torch() -> Any:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch sees no GPU")
    return torch


def tensors(torch: Any, given: dict[str, Any]) -> tuple[list[Any], Any]:
    *inputs, do = (torch.from_dlpack(x) for x in given.values())
    return [x.requires_grad_() for x in inputs], do


@pytest.mark.parametrize("dtype", DTYPES)
def test_autograd(torch: Any, dtype: str) -> None:
    given = arrays(dtype)
    inputs, do = tensors(torch, given)
    o = attention(*inputs, layout="bshd", **RULES)
    found = torch.autograd.grad(o, inputs, do)
    for got, expected in zip((o.detach(), *found), wanted(given, **RULES), strict=True):
        equal(got, expected)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(torch: Any, mode: str) -> None:
    given = arrays()
    inputs, do = tensors(torch, given)
    torch.compiler.reset()
    call = torch.compile(
        lambda *x: attention(*x, layout="bshd", **RULES), fullgraph=True, mode=mode
    )
    for _ in range(3):  # the third time a graph may run
        o = call(*inputs)
        found = torch.autograd.grad(o, inputs, do)
        for got, expected in zip((o.detach(), *found), wanted(given, **RULES), strict=True):
            equal(got, expected)


@pytest.mark.parametrize("which", ["q", "k", "v", "qv", "kv"])
def test_some_that_require_a_gradient(torch: Any, which: str) -> None:
    given = arrays()
    inputs, do = tensors(torch, given)
    for name, x in zip("qkv", inputs, strict=True):
        x.requires_grad_(name in which)
    attention(*inputs, layout="bshd", **RULES).backward(do)
    for name, x, expected in zip("qkv", inputs, wanted(given, **RULES)[1:], strict=True):
        assert (x.grad is not None) == (name in which)
        if name in which:
            equal(x.grad, expected)


@pytest.mark.parametrize("how", ["of a sum", "of a mean of queries", "turned", "every other"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_the_output_in_any_strides(torch: Any, how: str, dtype: str) -> None:
    import cupy

    given = arrays(dtype)
    inputs, do = tensors(torch, given)
    if how == "of a sum":
        do = do[:1, :1, :1, :1].expand(do.shape)
    elif how == "of a mean of queries":
        do = do[:, :1].expand(do.shape)
    elif how == "turned":
        do = do.transpose(1, 3).contiguous().transpose(1, 3)
    else:
        do = do.repeat_interleave(2, -1)[..., ::2]
    given["do"] = cupy.from_dlpack(do.contiguous())
    found = torch.autograd.grad(attention(*inputs, layout="bshd", causal=True), inputs, do)
    for got, expected in zip(found, wanted(given, causal=True)[1:], strict=True):
        equal(got, expected)


def test_parts_of_a_projection(torch: Any) -> None:
    """q, k and v as views of one tensor, whose gradient is one, too."""
    import cupy

    qkv = torch.randn(2, 65, 3, 4, 64, device="cuda", dtype=torch.float16, requires_grad=True)
    attention(*qkv.unbind(2), layout="bshd", causal=True).square().sum().backward()
    parts = [cupy.from_dlpack(x.detach().contiguous()) for x in qkv.unbind(2)]
    o = torch.from_dlpack(attention(*parts, layout="bshd", causal=True))
    given = dict(zip(("q", "k", "v", "do"), (*parts, cupy.from_dlpack(2 * o)), strict=True))
    for got, expected in zip(qkv.grad.unbind(2), wanted(given, causal=True)[1:], strict=True):
        equal(got.contiguous(), expected)


def test_rules_arrays_and_the_log_sum_exp(torch: Any) -> None:
    import cupy

    given = arrays()
    rng = np.random.default_rng(1)
    rules = {"bias": (4, 1, 130), "sink": (4,), "alibi_slopes": (2, 4)}
    extras = {n: cupy.asarray(rng.standard_normal(s, np.float32)) for n, s in rules.items()}
    extras["bias"] = extras["bias"].astype("float16")
    dlse = cupy.asarray(rng.standard_normal((2, 4, 65), np.float32))
    q, k, v, do = given.values()
    o, lse = attention(q, k, v, **extras, layout="bshd", return_lse=True)
    wrt = ("q", "k", "v", *rules)
    expected = attention_backward(do, q, k, v, o, lse, dlse=dlse, wrt=wrt, layout="bshd", **extras)
    (tq, tk, tv), tdo = tensors(torch, given)
    others = {n: torch.from_dlpack(x).requires_grad_() for n, x in extras.items()}
    results = attention(tq, tk, tv, **others, layout="bshd", return_lse=True)
    leaves = (tq, tk, tv, *others.values())
    found = torch.autograd.grad(results, leaves, (tdo, torch.from_dlpack(dlse)))
    for name, got in zip(wrt, found, strict=True):
        equal(got, getattr(expected, f"d{name}"))


@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 5, 5), (2, 0, 7), (2, 7, 0), (1, 1, 1)])
def test_lengths_of_nothing(torch: Any, batch: int, queries: int, keys: int) -> None:
    def leaf(rows: int, heads: int) -> Any:
        x = torch.ones(batch, heads, rows, 64, device="cuda", dtype=torch.bfloat16)
        return x.requires_grad_()

    q, k, v = leaf(queries, 4), leaf(keys, 2), leaf(keys, 2)
    attention(q, k, v, causal=True).sum().backward()
    for x in (q, k, v):
        assert x.grad.shape == x.shape and bool(x.grad.isfinite().all())
    assert not q.grad.any() and not k.grad.any()  # one key, or none: nothing to move


def test_packed(torch: Any) -> None:
    """By flash-attn's signature; sequences of no rows, too."""
    import cupy

    from flashcore_cupy.torch import flash_attn_varlen_func

    rng = np.random.default_rng(2)
    bounds = {"cu_seqlens_q": [0, 40, 40, 100, 130], "cu_seqlens_k": [0, 64, 90, 90, 200]}
    shapes = {"q": (130, 4, 64), "k": (200, 2, 64), "v": (200, 2, 64), "do": (130, 4, 64)}
    given = {n: cupy.asarray(rng.standard_normal(s).astype("f2")) for n, s in shapes.items()}
    places = {n: cupy.asarray(x, "i4") for n, x in bounds.items()}
    q, k, v, do = given.values()
    o, lse = attention(q, k, v, causal=True, return_lse=True, **places)
    expected = attention_backward(do, q, k, v, o, lse, causal=True, **places)
    inputs, tdo = tensors(torch, given)
    at = [torch.from_dlpack(x) for x in places.values()]
    got = flash_attn_varlen_func(*inputs, *at, 60, 110, causal=True, deterministic=True)
    equal(got.detach(), o)
    for x, y in zip(torch.autograd.grad(got, inputs, tdo), expected[:3], strict=True):
        equal(x, y)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints(torch: Any, use_reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    given = arrays()
    inputs, do = tensors(torch, given)
    o = checkpoint(
        lambda *x: attention(*x, layout="bshd", causal=True),
        *inputs,
        use_reentrant=use_reentrant,
    )
    o.backward(do)
    for x, expected in zip(inputs, wanted(given, causal=True)[1:], strict=True):
        equal(x.grad, expected)


@pytest.mark.parametrize("differentiates", [False, True])
def test_autocast(torch: Any, differentiates: bool) -> None:
    given = arrays("float32")
    inputs, do = tensors(torch, given)
    low = {n: x.astype("float16") for n, x in given.items()}
    o, *expected = wanted(low, causal=True)
    with torch.autocast("cuda", torch.float16), torch.set_grad_enabled(differentiates):
        got = attention(*inputs, layout="bshd", causal=True)
    equal(got.detach(), o)
    if differentiates:
        found = torch.autograd.grad(got, inputs, do.half())
        for x, y in zip(found, expected, strict=True):
            equal(x, y.astype("float32"))


def test_on_a_stream_of_torchs(torch: Any) -> None:
    """Inputs made on it late, gradients read on it: both passes run there."""
    given = arrays()
    inputs, do = tensors(torch, given)
    stream = torch.cuda.Stream()
    expected = wanted(given)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        late = [torch.full_like(x, torch.nan) for x in inputs]
        torch.cuda._sleep(20_000_000)
        for x, y in zip(late, inputs, strict=True):
            x.copy_(y.detach())
        late = [x.requires_grad_() for x in late]
        found = torch.autograd.grad(attention(*late, layout="bshd"), late, do)
        copies = [x.clone() for x in found]
    stream.synchronize()
    for got, x in zip(copies, expected[1:], strict=True):
        equal(got, x)


def test_on_a_stream_of_cupys(torch: Any) -> None:
    """That both passes run on CuPy's stream: torch's waits for it."""
    import cupy

    given = arrays()
    inputs, do = tensors(torch, given)
    expected = wanted(given)
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=True):
        for _ in range(20):
            found = torch.autograd.grad(attention(*inputs, layout="bshd"), inputs, do)
            for got, x in zip((y.clone() for y in found), expected[1:], strict=True):
                equal(got, x)


def test_memory_of_torchs(torch: Any) -> None:
    """CuPy may allocate by torch: nothing is kept, and results are the same."""
    import cupy

    given = arrays()
    expected = wanted(given)
    inputs, do = tensors(torch, given)
    allocator = cupy.cuda.PythonFunctionAllocator(
        torch.cuda.caching_allocator_alloc, lambda x, _: torch.cuda.caching_allocator_delete(x)
    )
    held, before = [], cupy.cuda.get_allocator()
    cupy.cuda.set_allocator(allocator.malloc)
    try:
        for _ in range(4):
            o = attention(*inputs, layout="bshd")
            found = torch.autograd.grad(o, inputs, do)
            for got, x in zip((o.detach(), *found), expected, strict=True):
                equal(got, x)
            del o, found, got
            held.append(torch.cuda.memory_allocated())
    finally:
        cupy.cuda.set_allocator(before)
    assert held[1] == held[3]


def captured(torch: Any, step: Callable[[], Any]) -> tuple[Any, Any]:
    """A step as a graph of torch's, after one on another stream, as torch asks for; its result."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        return graph, step()


def test_captured_with_a_step(torch: Any) -> None:
    """Forward and backward as one graph of torch's, replayed with other numbers."""
    given, other = arrays(), {n: x[::-1].copy() for n, x in arrays().items()}
    inputs, do = tensors(torch, given)

    def step() -> Any:
        return torch.autograd.grad(attention(*inputs, layout="bshd", causal=True), inputs, do)

    graph, found = captured(torch, step)
    with torch.no_grad():
        for x, y in zip((*inputs, do), other.values(), strict=True):
            x.copy_(torch.from_dlpack(y))
    graph.replay()
    torch.cuda.synchronize()
    for got, expected in zip(found, wanted(other, causal=True)[1:], strict=True):
        equal(got, expected)


def drawn(torch: Any) -> Any:
    """What a drop-in draws next."""
    return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_of_a_drop_in(torch: Any, dtype: str) -> None:
    from flashcore_cupy.torch import flash_attn_func

    given = arrays(dtype)
    inputs, do = tensors(torch, given)
    torch.manual_seed(5)
    o = flash_attn_func(*inputs, 0.3, causal=True, deterministic=True)
    found = torch.autograd.grad(o, inputs, do)
    torch.manual_seed(5)
    rng = interop.taken("rng", drawn(torch))[0]
    expected = wanted(given, causal=True, dropout_p=0.3, rng=rng)
    for got, x in zip((o.detach(), *found), expected, strict=True):
        equal(got, x)
    other = flash_attn_func(*inputs, 0.3, causal=True, deterministic=True)
    assert not torch.equal(o, other)


def test_a_captured_step_draws_anew(torch: Any) -> None:
    from flashcore_cupy.torch import flash_attn_func

    given = arrays()
    inputs, do = tensors(torch, given)

    def step() -> Any:
        o = flash_attn_func(*inputs, 0.3, causal=True, deterministic=True)
        return o, *torch.autograd.grad(o, inputs, do)

    graph, found = captured(torch, step)
    seen = []
    for seed in (5, 6, None, 5):
        if seed is not None:
            torch.manual_seed(seed)
        graph.replay()
        torch.cuda.synchronize()
        seen.append([x.detach().clone() for x in found])
    assert all(torch.equal(x, y) for x, y in zip(seen[0], seen[3], strict=True))
    for n in (1, 2):
        assert not torch.equal(seen[n][0], seen[n - 1][0])
    torch.manual_seed(5)
    for got, expected in zip(seen[0], step(), strict=True):
        assert torch.equal(got, expected)


def test_a_known_call_has_no_dropout(torch: Any) -> None:
    """Calls that are remembered are not those that drop."""
    given = arrays()
    drop: dict[str, Any] = {"dropout_p": 0.3, "rng": (5, 2)}
    first = [x.copy() for x in wanted(given, **drop)]
    plain = [x.copy() for x in wanted(given)]
    for rules, expected in (({}, plain), (drop, first), ({}, plain), (drop, first)):
        for got, x in zip(wanted(given, **rules), expected, strict=True):
            equal(got, x)
    assert all((x != y).any() for x, y in zip(first, plain, strict=True))
    q, k, v, do = given.values()
    o, lse = attention(q, k, v, layout="bshd", return_lse=True)
    with pytest.raises(ValueError, match=r"^rng: got none with"):
        attention_backward(do, q, k, v, o, lse, layout="bshd", dropout_p=0.3)


def test_torch_func(torch: Any) -> None:
    """The gradients of each of a batch, by vmap of grad."""
    given = arrays(batch=3)
    inputs, do = tensors(torch, given)

    def one(q: Any, k: Any, v: Any, do: Any) -> Any:
        o = attention(q[None], k[None], v[None], layout="bshd", causal=True)[0]
        return (o * do).sum(), o

    grads = torch.func.grad(one, (0, 1, 2), has_aux=True)
    found, o = torch.vmap(grads)(*(x.detach() for x in (*inputs, do)))
    for got, expected in zip((o, *found), wanted(given, causal=True), strict=True):
        equal(got, expected)


@pytest.fixture
def jax() -> Any:
    jax = pytest.importorskip("jax")
    try:
        jax.devices("cuda")
    except RuntimeError:
        pytest.skip("this JAX sees no GPU")
    return jax


@pytest.mark.parametrize("dtype", DTYPES)
def test_jax(jax: Any, dtype: str) -> None:
    given = arrays(dtype)
    *inputs, do = (jax.dlpack.from_dlpack(x) for x in given.values())

    @jax.jit
    def both(do: Any, *inputs: Any) -> Any:
        o, pull = jax.vjp(lambda *x: attention(*x, layout="bshd", **RULES), *inputs)
        return o, *pull(do)

    for _ in range(3):  # XLA may record a program that it runs again
        found = jax.block_until_ready(both(do, *inputs))
    for got, expected in zip(found, wanted(given, **RULES), strict=True):
        equal(got, expected)


def test_jax_maps_and_takes_nothing(jax: Any) -> None:
    given = arrays(batch=3)
    inputs = [jax.dlpack.from_dlpack(x) for x in given.values()]

    def one(q: Any, k: Any, v: Any, do: Any) -> Any:
        o = attention(q[None], k[None], v[None], layout="bshd", causal=True)[0]
        return (o.astype("float32") * do).sum(), o

    found, o = jax.jit(jax.vmap(jax.grad(one, (0, 1, 2), has_aux=True)))(*inputs)
    for got, expected in zip((o, *found), wanted(given, causal=True), strict=True):
        equal(got, expected)
    empty = jax.numpy.zeros((1, 0, 4, 64), "float16")
    zeros = jax.grad(lambda x: attention(x, empty, empty, layout="bshd").sum())(inputs[0][:1])
    assert not zeros.any()


def test_jax_reports_what_goes_wrong(jax: Any) -> None:
    *inputs, _ = (jax.dlpack.from_dlpack(x) for x in arrays().values())
    call = jax.jit(lambda *x: attention(*x, layout="bshd", score_mod="no such name"))
    with pytest.raises(Exception, match="CompileError"):
        jax.block_until_ready(call(*inputs))
