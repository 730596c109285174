"""Every wrapper of an instruction, alone, against known answers."""

from __future__ import annotations

import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from cases_ptx import lane_offsets_f32

from flashcore_cupy.jit import compiler


class Probe:
    """Launches a probe's kernels on the GPU."""

    def __init__(self, name: str) -> None:
        compiled = compiler.compile_kernel(f"probe_{name}.cu", {}, compiler.device_arch())
        self.module = compiler.load(compiled)

    def __call__(self, kernel: str, threads: int, inputs: list, outputs: list) -> list:
        import cupy

        grid, block = -(-threads // 256), min(threads, 256)
        arrays = [cupy.asarray(x) for x in inputs] + [cupy.asarray(x) for x in outputs]
        self.module.get_function(kernel)((grid,), (block,), tuple(arrays))
        return [cupy.asnumpy(x) for x in arrays[len(inputs) :]]


def _zeros(n: int, dtype: object) -> np.ndarray:
    return np.zeros(n, dtype)


def test_threads_and_blocks(probe_folder: Path) -> None:
    import cupy

    module, blocks, threads = Probe("thread").module, 3, 64
    n = blocks * threads
    thread, anew, block, grid, arch = (cupy.zeros(n, "i4") for _ in range(5))
    numbers = (thread, anew, block, grid, arch)
    module.get_function("numbers")((blocks,), (threads,), numbers)
    np.testing.assert_array_equal(thread.get(), np.arange(n) % threads)
    np.testing.assert_array_equal(anew.get(), np.arange(n) % threads)
    np.testing.assert_array_equal(block.get(), np.arange(n) // threads)
    assert (grid.get() == blocks).all()
    assert (arch.get() == 10 * int(re.sub(r"\D", "", compiler.device_arch()))).all()

    x, y, misplaced = (cupy.arange(n, dtype="i4") for _ in range(3))
    through_shared = module.get_function("through_shared")
    through_shared((blocks,), (threads,), (x, y, misplaced), shared_mem=4 * threads)
    np.testing.assert_array_equal(y.get(), np.arange(n) ^ 31)
    assert not misplaced.get().any()


def test_conversions(probe_folder: Path) -> None:
    run = Probe("convert")
    bits = np.arange(65536, dtype=np.uint16)
    half, bfloat16 = run("widen", 65536, [bits], [_zeros(65536, "f4")] * 2)
    np.testing.assert_array_equal(half, bits.view(np.float16).astype(np.float32))
    np.testing.assert_array_equal(bfloat16, bits.view(ml_dtypes.bfloat16).astype(np.float32))

    rng = np.random.default_rng(0)
    ties = np.arange(-2048, 2048, dtype=np.float32) * np.float32(1 + 2.0**-12)
    special = np.array([0.0, -0.0, 1e-8, 65504, 65519.9, 65520, 1e30, np.inf, -np.inf], np.float32)
    x = np.concatenate([rng.standard_normal(65536 - 4096 - 9, np.float32) * 100, ties, special])
    for dtype, kernel in (
        (np.float16, "narrow_half"),
        (ml_dtypes.bfloat16, "narrow_bfloat16"),
    ):
        one, two = run(kernel, 65536, [x], [_zeros(65536, "u2"), _zeros(65536, "u4")])
        with np.errstate(over="ignore"):
            expected, negated = (y.astype(dtype).view(np.uint16) for y in (x, -x))
        np.testing.assert_array_equal(one, expected)
        np.testing.assert_array_equal(two, expected | negated.astype(np.uint32) << 16)


def test_e4m3(probe_folder: Path) -> None:
    run = Probe("convert")
    pairs = np.arange(65536, dtype=np.uint16)
    values = pairs.view(np.uint8).view(ml_dtypes.float8_e4m3fn)
    out = [_zeros(65536, "u4") for _ in range(3)] + [_zeros(65536, "f4")]
    *words, low = run("widen_e4m3", 65536, [pairs], out)
    for word in words:
        got = word.view(np.float16).astype(np.float32)
        np.testing.assert_array_equal(got, values.astype(np.float32))
    np.testing.assert_array_equal(low, values[::2].astype(np.float32))
    (bfloat16,) = run("widen_e4m3_bfloat16", 65536, [pairs], [_zeros(65536, "u4")])
    got = bfloat16.view(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(got, values.astype(np.float32))

    rng = np.random.default_rng(1)
    grid = np.sort(np.unique(np.abs(values.astype(np.float32)[~np.isnan(values.astype("f4"))])))
    between = (grid[1:] + grid[:-1]) / 2  # ties
    x = np.concatenate([grid, -grid, between, -between, np.nextafter(between, np.float32(1e9))])
    x = np.concatenate([x, rng.uniform(-448, 448, 65536 - x.size - 3), [np.nan, np.inf, -np.inf]])
    x = x.astype(np.float32)
    (got,) = run("narrow_e4m3", 65536, [x], [_zeros(65536, "u1")])
    expected = np.where(np.isfinite(x), x, np.nan).astype(ml_dtypes.float8_e4m3fn)
    got8 = got.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(got8, expected.astype(np.float32))
    (got,) = run("narrow_e4m3", 256, [np.full(256, 449.0, np.float32)], [_zeros(256, "u1")])
    assert (got == 0x7E).all(), "saturates at 448"


def test_products_are_rounded_before_a_subtraction(probe_folder: Path) -> None:
    x, y = np.random.default_rng(2).standard_normal((2, 65536), np.float32)
    (left,) = Probe("convert")("rounded_product", 65536, [x, y, x * y], [_zeros(65536, "f4")])
    np.testing.assert_array_equal(left, 0)
    exact = x.astype(np.float64) * y
    assert np.count_nonzero(exact - x * y) > 60000, "a multiply-add would have left these"


def test_exp2(probe_folder: Path) -> None:
    run = Probe("convert")
    x = np.concatenate([np.linspace(-140, 100, 65532), [0.0, -np.inf, np.inf, np.nan]])
    (y,) = run("exponential", 65536, [x.astype(np.float32)], [_zeros(65536, "f4")])
    with np.errstate(over="ignore"):
        expected = np.exp2(x.astype(np.float32).astype(np.float64))
    normal = (expected > 2.0**-125) & np.isfinite(expected)
    assert np.max(np.abs(y[normal] / expected[normal] - 1)) < 2.0**-21.5
    np.testing.assert_array_equal(y[-4:], [1.0, 0.0, np.inf, np.nan])
    assert (y[x < -127] == 0).all(), "subnormal results are flushed to zero"


def test_reciprocal(probe_folder: Path) -> None:
    run = Probe("convert")
    powers = np.random.default_rng(11).uniform(-120, 120, 65530)
    special = [1.0, -4.0, np.inf, -np.inf, np.nan, 2.0**127]
    x = np.concatenate([np.exp2(powers) * np.where(np.arange(65530) % 2, 1, -1), special])
    x = x.astype(np.float32)
    (y,) = run("reciprocal", 65536, [x], [_zeros(65536, "f4")])
    expected = 1 / x[:65530].astype(np.float64)
    assert np.max(np.abs(y[:65530] / expected - 1)) < 2.0**-22.5
    np.testing.assert_array_equal(y[-6:], [1.0, -0.25, 0.0, -0.0, np.nan, 0.0])


def test_bytes(probe_folder: Path) -> None:
    numbers = np.arange(256, dtype=np.uint8)
    (y,) = Probe("convert")("widen_bytes", 256, [numbers], [_zeros(256, "f4")])
    np.testing.assert_array_equal(y, np.arange(256))


def test_bytes_in_turn(probe_folder: Path) -> None:
    a, b = np.random.default_rng(16).integers(0, 2**32, (2, 256), np.uint32)
    (y,) = Probe("convert")("interleave", 256, [a, b], [_zeros(256, "u4")])
    taken = np.stack([a.view("u1").reshape(-1, 4)[:, :2], b.view("u1").reshape(-1, 4)[:, :2]], -1)
    np.testing.assert_array_equal(y.view("u1"), taken.reshape(-1))


def test_warp(probe_folder: Path) -> None:
    run = Probe("warp")
    x = np.random.default_rng(2).integers(-1000, 1000, 256).astype(np.float32)
    lanes = np.arange(32)
    got = run("shuffles", 32, [x[:32]], [_zeros(32, "f4") for _ in range(7)])
    y = x[:32]
    expected = [
        y[lanes ^ 3],
        np.full(32, y[5]),
        np.repeat(y.reshape(4, 8).max(1), 8),
        np.full(32, y.max()),
        np.repeat(y.reshape(8, 4).sum(1), 4),
        np.full(32, y.sum()),
        np.ones(32),
    ]
    for g, e in zip(got, expected, strict=True):
        np.testing.assert_array_equal(g, e)
    block, warp = run("syncs", 256, [x], [_zeros(256, "f4") for _ in range(2)])
    np.testing.assert_array_equal(block, x[::-1])
    np.testing.assert_array_equal(warp, x[np.arange(256) ^ 31])


def test_integers_in_a_warp(probe_folder: Path) -> None:
    rng = np.random.default_rng(12)
    x = rng.integers(-(2**31), 2**31, 32, np.int32)
    bits = (np.uint32(1) << rng.integers(0, 32, 32, np.uint32)).astype(np.uint32)
    outputs = [_zeros(32, "i4"), _zeros(32, "i4"), _zeros(32, "u4"), _zeros(32, "u4")]
    from_five, negative, from_six, partner = Probe("warp")("integers", 32, [x, bits], outputs)
    np.testing.assert_array_equal(from_five, np.full(32, x[5]))
    np.testing.assert_array_equal(negative, np.full(32, (x < 0).sum()))
    np.testing.assert_array_equal(from_six, np.full(32, bits[6]))
    np.testing.assert_array_equal(partner, bits[np.arange(32) ^ 12])


@pytest.mark.parametrize("pairs", [2, 4, 6, 8, 10, 16])
def test_bits_of_keys(probe_folder: Path, pairs: int) -> None:
    """Lane l has keys 8 n + 2 (l % 4) and the next of row l / 4; any byte but 0 is true."""
    keys = pairs * 8
    rng = np.random.default_rng(pairs)
    mask = rng.choice(np.array([0, 0, 1, 2, 0x80, 0xFF], np.uint8), (8, keys))
    outputs = [
        *(np.zeros((8, keys), np.uint8), np.zeros((8, keys // 2), np.uint32)),
        *(np.zeros((8, keys), np.float32), np.zeros((8, keys), np.uint8)),
        np.zeros((8, keys), np.uint8),
    ]
    seen, values, singles, kept, together = Probe("key_bits")(f"pairs_{pairs}", 32, [mask], outputs)
    expected = mask != 0
    np.testing.assert_array_equal(seen, expected)
    halves = expected.reshape(8, -1, 2) * np.array([0x8765, 0x43210000], np.uint32)
    np.testing.assert_array_equal(values, halves.sum(-1, dtype=np.uint32))
    np.testing.assert_array_equal(np.isnan(singles), expected)
    inside = (np.arange(keys) >= 5) & (np.arange(keys) < keys - 3)
    np.testing.assert_array_equal(kept, expected & inside)
    np.testing.assert_array_equal(together, np.broadcast_to(expected.any(0), (8, keys)))


def test_transposed_quads(probe_folder: Path) -> None:
    x = np.random.default_rng(15).integers(0, 2**32, (8, 4, 4), np.uint32)  # quads, lanes, words
    (y,) = Probe("warp")("transposed_quads", 32, [x], [np.zeros((8, 4, 4), np.uint32)])
    np.testing.assert_array_equal(y, x.transpose(0, 2, 1))


def test_any_of_the_threads_at_a_named_barrier(probe_folder: Path) -> None:
    x = _zeros(256, "i4")
    x[70] = 1  # the second pair's first warp, and no other's
    x[200] = 2
    any_of_pair, partner = Probe("warp")("any_of_pairs", 256, [x], [_zeros(256, "i4")] * 2)
    np.testing.assert_array_equal(any_of_pair, np.arange(256) // 64 == 1)
    np.testing.assert_array_equal(partner, np.arange(256) ^ 32)


def test_named_barriers(probe_folder: Path) -> None:
    x = np.random.default_rng(13).integers(-1000, 1000, 256).astype(np.float32)
    (y,) = Probe("warp")("pairs_of_warps", 256, [x], [_zeros(256, "f4")])
    threads = np.arange(256)
    laps = threads // 64 + 1
    np.testing.assert_array_equal(y, x[np.where(laps % 2, threads ^ 32, threads)] + laps)


def test_the_last_to_arrive_reads_what_all_wrote(probe_folder: Path) -> None:
    blocks = 500
    x = np.random.default_rng(14).integers(-1000, 1000, (blocks, 256)).astype(np.float32)
    outputs = [
        np.full((blocks, 256), np.nan, np.float32),
        np.full((blocks, 256), -1, np.int32),
        _zeros(256, "i4"),
        np.full(256, np.nan, np.float32),
    ]
    got = Probe("global")("last_one_sums", blocks * 256, [x], outputs)
    parts, before, arrivals, total = got
    np.testing.assert_array_equal(parts, x)
    np.testing.assert_array_equal(np.sort(before, 0), np.arange(blocks)[:, None] + _zeros(256, int))
    np.testing.assert_array_equal(arrivals, blocks)
    np.testing.assert_array_equal(total, x.sum(0))


def test_wide_loads(probe_folder: Path) -> None:
    x = np.random.default_rng(15).standard_normal(128).astype(np.float32)
    (y,) = Probe("global")("wide_loads", 32, [x], [np.full(192, np.nan, np.float32)])
    np.testing.assert_array_equal(y, np.concatenate([x[:64], x]))


def test_cp_async(probe_folder: Path) -> None:
    run = Probe("cp_async")
    x = np.random.default_rng(3).integers(1, 255, 512).astype(np.uint8)
    sizes = (16, 8, 4)
    outputs = [_zeros(32 * n, "u1") for n in sizes] + [_zeros(1, "i4")]
    *got, aligned = run("copies", 32, [x], outputs)
    for n, y in zip(sizes, got, strict=True):
        expected = x[: 32 * n].reshape(32, n).copy()
        expected[1::2] = 0  # valid = 0: zeros, not what was there
        np.testing.assert_array_equal(y, expected.ravel())
    assert aligned[0] == 1


def test_copies_are_counted(probe_folder: Path) -> None:
    """A barrier that every thread's copies arrive at is over when all of them are there."""
    import cupy

    rounds, threads = 11, 64
    x = np.random.default_rng(5).integers(0, 256, (rounds, threads, 16), np.uint8)
    y = cupy.zeros((rounds, threads, 16), "u1")
    arguments = (cupy.asarray(x), np.int32(rounds), y)
    Probe("cp_async").module.get_function("counted")((1,), (threads,), arguments)
    np.testing.assert_array_equal(cupy.asnumpy(y), np.roll(x, -1, axis=1))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_wmma(probe_folder: Path, dtype: type) -> None:
    run = Probe("wmma")
    rng = np.random.default_rng(4)
    # Small integers: every product and sum is exact, so any slip of layout shows.
    a, b = (rng.integers(-8, 8, (16, 16)).astype(dtype) for _ in range(2))
    c = rng.integers(-100, 100, (16, 16)).astype(np.float32)
    name = "products_half" if dtype is np.float16 else "products_bfloat16"
    inputs = [a.view(np.uint16), b.view(np.uint16), c]
    row, col, direct = run(name, 32, inputs, [np.zeros((16, 16), "f4") for _ in range(3)])
    a32, b32 = a.astype(np.float32), b.astype(np.float32)
    np.testing.assert_array_equal(row, a32 @ b32 + c)
    np.testing.assert_array_equal(col, a32 @ b32.T + 0.5)
    np.testing.assert_array_equal(direct, col)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("columns", [16, 96, 128])
def test_mma_and_ldmatrix(probe_folder: Path, dtype: type, columns: int) -> None:
    run = Probe("mma")
    rng = np.random.default_rng(6)
    a, b = (rng.integers(-8, 8, (16, 16)).astype(dtype) for _ in range(2))
    c = rng.integers(-100, 100, (16, 16)).astype(np.float32)
    name = "products_half" if dtype is np.float16 else "products_bfloat16"
    inputs = [np.array([columns], np.int32), a.view(np.uint16), b.view(np.uint16), c]
    row, col = run(name, 32, inputs, [np.zeros((16, 16), "f4") for _ in range(2)])
    a32, b32 = a.astype(np.float32), b.astype(np.float32)
    np.testing.assert_array_equal(row, a32 @ b32 + c)
    np.testing.assert_array_equal(col, a32 @ b32.T + c)


def test_split_tf32(probe_folder: Path) -> None:
    rng = np.random.default_rng(7)
    exact = (rng.integers(-2047, 2048, 4096) * 2.0 ** rng.integers(-60, 60, 4096)).astype("f4")
    special = np.array([np.inf, -np.inf, np.nan, -np.nan], np.float32)
    payload = np.array([0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)  # NaN, as computed
    normal = rng.standard_normal(65536 - 4096 - 6, np.float32)
    x = np.concatenate([normal, exact, special, payload])
    words = Probe("convert")("split", 65536, [x], [_zeros(65536, "u4") for _ in range(2)])
    hi = words[0].view(np.float32)
    assert not (words[0] & 0x1FFF).any(), "hi is a tf32"
    same = slice(normal.size, normal.size + exact.size)
    np.testing.assert_array_equal(hi[same], exact)
    np.testing.assert_array_equal(hi[-6:], x[-6:])
    cut = (words[1] & 0xFFFFE000).view(np.float32)  # what the tensor cores read of lo
    np.testing.assert_array_equal(cut[same], 0)
    assert np.isnan(cut[-6:]).all(), "lo counts only where hi is finite"
    x, hi, cut = (part[: normal.size].astype(np.float64) for part in (x, hi, cut))
    assert np.max(np.abs(hi + cut - x) / np.abs(x)) < 2.0**-22
    assert np.max(np.abs(cut / x)) <= 2.0**-11
    assert abs(np.mean(cut / x)) < 2.0**-15, "of both signs"


def test_mma_tf32(probe_folder: Path) -> None:
    rng = np.random.default_rng(8)
    a, b, c = (rng.integers(-8, 8, (n, 8)).astype(np.float32) for n in (16, 8, 16))
    (d,) = Probe("mma_tf32")("product_tf32", 32, [a, b, c], [np.zeros((16, 8), "f4")])
    np.testing.assert_array_equal(d, a @ b + c)


def _products_f32(q: np.ndarray, k: np.ndarray, p: np.ndarray, v: np.ndarray) -> list:
    """S = Q K^T and O = P V by the tiles of mma_tf32_tile.cuh."""
    inputs = [q, k, p, v, np.int32(len(k))]
    outputs = [np.zeros((32, len(k)), "f4"), np.zeros(q.shape, "f4")]
    return Probe("mma_tf32")(f"products_{q.shape[1]}", 32, inputs, outputs)


def _assert_fp32_accurate(x: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """An entry of a b may err in the last bits of the sum of its terms' magnitudes."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    assert np.max(np.abs(x - a @ b) / (np.abs(a) @ np.abs(b))) < 1e-6


@pytest.mark.parametrize("depth", [48, 64])
def test_products_of_fp32(probe_folder: Path, depth: int) -> None:
    rng = np.random.default_rng(9)
    q, k, v = (rng.standard_normal((n, depth), np.float32) for n in (32, 96, 96))
    p = rng.random((32, 96), np.float32)
    s, o = _products_f32(q, k, p, v)
    _assert_fp32_accurate(s, q, k.T)
    _assert_fp32_accurate(o, p, v)
    # Over many keys of one sign, truncated sums would drift by 1e-5.
    k, v = (rng.random((4096, depth), np.float32) for _ in range(2))
    p = rng.random((32, 4096), np.float32)
    s, o = _products_f32(np.abs(q), k, p, v)
    _assert_fp32_accurate(s, np.abs(q), k.T)
    _assert_fp32_accurate(o, p, v)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_products_of_what_is_not_finite(probe_folder: Path, value: float) -> None:
    rng = np.random.default_rng(10)
    q, k, v = (rng.standard_normal((n, 64), np.float32) for n in (32, 32, 32))
    p = rng.random((32, 32), np.float32)
    q[5, 3] = k[17, 40] = v[30, 9] = value
    s, o = _products_f32(q, k, p, v)
    with np.errstate(invalid="ignore"):
        expected_s, expected_o = q @ k.T, p @ v
    for got, expected in ((s, expected_s), (o, expected_o)):
        bad = ~np.isfinite(expected)
        assert bad.any() and not bad.all()
        np.testing.assert_array_equal(np.where(bad, got, 0), np.where(bad, expected, 0))
        np.testing.assert_allclose(got[~bad], expected[~bad], atol=2e-5)


def test_lane_offsets_of_fp32(probe_folder: Path) -> None:
    got = Probe("mma_tf32")("offsets_64", 32, [], [_zeros(32, "u4") for _ in range(3)])
    for offsets, expected in zip(got, lane_offsets_f32(64 + 4), strict=True):
        np.testing.assert_array_equal(offsets, expected)


def test_accumulator_rows(probe_folder: Path) -> None:
    run = Probe("wmma")
    rng = np.random.default_rng(5)
    c = rng.standard_normal((16, 16)).astype(np.float32)
    factor = rng.standard_normal(16).astype(np.float32)
    (out,) = run("scaled_rows", 32, [c, factor], [np.zeros((16, 16), "f4")])
    np.testing.assert_array_equal(out, c * factor[:, None])
