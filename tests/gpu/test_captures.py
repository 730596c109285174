"""Calls captured into CUDA graphs, in every mode and under every allocator; streams and GPUs."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flashcore_cupy import BlockMask, attention
from flashcore_cupy.attention import plan
from flashcore_cupy.backward import attention_backward, plan_backward
from flashcore_cupy.check import verify_gradients
from flashcore_cupy.cpu.reference import compare, make_inputs, naive, oracle
from flashcore_cupy.cuda import captures
from flashcore_cupy.launch import workspace
from flashcore_cupy.problem import varlen
from flashcore_cupy.problem.gradients import Gradients

MODES = ("Global", "ThreadLocal", "Relaxed")
# A call whose blocks ask a counter for work, and one whose parts of the keys meet in memory.
SIZES = {"counted": (32, 8, 300, 300), "split": (2, 8, 5, 5000)}


def inputs(sizes: tuple[int, int, int, int], seed: int) -> list[np.ndarray]:
    batch, heads, queries, keys = sizes
    shape = {"batch": batch, "heads": heads, "seqlen": queries, "seqlen_kv": keys}
    return list(make_inputs("normal", head_dim=64, seed=seed, **shape))


def check(got: Any, host: list[np.ndarray], **rules: Any) -> None:
    rows = np.arange(0, host[0].shape[2], 37)
    expected, _ = oracle(*host, rows=rows, **rules)
    result = compare(got.get()[:, :, rows], expected, naive(*host, rows=rows, **rules))
    assert result.ok, result.reason


@contextlib.contextmanager
def captured(mode: str = "Relaxed") -> Iterator[SimpleNamespace]:
    """A stream that is being captured; ``graph`` of what it yields is there afterwards."""
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    result = SimpleNamespace(stream=stream, graph=None)
    with stream:
        stream.begin_capture(getattr(cupy.cuda.runtime, f"streamCaptureMode{mode}"))
        yield result
        result.graph = stream.end_capture()


def replay(result: SimpleNamespace) -> None:
    """Replay when the arrays have what was set last: a copy may end after its call returns."""
    import cupy

    cupy.cuda.Device().synchronize()
    result.graph.launch(result.stream)
    result.stream.synchronize()


def nodes(result: SimpleNamespace) -> int:
    from flashcore_cupy.cuda.driver import binding, checked

    return int(checked(binding().cuGraphGetNodes(result.graph.graph, 0), "nodes")[-1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_every_mode_captures_first_calls_and_new_outputs(mode: str, sizes: Any) -> None:
    import cupy

    first, second = inputs(sizes, 0), inputs(sizes, 1)
    arrays = [cupy.asarray(x) for x in first]
    with captured(mode) as result:
        o = attention(*arrays, causal=True)
    assert o.shape == arrays[0].shape
    for host in (first, second, first):
        for array, values in zip(arrays, host, strict=True):
            array.set(values)
        replay(result)
        check(o, host, causal=True)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_a_captured_call_is_one_kernel_node(sizes: Any) -> None:
    import cupy

    arrays = [cupy.asarray(x) for x in inputs(sizes, 0)]
    with captured() as result:
        attention(*arrays, return_lse=True)
    graph = getattr(result.graph, "graph", None)
    if graph is None:
        pytest.skip("this CuPy does not tell a graph's handle")
    assert nodes(result) == 1


def test_outputs_live_as_long_as_the_graph() -> None:
    """The caller drops them; what is allocated afterwards is not written over by replays."""
    import cupy

    arrays = [cupy.asarray(x) for x in inputs((1, 8, 256, 256), 0)]
    turned = [x.swapaxes(2, 3).copy().swapaxes(2, 3) for x in arrays]  # will be copied
    attention(*arrays, return_lse=True)
    with captured() as result:
        attention(*arrays, return_lse=True)
        attention(*turned)
    with result.stream:
        others = [cupy.full(n, 171, cupy.uint8) for n in (2**18, 2**13, 2**9) for _ in range(40)]
        result.stream.synchronize()
    replay(result)
    assert all(bool((x == 171).all()) for x in others)


def test_memory_of_graphs_that_are_gone_is_given_back() -> None:
    import cupy

    arrays = [cupy.asarray(x) for x in inputs(SIZES["split"], 0)]
    attention(*arrays)
    before = set(captures._kept)
    made = set()
    for _ in range(5):
        with captured() as result:
            attention(*arrays)
        replay(result)
        new = set(captures._kept) - before - made
        assert new
        made |= new
        del result
        gc.collect()
    end = time.monotonic() + 10  # the driver tells it from a thread of its own
    while made & set(captures._kept) and time.monotonic() < end:
        time.sleep(0.01)
        captures.give_back()
    assert not made & set(captures._kept)


def test_a_plan_that_is_dropped_lives_on_in_its_graph() -> None:
    import cupy

    host = inputs(SIZES["split"], 0)
    arrays = [cupy.asarray(x) for x in host]
    bound = plan(*arrays)
    o = bound.arrays["o"]
    with captured("Global") as result:
        bound.launch()
    del bound
    gc.collect()
    with result.stream:
        others = [cupy.full(2**n, 171, cupy.uint8) for n in range(9, 21) for _ in range(8)]
        result.stream.synchronize()
    replay(result)
    assert all(bool((x == 171).all()) for x in others)
    check(o, host)


def allocators() -> dict[str, Any]:
    import cupy

    def own(size: int, device: int) -> int:
        return int(cupy.cuda.runtime.malloc(size))

    def free(pointer: int, device: int) -> None:
        cupy.cuda.runtime.free(pointer)

    return {
        "none": None,
        "pool": cupy.cuda.MemoryPool().malloc,
        "async": cupy.cuda.malloc_async,
        "async pool": cupy.cuda.MemoryAsyncPool().malloc,
        "managed": cupy.cuda.MemoryPool(cupy.cuda.malloc_managed).malloc,
        "own": cupy.cuda.PythonFunctionAllocator(own, free).malloc,
    }


@pytest.mark.parametrize("name", ["none", "pool", "async", "async pool", "managed", "own"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_other_allocators(name: str, sizes: Any) -> None:
    import cupy

    host = inputs(sizes, 0)
    with cupy.cuda.using_allocator(allocators()[name]):
        arrays = [cupy.asarray(x) for x in host]
        for _ in range(2):
            check(attention(*arrays), host)
        with captured() as result:
            o = attention(*arrays)
        for _ in range(2):
            replay(result)
            check(o, host)
        del result, o, arrays
        gc.collect()
        workspace._areas.clear()
        cupy.cuda.Device().synchronize()


def check_gradients(got: Gradients, host: dict[str, np.ndarray], **rules: Any) -> None:
    operands = (host[name] for name in ("do", "q", "k", "v"))
    on_host = Gradients(*(None if x is None else x.get() for x in got))
    faults = verify_gradients.expect(*operands, **rules).faults(on_host)
    assert not faults, faults


def gradient_inputs(seed: int) -> dict[str, np.ndarray]:
    host = dict(zip("qkv", inputs((2, 4, 90, 130), seed), strict=True))
    o, lse = attention(*host.values(), causal=True, return_lse=True)
    do = np.random.default_rng((seed, 5)).standard_normal(o.shape).astype(o.dtype)
    return host | {"do": do, "o": o, "lse": lse}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("planned", [False, True])
def test_gradients_are_captured(mode: str, planned: bool) -> None:
    """A call with all that it allocates, and a plan, which allocates nothing when launched."""
    import cupy

    first, second = gradient_inputs(0), gradient_inputs(1)
    arrays = {name: cupy.asarray(x) for name, x in first.items()}
    bound = plan_backward(**arrays, causal=True) if planned else None
    pool = cupy.get_default_memory_pool()
    with captured(mode) as result:
        before = pool.used_bytes()
        if bound is not None:
            bound.launch()
            got = bound.gradients
            assert pool.used_bytes() == before
        else:
            got = attention_backward(**arrays, causal=True)
    assert nodes(result) == 3
    for host in (first, second, first):
        for name, array in arrays.items():
            array.set(host[name])
        replay(result)
        check_gradients(got, host, causal=True)


@pytest.mark.parametrize("name", ["async", "async pool", "own"])
def test_what_graphs_owned_is_freed_during_the_next_capture(name: str) -> None:
    import cupy

    host = inputs(SIZES["split"], 0)
    arrays = [cupy.asarray(x) for x in host]
    with cupy.cuda.using_allocator(allocators()[name]), captured() as result:
        attention(*arrays)
    del result
    gc.collect()
    end = time.monotonic() + 10  # the driver tells it from a thread of its own
    while not captures._gone and time.monotonic() < end:
        time.sleep(0.01)
    assert captures._gone
    with captured("Global") as result:
        o = attention(*arrays)
        assert not captures._gone
    replay(result)
    check(o, host)


def test_gradients_of_a_block_mask_follow_its_lists() -> None:
    """A replay looks at the lists as they are by then."""
    import cupy

    host = gradient_inputs(seed=3)
    given = {name: cupy.asarray(x) for name, x in host.items()}
    rows, columns = (-(-host[name].shape[2] // 128) for name in "qk")
    counts = cupy.ones((1, 1, rows), cupy.int32)
    indices = cupy.zeros((1, 1, rows, columns), cupy.int32)
    sizes = {"seqlen_q": host["q"].shape[2], "seqlen_kv": host["k"].shape[2]}
    made = BlockMask.from_lists(None, None, counts, indices, **sizes)
    with captured() as result:
        got = attention_backward(**given, block_mask=made)
    for lists in ([0], [columns - 1], list(range(columns))):
        counts[...] = len(lists)
        indices[..., : len(lists)] = cupy.asarray(lists, cupy.int32)
        mask = np.zeros((sizes["seqlen_q"], sizes["seqlen_kv"]), bool)
        for block in lists:
            mask[:, 128 * block : 128 * (block + 1)] = True
        o, lse = attention(*(given[n] for n in "qkv"), mask=cupy.asarray(mask), return_lse=True)
        given["o"][...], given["lse"][...] = o, lse
        replay(result)
        want = attention_backward(**given, mask=cupy.asarray(mask))
        for x, y in zip(got[:3], want[:3], strict=True):
            np.testing.assert_allclose(x.get(), y.get(), rtol=1e-2, atol=1e-2)


def test_lists_and_boundaries_of_the_host_are_captured() -> None:
    import cupy

    q, k, v = (cupy.asarray(x[0].swapaxes(0, 1)) for x in inputs((1, 2, 70, 70), 3))
    cu_seqlens = np.array([0, 30, 70])
    rules = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "sink": [0.5, -1.0]}
    want = attention(q, k, v, **rules).get()
    with captured("Global") as result:
        o = attention(q, k, v, **rules)
    varlen._copies.clear()
    junk = [cupy.full(3, 1 << 20, cupy.int32) for _ in range(2000)]
    replay(result)
    assert len(junk) and np.array_equal(o.get(), want)


def test_a_number_on_the_gpu_cannot_be_captured() -> None:
    import cupy

    q = cupy.zeros((1, 1, 8, 64), cupy.float16)
    scale = cupy.asarray(0.5)
    with captured() as result, pytest.raises(ValueError, match=r"softmax_scale: .*float"):
        attention(q, q, q, softmax_scale=scale)
    assert result.graph is not None


def test_a_stream_of_another_gpu_is_refused() -> None:
    import cupy

    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    q = cupy.zeros((1, 1, 8, 64), cupy.float16)
    with cupy.cuda.Device(1):
        stream = cupy.cuda.Stream(non_blocking=True)
    with pytest.raises(ValueError, match="stream: of GPU 1, but q is on GPU 0"):
        attention(q, q, q, stream=stream)


def test_torchs_capture_needs_no_stream_named() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch sees no GPU")
    host = inputs(SIZES["counted"], 0)
    q, k, v = (torch.from_numpy(x).cuda() for x in host)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = attention(q, k, v, causal=True)
    graph.replay()
    torch.cuda.synchronize()
    check(SimpleNamespace(get=lambda: o.cpu().numpy()), host, causal=True)
