"""The edges that only a GPU has: streams, graphs, threads, addresses, boundaries nobody checks."""

from __future__ import annotations

import threading
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cases_edges import LENGTHS, RULED, arrays, check, off_by_a_byte, pack, run
from helpers import runs_here

import flashcore_cupy
from flashcore_cupy.attention import plan
from flashcore_cupy.check.selftest.arrays import embed
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


@pytest.mark.parametrize(
    "kernel", ["scalar", "wmma_unfused", "wmma_warp_softmax", "mma_sm80", "wgmma_sm90", "fp8_wmma"]
)
def test_offsets_beyond_2_to_31_elements(kernel: str) -> None:
    import cupy

    if not runs_here(kernel):
        pytest.skip(f"{kernel} is for another GPU")
    far = 2**31 + 64  # elements between batches, or heads, or the first row and the last
    if cupy.cuda.Device().mem_info[0] < 20e9:
        pytest.skip("needs 20 GB of free GPU memory")
    host = arrays(40, 50, batch=2, heads=2)
    plain = run(kernel, *host)
    for axis in range(3):
        views = []
        for x in (*host, host[0]):  # the last is the output
            step = far if axis < 2 else -(-far // (x.shape[2] - 1) // 8) * 8
            base = cupy.empty(step * (x.shape[axis] - 1) + x.size, np.float16)
            strides = [*x.strides]
            strides[axis] = 2 * step
            views.append(cupy.ndarray(x.shape, np.float16, base.data, strides=tuple(strides)))
        for view, x in zip(views, host, strict=False):
            view[...] = cupy.asarray(x)
        got = flashcore_cupy.attention(*views[:3], out=views[3], kernel=kernel)
        np.testing.assert_array_equal(cupy.asnumpy(cupy.ascontiguousarray(got)), plain)


def test_every_gpu_of_the_machine() -> None:
    import cupy

    for device in range(cupy.cuda.runtime.getDeviceCount()):
        with cupy.cuda.Device(device):
            q, k, v = (cupy.asarray(x) for x in arrays(100, 100))
        for kernel in filter(
            runs_here, registry.KERNELS
        ):  # from the current device, whichever holds the arrays
            o = flashcore_cupy.attention(q, k, v, kernel=kernel)
            assert o.device.id == device
            assert cupy.isfinite(o).all()


FEW_BLOCKS = {
    "mma_sm80": [(1, 1, 64, 64), (3, 2, 17, 100), (2, 5, 333, 64), (1, 1, 65, 1)],
    "wgmma_sm90": [(1, 13, 70, 64), (2, 8, 300, 100), (1, 16, 500, 1)],
}


@pytest.mark.parametrize("kernel", FEW_BLOCKS)
def test_a_length_compiles_nothing_anew(kernel: str) -> None:
    """Unless it gets another tile: these are all few blocks of many queries."""
    import cupy

    from flashcore_cupy.launch.plan import load_kernel

    if not runs_here(kernel):
        pytest.skip(f"{kernel} is for another GPU")
    misses = []
    for batch, heads, seqlen_q, seqlen_kv in FEW_BLOCKS[kernel]:
        q, k, v = arrays(seqlen_q, seqlen_kv, batch=batch, heads=heads)
        flashcore_cupy.attention(*(cupy.asarray(x) for x in (q, k, v)), kernel=kernel)
        misses.append(load_kernel.cache_info().misses)
    assert len(set(misses)) == 1


def test_bfloat16_and_float32_dtypes_come_back() -> None:
    import cupy

    for dtype in (np.float16, ml_dtypes.bfloat16, np.float32):
        q, k, v = (cupy.asarray(x.astype(dtype)) for x in arrays(20, 30))
        o, lse = flashcore_cupy.attention(q, k, v, return_lse=True)
        assert isinstance(o, cupy.ndarray) and o.dtype == dtype
        assert lse.dtype == np.float32


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_float32_is_as_accurate_as_float32(head_dim: int) -> None:
    """2048 keys, all N(0, 1): within 2e-6."""
    import cupy

    rng = np.random.default_rng(head_dim)
    q, k, v = (rng.standard_normal((1, 2, 2048, head_dim), np.float32) for _ in "qkv")
    o = flashcore_cupy.attention(*(cupy.asarray(x) for x in (q, k, v)))
    expected, _ = reference.oracle(q, k, v)
    assert np.abs(cupy.asnumpy(o) - expected).max() <= 2e-6


@pytest.mark.parametrize(
    ("block_n", "warps_d"), [(32, 2), (64, 2), (64, 4), (128, 2), (128, 4)], ids=str
)
def test_warps_that_share_rows_in_other_tiles(block_n: int, warps_d: int) -> None:
    """Parts of P that are a panel of shared memory, several, and less than one."""
    import cupy

    rng = np.random.default_rng(block_n + warps_d)
    q, k, v = (rng.standard_normal((1, 2, 150, 256)).astype(np.float16) for _ in "qkv")
    tile = {"block_m": 32, "warps_m": 2, "warps_d": warps_d, "num_stages": 1, "block_n": block_n}
    bound = plan(*(cupy.asarray(x) for x in (q, k, v)), kernel="mma_sm80", config=tile)
    bound.launch()
    expected, _ = reference.oracle(q, k, v)
    assert np.abs(cupy.asnumpy(bound.arrays["o"]) - expected).max() < 2e-3


@pytest.mark.parametrize("form", ["mask", "mask_mod"])
@pytest.mark.parametrize(
    ("kernel", "dtype", "head_dim"),
    [
        *(("wgmma_sm90", "float16", n) for n in (64, 128, 256)),
        *(("mma_sm80", "float16", n) for n in (64, 128, 256, 512)),
        ("mma_sm80", "float32", 64),
    ],
)
@pytest.mark.parametrize("causal", [False, True])
def test_keys_of_other_documents_may_hold_anything(
    kernel: str, dtype: str, head_dim: int, form: str, causal: bool
) -> None:
    """Queries of document n see every other document of the keys: n of 150 queries, 2 n of 70 keys.

    So some tiles are hidden from all rows of a block, some from some, some in part.
    """
    import cupy

    if not runs_here(kernel):
        pytest.skip("needs wgmma")
    rng = np.random.default_rng(head_dim)
    q = rng.standard_normal((1, 2, 600, head_dim)).astype(dtype)
    k, v = (rng.standard_normal((1, 2, 624, head_dim)).astype(dtype) for _ in "kv")
    i, j = np.arange(600)[:, None], np.arange(624)
    seen = j // 70 == i // 150 * 2
    rule = {"mask": cupy.asarray(seen)}
    if form == "mask_mod":
        rule = {"mask_mod": "kv_idx / 70 == q_idx / 150 * 2"}
    if causal:
        seen = seen & (j <= i + 24)
    expected, _ = reference.oracle(q, k, v, mask=seen)
    hidden = ~seen.any(0)
    assert hidden.sum() > 300
    k[:, :, hidden], v[:, :, hidden] = np.nan, np.inf
    bound = plan(*(cupy.asarray(x) for x in (q, k, v)), kernel=kernel, causal=causal, **rule)
    bound.launch()
    tolerance = 4e-3 if dtype == "float16" else 5e-6
    assert np.abs(cupy.asnumpy(bound.arrays["o"]) - expected).max() < tolerance


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("kernel", "heads", "queries", "keys"),
    [
        ("wgmma_sm90", (8, 2), 1, 3008),  # clusters, most of whose parts see nothing
        ("wgmma_sm90", (32, 8), 3, 30_000),  # parts in global memory
        ("mma_sm80", (8, 2), 1, 3008),
        ("mma_sm80", (8, 8), 4, 3008),
    ],
)
def test_parts_of_split_keys_may_see_nothing(
    kernel: str, heads: tuple[int, int], queries: int, keys: int, head_dim: int
) -> None:
    import cupy

    if not runs_here(kernel):
        pytest.skip("needs wgmma")
    rng = np.random.default_rng(keys)
    q = rng.standard_normal((1, heads[0], queries, head_dim)).astype(np.float16)
    k, v = (rng.standard_normal((1, heads[1], keys, head_dim)).astype("f2") for _ in "kv")
    seen = (np.arange(keys) >= 1000) & (np.arange(keys) < 1103)
    expected, _ = reference.oracle(q, k, v, mask=seen)
    k[:, :, ~seen], v[:, :, ~seen] = np.nan, np.inf
    arrays = [cupy.asarray(x) for x in (q, k, v)]
    bound = plan(*arrays, kernel=kernel, mask=cupy.asarray(seen))
    assert bound.selection.config.tile.split_kv
    bound.launch()
    assert np.abs(cupy.asnumpy(bound.arrays["o"]) - expected).max() < 2e-3


