"""ptx/convert.cuh: every 16-bit number, floats at every edge of a rounding."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from probe import Emulator, Launch, Probe, Probes, assert_same_bits, needs_emulator

from flashcore_cupy.cpu.emulator.run import Schedule

NAN = np.uint32(0x7FFFFFFF)
"""What the GPU makes of every NaN that it computes or converts; of 16 bits it is 0x7fff."""
EVERY_16 = np.arange(65536, dtype=np.uint16)
MIN_NORMAL = np.float32(2.0**-126)


def edge_floats() -> np.ndarray:
    """Of each sign and exponent, fractions on and beside all ties; and random bits. All kinds."""
    ones = np.uint32(1) << np.arange(24, dtype=np.uint32)
    ends = np.unique(np.concatenate([ones, 3 * ones, [0, 0x7FFFFF, 0x400000, 0x555555, 0x2AAAAA]]))
    fractions = np.unique(np.concatenate([ends - 1, ends, ends + 1]) & 0x7FFFFF).astype(np.uint32)
    upper = np.arange(512, dtype=np.uint32) << np.uint32(23)
    edges = (upper[:, None] | fractions).ravel()
    count = -edges.size % 256 + 2**15
    return np.concatenate([edges, _random_bits(count)]).view(np.float32)


def _random_bits(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2**32, count, np.uint32)


FLOATS = edge_floats()


def convert(run: Probe, kernel: str, inputs: list, *dtypes: str) -> list:
    """The kernel on every element, on all machines."""
    n = inputs[0].size
    threads = min(n, 256)
    launch = Launch(kernel, threads, n // threads)
    return run(launch, inputs, [np.full(n, 0x55, dtype) for dtype in dtypes])


def canonical(x: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(x), NAN.view(np.float32), x)


def narrowed(x: np.ndarray, dtype: type) -> np.ndarray:
    """The bits of x in a 16-bit type."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.where(np.isnan(x), 0x7FFF, x.astype(dtype).view(np.uint16)).astype(np.uint16)


def test_floats_stay_as_they_are(probe: Probes) -> None:
    assert_same_bits(*convert(probe("convert"), "unchanged", [FLOATS], "f4"), FLOATS)


def test_halves_and_bfloat16_to_float(probe: Probes) -> None:
    half, bfloat16 = convert(probe("convert"), "widen", [EVERY_16], "f4", "f4")
    assert_same_bits(half, canonical(EVERY_16.view(np.float16).astype(np.float32)))
    assert_same_bits(bfloat16, (EVERY_16.astype(np.uint32) << 16).view(np.float32))


@pytest.mark.parametrize(
    ("dtype", "kernel"), [(np.float16, "narrow_half"), (ml_dtypes.bfloat16, "narrow_bfloat16")]
)
def test_float_to_16_bits(probe: Probes, dtype: type, kernel: str) -> None:
    other = FLOATS[::-1].copy()
    one, two = convert(probe("convert"), kernel, [FLOATS, other], "u2", "u4")
    low, high = narrowed(FLOATS, dtype), narrowed(other, dtype)
    assert_same_bits(one, low)
    assert_same_bits(two, low | high.astype(np.uint32) << 16)


def e4m3_to_half(pairs: np.ndarray, *, keeps_sign_of_nan: bool) -> np.ndarray:
    """Both halves of 32 bits, as bits."""
    eighths = pairs.view(np.uint8)
    half = eighths.view(ml_dtypes.float8_e4m3fn).astype(np.float16).view(np.uint16)
    sign = (eighths.astype(np.uint16) & 0x80) << 8
    nan = 0x7FFF | sign * keeps_sign_of_nan
    return np.where(eighths & 0x7F == 0x7F, nan, half).astype(np.uint16).view(np.uint32)


def test_e4m3_to_16_bits(probe: Probes) -> None:
    run = probe("convert")
    native, shifted, half, low = convert(run, "widen_e4m3", [EVERY_16], "u4", "u4", "u4", "f4")
    has_instruction = all(run.capability(machine) >= 89 for machine in run.machines)
    assert_same_bits(shifted, e4m3_to_half(EVERY_16, keeps_sign_of_nan=True))
    assert_same_bits(native, e4m3_to_half(EVERY_16, keeps_sign_of_nan=not has_instruction))
    assert_same_bits(half, native)
    values = EVERY_16.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert_same_bits(low, canonical(values[::2]))
    (bfloat16,) = convert(run, "widen_e4m3_bfloat16", [EVERY_16], "u4")
    assert_same_bits(bfloat16, narrowed(values, ml_dtypes.bfloat16).view(np.uint32))


@needs_emulator
def test_e4m3_to_16_bits_without_the_instruction() -> None:
    run = Probe({"emulator": Emulator("convert", "sm_80", Schedule())})
    native, shifted, *_ = convert(run, "widen_e4m3", [EVERY_16], "u4", "u4", "u4", "f4")
    assert_same_bits(native, shifted)


def test_float_to_e4m3(probe: Probes) -> None:
    """To nearest even; beyond 448, the largest, it stays there; infinities and NaN become NaN."""
    grid = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    ties = (grid[1:] + grid[:-1]) / 2
    places = np.concatenate([grid, ties, [448.1, 464, 464.1, 480, 1e9]]).astype(np.float32)
    x = np.concatenate([f(places) for f in (np.copy, _next_up, _next_down)])
    x = np.concatenate([x, -x, FLOATS])
    x = np.concatenate([x, FLOATS[: -x.size % 256]])
    (got,) = convert(probe("convert"), "narrow_e4m3", [x], "u1")
    with np.errstate(invalid="ignore"):
        expected = np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    sign = (x.view(np.uint32) >> 24 & 0x80).astype(np.uint8)
    assert_same_bits(got, np.where(np.isfinite(x), expected, 0x7F | sign))


