"""Every wrapper of an instruction, alone, against known answers.

The probes compile for every target anywhere; they run where there is a GPU.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from conftest import ROOT, compiler_skip_reason

from flashcore_cupy import jit, tiles

PROBES = sorted((ROOT / "tests" / "probes").glob("*.cu"))
HEADERS = sorted((ROOT / "kernels" / "flashcore").glob("ptx_*.cuh"))
WRAPPER = re.compile(r"__device__ (?:__forceinline__ )?[\w<>:]+ (\w+)\(")


@pytest.fixture
def probe_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of kernels/ with the probes beside the entry files, so that jit compiles them."""
    if reason := compiler_skip_reason():
        pytest.skip(reason)
    folder = tmp_path / "kernels"
    shutil.copytree(ROOT / "kernels", folder)
    for probe in PROBES:
        shutil.copy(probe, folder / f"probe_{probe.name}")
    monkeypatch.setenv("FLASHCORE_KERNELS_DIR", str(folder))
    return folder


def test_every_wrapper_has_a_probe() -> None:
    probes = "".join(path.read_text() for path in PROBES)
    wrappers = {name for header in HEADERS for name in WRAPPER.findall(header.read_text())}
    assert len(wrappers) > 20
    missing = sorted(name for name in wrappers if not re.search(rf"\b{name}\b", probes))
    assert not missing, f"no probe in tests/probes/ uses {missing}"


@pytest.mark.parametrize("arch", tiles.TARGETS)
def test_probes_compile(probe_folder: Path, arch: str) -> None:
    for probe in PROBES:
        if probe.name in ("cp_async.cu", "mma.cu") and tiles.capability(arch) < 80:
            continue  # the instructions do not exist there
        compiled = jit.compile_kernel(f"probe_{probe.name}", {}, arch)
        assert compiled.entries


class Probe:
    """Launches a probe's kernels on the GPU."""

    def __init__(self, name: str) -> None:
        compiled = jit.compile_kernel(f"probe_{name}.cu", {}, jit.device_arch())
        self.module = jit.load(compiled)

    def __call__(self, kernel: str, threads: int, inputs: list, outputs: list) -> list:
        import cupy

        grid, block = -(-threads // 256), min(threads, 256)
        arrays = [cupy.asarray(x) for x in inputs] + [cupy.asarray(x) for x in outputs]
        self.module.get_function(kernel)((grid,), (block,), tuple(arrays))
        return [cupy.asnumpy(x) for x in arrays[len(inputs) :]]


def _zeros(n: int, dtype: object) -> np.ndarray:
    return np.zeros(n, dtype)


@pytest.mark.gpu
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


@pytest.mark.gpu
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


@pytest.mark.gpu
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


@pytest.mark.gpu
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


@pytest.mark.gpu
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


@pytest.mark.gpu
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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_mma_and_ldmatrix(probe_folder: Path, dtype: type) -> None:
    run = Probe("mma")
    rng = np.random.default_rng(6)
    a, b = (rng.integers(-8, 8, (16, 16)).astype(dtype) for _ in range(2))
    c = rng.integers(-100, 100, (16, 16)).astype(np.float32)
    name = "products_half" if dtype is np.float16 else "products_bfloat16"
    inputs = [a.view(np.uint16), b.view(np.uint16), c]
    row, col = run(name, 32, inputs, [np.zeros((16, 16), "f4") for _ in range(2)])
    a32, b32 = a.astype(np.float32), b.astype(np.float32)
    np.testing.assert_array_equal(row, a32 @ b32 + c)
    np.testing.assert_array_equal(col, a32 @ b32.T + c)


@pytest.mark.gpu
def test_accumulator_rows(probe_folder: Path) -> None:
    run = Probe("wmma")
    rng = np.random.default_rng(5)
    c = rng.standard_normal((16, 16)).astype(np.float32)
    factor = rng.standard_normal(16).astype(np.float32)
    (out,) = run("scaled_rows", 32, [c, factor], [np.zeros((16, 16), "f4")])
    np.testing.assert_array_equal(out, c * factor[:, None])