# ---- boundaries that nobody has checked ----------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("heads", [(4, 4), (8, 1), (16, 4)])
@pytest.mark.parametrize("queries", [5, 200])
def test_garbage_boundaries_stay_inside(queries: int, heads: tuple[int, int], dtype: str) -> None:
    """Outputs lie between guards, and inputs between NaN: none of it is written, or read."""
    import cupy

    rng = np.random.default_rng(3)
    keys, sequences = 300, 4
    shapes = ((queries, heads[0]), (keys, heads[1]), (keys, heads[1]))
    like = [rng.standard_normal((1, *shape, 64)).astype(dtype) for shape in shapes]
    placed = [embed(x.shape, x.dtype, "contiguous", like=x).on_gpu() for x in like]
    out = embed(like[0].shape, like[0].dtype, "contiguous", like=np.full_like(like[0], 7))
    q, k, v = (view[0] for _, view in placed)
    extremes = np.array([-(2**31), -7, -1, 0, 1, 3, 299, 300, 301, 2**31 - 1])
    for draw in range(60):
        bounds = rng.choice(extremes, (2, sequences + 1)).astype(np.int32)
        if draw % 3 == 0:
            bounds = rng.integers(-50, 350, bounds.shape).astype(np.int32)
        if draw % 5 == 0:
            bounds = np.sort(bounds)[:, ::-1]
        buffer, target = out.on_gpu()
        cu_q, cu_k = (cupy.asarray(np.ascontiguousarray(x)) for x in bounds)
        rules = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "causal": draw % 2 == 0}
        rules |= {"window": (30, -1)} if draw % 4 == 0 else {}
        rules |= {"batch_invariant": draw % 7 == 0}
        flashcore_cupy.attention(q, k, v, out=target[0], return_lse=True, **rules)
        host = cupy.asnumpy(buffer)
        assert out.surroundings_are_nan(host), bounds
        assert np.isfinite(cupy.asnumpy(target)).all(), bounds