def _next_up(x: np.ndarray) -> np.ndarray:
    return np.nextafter(x, np.float32(np.inf))


def _next_down(x: np.ndarray) -> np.ndarray:
    return np.nextafter(x, np.float32(-np.inf))


def test_products_are_rounded_before_a_subtraction(probe: Probes) -> None:
    x, y = FLOATS, np.random.default_rng(3).permutation(FLOATS)
    with np.errstate(all="ignore"):
        finite = np.isfinite(x * y)  # the bits of a NaN's difference are the machine's own affair
        x, y = (np.where(finite, factor, np.float32(1)) for factor in (x, y))
        expected = x * y
    product, left = convert(probe("convert"), "rounded_product", [x, y, expected], "f4", "f4")
    assert_same_bits(product, canonical(expected))
    assert_same_bits(left, np.zeros_like(x))
    with np.errstate(all="ignore"):
        exact = x.astype(np.float64) * y
    assert np.count_nonzero(exact - expected) > 10000, "a multiply-add leaves these"


def ulps(got: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """How many floats further, of two of the same sign."""
    assert_same_bits(np.signbit(got), np.signbit(expected))
    return np.abs(got.view(np.int32).astype(np.int64) - expected.view(np.int32))


def flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < MIN_NORMAL, np.copysign(np.float32(0), x), x)


@pytest.mark.parametrize(
    ("kernel", "exact", "limit"),
    [("exponential", np.exp2, 2), ("reciprocal", np.reciprocal, 1)],
)
def test_approximations(probe: Probes, kernel: str, exact: np.ufunc, limit: int) -> None:
    """So many floats next to the right one, as the PTX ISA has it; the special values exactly."""
    spread = np.linspace(-150, 130, 2**16, dtype=np.float32)
    wholes = np.arange(-160, 160, dtype=np.float32)
    x = np.concatenate([FLOATS, spread, wholes])
    x = np.concatenate([x, FLOATS[: -x.size % 256]])
    with np.errstate(all="ignore"):
        value = exact(flushed(x).astype(np.float64))
        expected = flushed(value.astype(np.float32))
        # Next to the smallest normal number, a result may be that one or be flushed.
        at_the_edge = np.abs(np.abs(value) / MIN_NORMAL - 1) < limit * 2.0**-23
        at_the_edge &= np.abs(value) != MIN_NORMAL
    regular = (expected != 0) & np.isfinite(expected) & ~at_the_edge
    launch = Launch(kernel, 256, x.size // 256)
    results = probe("convert").each(launch, [x], [np.full(x.size, np.nan, "f4")])
    for machine, (y,) in results.items():
        rest = ~regular & ~at_the_edge
        assert_same_bits(y[rest], canonical(expected[rest]), machine)
        further = ulps(y[regular], expected[regular])
        print(
            f"figure: {kernel}, {machine}: {further.max()} ulp at most, {further.mean():.3f} mean"
        )
        assert further.max() <= limit
        edge = at_the_edge & (y != 0)
        assert (np.abs(np.abs(y[edge]) / MIN_NORMAL - 1) <= limit * 2.0**-23).all()


def test_bytes(probe: Probes) -> None:
    numbers = np.arange(256, dtype=np.uint8)
    (y,) = convert(probe("convert"), "widen_bytes", [numbers], "f4")
    assert_same_bits(y, numbers.astype(np.float32))


def test_bytes_in_turn(probe: Probes) -> None:
    a, b = np.random.default_rng(16).integers(0, 2**32, (2, 256), np.uint32)
    (y,) = convert(probe("convert"), "interleave", [a, b], "u4")
    taken = np.stack([a.view("u1").reshape(-1, 4)[:, :2], b.view("u1").reshape(-1, 4)[:, :2]], -1)
    assert_same_bits(y, taken.reshape(-1).view("u4"))


def test_split_tf32(probe: Probes) -> None:
    rng = np.random.default_rng(7)
    exact = (rng.integers(-2047, 2048, 4096) * 2.0 ** rng.integers(-60, 60, 4096)).astype("f4")
    normal = rng.standard_normal(2**16, np.float32)
    x = np.concatenate([normal, exact, FLOATS])
    hi, lo = convert(probe("convert"), "split", [x], "u4", "u4")
    with np.errstate(all="ignore"):
        power = (x.view(np.uint32) & np.uint32(0xFF800000)).view(np.float32).astype(np.float64)
        rounded = canonical((power / 2048 + x).astype(np.float32)).view(np.uint32)
        expected = (rounded & np.uint32(0xFFFFE000)).view(np.float32)
        assert_same_bits(hi, expected.view(np.uint32))
        assert_same_bits(lo, canonical(x - expected).view(np.uint32))
    same = slice(normal.size, normal.size + exact.size)
    np.testing.assert_array_equal(hi[same].view(np.float32), exact)
    cut = (lo & np.uint32(0xFFFFE000)).view(np.float32)  # what the tensor cores read of lo
    np.testing.assert_array_equal(cut[same], 0)
    assert np.isnan(cut[~np.isfinite(x)]).all(), "lo counts only where hi is finite"
    x, cut = (part[: normal.size].astype(np.float64) for part in (x, cut))
    split = expected[: normal.size] + cut
    assert np.max(np.abs(split - x) / np.abs(x)) < 2.0**-22
    assert np.max(np.abs(cut / x)) <= 2.0**-11
    assert abs(np.mean(cut / x)) < 2.0**-15, "of both signs"
