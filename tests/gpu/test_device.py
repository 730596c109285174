"""What only a GPU has: streams, graphs, other GPUs, threads that launch at once, its memory."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from cases_edges import LENGTHS, RULED, Place, arrays, check, pack
from helpers import runs_here

import flashcore_cupy
from flashcore_cupy.attention import plan
from flashcore_cupy.cpu import reference
from flashcore_cupy.cuda.targets import HOPPER
from flashcore_cupy.jit import compiler
from flashcore_cupy.select import registry


def test_streams() -> None:
    import cupy

    q, k, v = (cupy.asarray(x) for x in arrays(100, 100))
    expected = flashcore_cupy.attention(q, k, v)
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)

    class Foreign:
        def __cuda_stream__(self) -> tuple[int, int]:
            return 0, stream.ptr

    for given in (stream, Foreign()):
        got = flashcore_cupy.attention(q, k, v, stream=given)
        stream.synchronize()
        assert (got == expected).all()
    assert cupy.cuda.get_current_stream() != stream


@pytest.mark.parametrize("kernel", registry.KERNELS)
def test_graph_capture(kernel: str) -> None:
    """A plan's launches are captured, and a replay reads what the arrays hold by then."""
    import cupy

    if not runs_here(kernel):
        pytest.skip(f"{kernel} is for another GPU")

    host = arrays(100, 120)
    q, k, v = (cupy.asarray(x) for x in host)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        bound = plan(q, k, v, kernel=kernel)
        stream.begin_capture()
        bound.launch()
        graph = stream.end_capture()
        q[...] = -q
        graph.launch(stream)
        replayed = cupy.asnumpy(bound.arrays["o"])
    direct = cupy.asnumpy(flashcore_cupy.attention(-cupy.asarray(host[0]), k, v, kernel=kernel))
    np.testing.assert_array_equal(replayed, direct)


def test_every_gpu_of_the_machine() -> None:
    import cupy

    for device in range(cupy.cuda.runtime.getDeviceCount()):
        with cupy.cuda.Device(device):
            q, k, v = (cupy.asarray(x) for x in arrays(100, 100))
        # From the current device, whichever holds the arrays.
        for kernel in filter(runs_here, registry.KERNELS):
            o = flashcore_cupy.attention(q, k, v, kernel=kernel)
            assert o.device.id == device
            assert cupy.isfinite(o).all()


def test_good_boundaries_on_the_device_are_taken_as_they_are(on: Place) -> None:
    import cupy

    (q, k, v), bounds = pack(LENGTHS)
    on_gpu = [cupy.asarray(x) for x in (q, k, v)]
    on_device = {name: cupy.asarray(x) for name, x in bounds.items()}
    o = cupy.asnumpy(flashcore_cupy.attention(*on_gpu, causal=True, **on_device))
    check(o, q, k, v, causal=True, **bounds)
    np.testing.assert_array_equal(o, on.by(RULED[0]).run(q, k, v, causal=True, **bounds))


# ---- graphs, streams, threads --------------------------------------------------------------------

#: A query and a few, whose keys are split over thread blocks, and rules that go the long way. On
#: Hopper parts of up to four queries, 16 rows with their groups of four, are merged by clusters.
DECODE: tuple[tuple[int, dict[str, Any]], ...] = (
    (1, {}),
    (3, {"causal": True}),
    (5, {"causal": True}),
    (2, {"window": (3000, -1), "alibi_slopes": np.linspace(0, 0.01, 8, dtype=np.float32)}),
)


def decode(queries: int, *, seed: int = 0, keys: int = 5000, dtype: str = "float16") -> list[Any]:
    import cupy

    host = arrays(queries, keys, batch=2, heads=8, heads_kv=2, seed=seed, dtype=dtype)
    return [cupy.asarray(x) for x in host]


def on_gpu(rules: dict[str, Any]) -> dict[str, Any]:
    import cupy

    return {n: cupy.asarray(x) if isinstance(x, np.ndarray) else x for n, x in rules.items()}


def test_these_calls_split_their_keys() -> None:
    for queries, rules in DECODE:
        found = plan(*decode(queries), **on_gpu(rules))
        few, in_memory = queries * 4 <= 16, "split_partials" in found.arrays
        if compiler.device_arch() == HOPPER:
            assert found.selection.config.tile.cluster == (8 if few else 1)
            assert in_memory == (not few)
        else:
            assert in_memory == few


@pytest.mark.parametrize(("queries", "rules"), DECODE, ids=str)
def test_a_captured_call_reads_what_its_arrays_hold_by_then(queries: int, rules: dict) -> None:
    import cupy

    rules = on_gpu(rules)
    q, k, v = decode(queries)
    out = cupy.empty_like(q)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        flashcore_cupy.attention(q, k, v, out=out, **rules)  # compiles and loads
        stream.begin_capture()
        flashcore_cupy.attention(q, k, v, out=out, **rules)
        graph = stream.end_capture()
    stream.synchronize()
    for seed in range(1, 6):
        changed = decode(queries, seed=seed)
        expected = flashcore_cupy.attention(*changed, **rules)
        for x, y in zip((q, k, v), changed, strict=True):
            x[...] = y
        out.fill(np.nan)
        cupy.cuda.Device().synchronize()
        graph.launch(stream)
        for others in (1, 6):  # calls beside the graph, with splits of their own
            flashcore_cupy.attention(*decode(others, seed=9, keys=20_000))
        stream.synchronize()
        assert out.tobytes() == expected.tobytes()