def test_good_boundaries_on_the_device_are_taken_as_they_are() -> None:
    import cupy

    (q, k, v), bounds = pack(LENGTHS)
    on_gpu = [cupy.asarray(x) for x in (q, k, v)]
    on_device = {name: cupy.asarray(x) for name, x in bounds.items()}
    o = cupy.asnumpy(flashcore_cupy.attention(*on_gpu, causal=True, **on_device))
    check(o, q, k, v, causal=True, **bounds)
    np.testing.assert_array_equal(o, run(RULED[0], q, k, v, causal=True, **bounds))


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


# ---- more than 2**31 elements --------------------------------------------------------------------

FAR = 2**31 + 64


def far_apart(x: np.ndarray, axis: int) -> Any:
    """A view of x on the GPU whose last step along an axis leads beyond 2**31 elements."""
    import cupy

    step = -(-FAR // (x.shape[axis] - 1) // 8) * 8
    base = cupy.empty(step * (x.shape[axis] - 1) + x.size, x.dtype)
    strides = [*x.strides]
    strides[axis] = step * x.itemsize
    view = cupy.ndarray(x.shape, x.dtype, base.data, strides=tuple(strides))
    view[...] = cupy.asarray(x)
    return view


def needs(gigabytes: int) -> None:
    import cupy

    cupy.get_default_memory_pool().free_all_blocks()
    if cupy.cuda.Device().mem_info[0] < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of free GPU memory")


@pytest.mark.parametrize("queries", [3, 40])
def test_a_bias_and_a_mask_beyond_2_to_31_elements(queries: int) -> None:
    import cupy

    needs(30)
    q, k, v = arrays(queries, 50, batch=2, heads=4, heads_kv=1)
    rng = np.random.default_rng(4)
    bias = rng.standard_normal((2, 4, queries, 50)).astype(np.float32)
    mask = rng.random(bias.shape) < 0.7
    device = [cupy.asarray(x) for x in (q, k, v)]
    for axis in range(4):
        rules = {"bias": far_apart(bias, axis), "mask": far_apart(mask, axis)}
        got = cupy.asnumpy(flashcore_cupy.attention(*device, **rules))
        check(got, q, k, v, bias=bias, mask=mask)


@pytest.mark.parametrize("queries", [3, 90])
def test_packed_rows_beyond_2_to_31_elements(queries: int) -> None:
    import cupy

    needs(30)
    operands, bounds = pack(((queries, 100), (2, 150), (queries, 120)), heads=4, heads_kv=1)
    device = [far_apart(x, 0) for x in operands]
    out = far_apart(np.zeros_like(operands[0]), 0)
    rules = {name: cupy.asarray(x) for name, x in bounds.items()}
    flashcore_cupy.attention(*device, out=out, causal=True, **rules)
    got = cupy.asnumpy(cupy.ascontiguousarray(out))
    check(got, *operands, causal=True, **bounds)


def test_a_long_batch_beyond_2_to_31_elements() -> None:
    """Contiguous arrays of 2**31 elements and more; the first, a middle and the last sequence."""
    import cupy

    needs(30)
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


# ---- where arrays lie ----------------------------------------------------------------------------


def test_elements_off_their_multiples_are_refused() -> None:
    import cupy

    q, k, v = (cupy.asarray(x) for x in arrays(30, 40))
    off = off_by_a_byte(cupy.asnumpy(k), cupy)
    for call in (flashcore_cupy.attention, flashcore_cupy.explain):
        with pytest.raises(ValueError, match="k: its elements do not lie on multiples of their 2"):
            call(q, off, v)
    with pytest.raises(ValueError, match="out: its elements do not lie"):
        flashcore_cupy.attention(q, k, v, out=off_by_a_byte(cupy.asnumpy(q), cupy))


@pytest.mark.parametrize("queries", [3, 200])
@pytest.mark.parametrize("where", ["late", "reversed", "boxes"])
def test_out_of_a_full_grid_lies_anywhere(where: str, queries: int) -> None:
    """Rows that TMA can store, and others: an element late, or from the last to the first."""
    import cupy

    q, k, v = arrays(queries, 900, heads=32, heads_kv=8)
    base = cupy.full((1, 32, queries, 80), cupy.nan, cupy.float16)
    out = {
        "late": base[..., 1:65],
        "reversed": base[:, :, ::-1, 8:72],
        "boxes": base[..., 8:72],
    }[where]
    flashcore_cupy.attention(*(cupy.asarray(x) for x in (q, k, v)), out=out)
    check(cupy.asnumpy(out), q, k, v)
    out.fill(cupy.nan)
    assert cupy.isnan(base).all(), "nothing else was written"