def test_a_captured_packed_call_follows_its_boundaries() -> None:
    import cupy

    (q, k, v), bounds = pack(((3, 900), (2, 400), (3, 100)), heads=8, heads_kv=2)
    device = [cupy.asarray(x) for x in (q, k, v)]
    moving = {name: cupy.asarray(x) for name, x in bounds.items()}
    out = cupy.empty_like(device[0])
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        flashcore_cupy.attention(*device, out=out, causal=True, **moving)
        stream.begin_capture()
        flashcore_cupy.attention(*device, out=out, causal=True, **moving)
        graph = stream.end_capture()
    for lengths in (
        ((3, 900), (2, 400), (3, 100)),
        ((8, 0), (0, 1000), (0, 400)),
        ((1, 1), (6, 1390), (1, 9)),
    ):
        other = np.cumsum([(0, 0), *lengths], axis=0, dtype=np.int32)
        for column, boundaries in enumerate(moving.values()):
            boundaries.set(other[:, column].copy())
        cupy.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        names = ("cu_seqlens_q", "cu_seqlens_k")
        check(cupy.asnumpy(out), q, k, v, causal=True, **dict(zip(names, other.T, strict=True)))


@pytest.mark.parametrize("streams", ["own", "per thread", "shared"])
def test_threads_at_once(streams: str) -> None:
    """Each with decode calls of its own size, whose parts must not mix."""
    import cupy

    sizes = ((1, 3000), (2, 9000), (3, 5001), (1, 700), (5, 4000), (7, 6001))
    inputs = [decode(queries, seed=n, keys=keys) for n, (queries, keys) in enumerate(sizes)]
    expected = [flashcore_cupy.attention(*x, causal=True).tobytes() for x in inputs]
    shared = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    wrong: list[str] = []
    start = threading.Barrier(len(inputs))

    def work(n: int) -> None:
        own = {
            "own": lambda: cupy.cuda.Stream(non_blocking=True),
            "per thread": lambda: cupy.cuda.Stream.ptds,
            "shared": lambda: shared,
        }[streams]()
        try:
            with cupy.cuda.Device(), own:
                start.wait()
                results = [flashcore_cupy.attention(*inputs[n], causal=True) for _ in range(200)]
                own.synchronize()
                bad = sum(x.tobytes() != expected[n] for x in results)
            if bad:
                wrong.append(f"thread {n}: {bad} of {len(results)} calls")
        except BaseException as error:
            wrong.append(f"thread {n}: {error!r}")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("queries", [(1, 3), (5, 7)], ids=str)
def test_two_streams_at_once(queries: tuple[int, int]) -> None:
    import cupy

    first, second = (decode(n, seed=n, keys=20_000) for n in queries)
    expected = [flashcore_cupy.attention(*x).tobytes() for x in (first, second)]
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]
    cupy.cuda.Device().synchronize()
    results: list[tuple[Any, ...]] = []
    for _ in range(50):  # enqueued in turn, running side by side
        results.append(
            tuple(
                flashcore_cupy.attention(*x, stream=stream)
                for x, stream in zip((first, second), streams, strict=True)
            )
        )
    cupy.cuda.Device().synchronize()
    assert all([x.tobytes() for x in pair] == expected for pair in results)


def test_a_long_batch_beyond_2_to_31_elements() -> None:
    """Contiguous arrays of 2**31 elements and more; the first, a middle and the last sequence."""
    import cupy

    if cupy.cuda.Device().mem_info[0] < 30e9:
        pytest.skip("needs 30 GB of free GPU memory")
    batch, seqlen, heads = 2**31 // (8 * 64 * 64) + 3, 64, 8
    shape = (batch, heads, seqlen, 64)
    assert np.prod(shape) > 2**31
    few = arrays(seqlen, seqlen, batch=3, heads=heads)
    q, k, v = (cupy.zeros(shape, np.float16) for _ in few)
    places = [0, batch // 2, batch - 1]
    for x, y in zip((q, k, v), few, strict=True):
        x[places] = cupy.asarray(y)
    o, lse = flashcore_cupy.attention(q, k, v, causal=True, return_lse=True)
    check(cupy.asnumpy(o[places]), *few, causal=True)
    _, expected = reference.oracle(*few, causal=True)
    np.testing.assert_allclose(cupy.asnumpy(lse[places]), expected, atol=1e-3)
    assert not o[1].any() and not o[batch - 2].any()


@pytest.mark.parametrize("head_dim", [64, 256])  # with tensor maps in the backward, and without
def test_calls_in_a_thread_where_nothing_has_asked_the_runtime(head_dim: int) -> None:
    """The driver has no context there, and memory comes from pools, which ask for none."""
    import cupy

    shape = {"batch": 1, "heads": 2, "seqlen": 100, "head_dim": head_dim}
    q, k, v = (cupy.asarray(x) for x in reference.make_inputs("normal", seed=0, **shape))

    def calls() -> list[Any]:
        o, lse = flashcore_cupy.attention(q, k, v, causal=True, return_lse=True)
        return [o, *flashcore_cupy.attention_backward(o, q, k, v, o, lse, causal=True)[:3]]

    def both() -> list[Any]:
        return calls() + calls()  # the second time from the launch cache

    want = both()
    both()  # the pools have what comes now
    bound = plan(q, k, v, causal=True)
    bound.launch()
    cupy.cuda.Device().synchronize()
    found: list[list[Any]] = []
    for run in (both, both, lambda: (bound.launch(), calls())[1]):
        thread = threading.Thread(target=lambda run=run: found.append(run()))
        thread.start()
        thread.join()
        found[-1] = [x.get() for x in found[-1]]
    assert len(found) == 3
    for got in found:
        for x, y in zip(got, want, strict=False):
            assert (x == y.get()).all()
