"""The wrappers of Hopper's instructions, alone, against known answers.

Matrix products of operands in swizzled shared memory, copies of a tensor's boxes, barriers that
count. They run on a GPU of capability 9.0.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cases_ptx_sm90 import (
    MAX_BOX,
    PRODUCTS,
    WARPGROUP,
    a_registers,
    accumulator_places,
    as_it_lands,
)

from flashcore_cupy.jit import compiler

SHARED = 1024 + 64 * 128 * 2 + 256 * 128 * 2
"""Bytes for any probe of a product: to align, a, and b 128 deep."""


class Probe:
    """Launches a probe's kernels, one block unless told."""

    def __init__(self, name: str) -> None:
        self.module = compiler.load(compiler.compile_kernel(f"probe_{name}.cu", {}, "sm_90a"))

    def launch(
        self, kernel: str, threads: int, arguments: Iterable, shared: int = 0, blocks: int = 1
    ) -> None:
        function = self.module.get_function(kernel)
        if shared:
            compiler.allow_shared_memory(function, shared)
        function((blocks,), (threads,), tuple(arguments), shared_mem=shared)


@pytest.fixture
def hopper(probe_folder: object) -> None:
    """Skips where the GPU is of another generation."""
    import cupy

    capability = cupy.cuda.Device().compute_capability
    if capability != "90":
        pytest.skip(f"needs a GPU of capability 9.0, this one has {capability}")


def _products() -> list:
    """(form, type, swizzle, how b is stored, N, depth): SS over one panel, and over several."""
    depths = {128: (64, 128), 64: (32, 96), 32: (16, 80)}
    cases = []
    for form, dtype, swizzle, way, n in PRODUCTS:
        for depth in depths[int(swizzle)] if form == "SS" else (64,):
            cases.append((form, dtype, int(swizzle), way, int(n), depth))
    return cases


@pytest.mark.parametrize(("form", "dtype", "swizzle", "way", "n", "depth"), _products())
def test_wgmma(
    hopper: None, form: str, dtype: str, swizzle: int, way: str, n: int, depth: int
) -> None:
    import cupy

    rng = np.random.default_rng([swizzle, n, depth])
    numpy_type = np.float16 if dtype == "half_t" else ml_dtypes.bfloat16
    # Small integers: every product and sum is exact, so any slip of layout shows.
    a, b = (rng.integers(-8, 9, (rows, depth)).astype("f4") for rows in (64, n))
    c = rng.integers(-100, 101, (64, n)).astype(np.float32)
    bits_a, bits_b = (x.astype(numpy_type).view(np.uint16) for x in (a, b))
    given_a = cupy.asarray(bits_a if form == "SS" else a_registers(bits_a))
    given_b = cupy.asarray(np.ascontiguousarray(bits_b if way == "rows" else bits_b.T))
    rows, cols = accumulator_places(n)
    run, kernel = Probe("wgmma"), f"{form.lower()}_{dtype}_{swizzle}_{way}_{n}"
    for accumulate in (False, True):
        before = c if accumulate else np.full_like(c, np.nan)
        d = cupy.asarray(np.ascontiguousarray(before[rows, cols]))
        arguments = [given_a, given_b, np.int32(depth), np.int32(accumulate), d]
        run.launch(kernel, WARPGROUP, arguments, SHARED)
        got = np.full_like(c, np.nan)
        got[rows, cols] = cupy.asnumpy(d)
        np.testing.assert_array_equal(got, a @ b.T + c * accumulate, f"{accumulate=}")


def test_registers_change_hands(hopper: None) -> None:
    import cupy

    x = np.random.default_rng(1).integers(-100, 101, 384).astype(np.float32)
    y = cupy.full(384, np.nan, "f4")
    Probe("wgmma").launch("shared_out", 384, [cupy.asarray(x), y])
    np.testing.assert_array_equal(cupy.asnumpy(y), 8128 * x)


def test_barrier_phases(hopper: None) -> None:
    import cupy

    passed = cupy.full(9, -1, "i4")
    Probe("mbarrier").launch("phases", 1, [passed])
    # Of each phase: parity 0, parity 1, and its own parity when one of two has arrived.
    expected = [[0, 1, 0], [1, 0, 0], [0, 1, 0]]
    np.testing.assert_array_equal(cupy.asnumpy(passed).reshape(3, 3), expected)


def test_hand_over(hopper: None) -> None:
    import cupy

    rounds = 10
    x = np.random.default_rng(2).integers(1, 2**31, rounds, np.int32)
    y = cupy.zeros((rounds, WARPGROUP), "i4")
    arguments = [cupy.asarray(x), np.int32(rounds), y]
    Probe("mbarrier").launch("hand_over", WARPGROUP + 32, arguments)
    np.testing.assert_array_equal(cupy.asnumpy(y), np.repeat(x[:, None], WARPGROUP, 1))


def test_named_barriers_take_turns(hopper: None) -> None:
    import cupy

    rounds = 10
    order = cupy.full(2 * rounds, -1, "i4")
    Probe("mbarrier").launch("turns", 2 * WARPGROUP, [np.int32(rounds), order])
    np.testing.assert_array_equal(cupy.asnumpy(order), [0, 1] * rounds)


def test_one_lane_is_elected(hopper: None) -> None:
    import cupy

    elected = cupy.full(WARPGROUP, -1, "i4")
    Probe("tma").launch("elections", WARPGROUP, [elected])
    got = cupy.asnumpy(elected).reshape(-1, 32)
    assert set(got.ravel()) == {0, 1}
    np.testing.assert_array_equal(got.sum(1), 1)


def _encode_tensor_map(x: Any, swizzle: int, box_rows: int) -> np.ndarray:
    """The 128 bytes that describe a (B, H, S, D) fp16 array, in boxes of box_rows rows of swizzle
    bytes.
    """
    driver = pytest.importorskip("cuda.bindings.driver")

    def sizes(number: type, values: Sequence[int]) -> list:
        return [number(value) for value in values]

    error, encoded = driver.cuTensorMapEncodeTiled(
        driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        4,
        x.data.ptr,
        sizes(driver.cuuint64_t, x.shape[::-1]),
        sizes(driver.cuuint64_t, x.strides[2::-1]),
        sizes(driver.cuuint32_t, (swizzle // 2, box_rows, 1, 1)),
        sizes(driver.cuuint32_t, (1, 1, 1, 1)),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        getattr(driver.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{swizzle}B"),
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    assert error == driver.CUresult.CUDA_SUCCESS, error
    opaque = np.frombuffer(ctypes.string_at(encoded.getPtr(), 128), np.uint64)
    struct = np.zeros((), [("opaque", np.uint64, 16)])
    struct["opaque"] = opaque
    return struct


def _box(x: np.ndarray, at: Sequence[int], rows: int, cols: int) -> np.ndarray:
    """The box at (column, row, head, batch): zeros outside of the tensor."""
    box = np.zeros((rows, cols), x.dtype)
    column, row, head, batch = at
    if 0 <= head < x.shape[1] and 0 <= batch < x.shape[0]:
        for r in range(rows):
            for c in range(cols):
                if 0 <= row + r < x.shape[2] and 0 <= column + c < x.shape[3]:
                    box[r, c] = x[batch, head, row + r, column + c]
    return box


BOXES = [
    (128, 32, (0, 0, 0, 0)),
    (128, 32, (8, 7, 2, 1)),
    (128, 32, (64, 16, 1, 1)),  # 16 of 64 columns
    (128, 32, (0, 32, 1, 0)),  # 18 of 32 rows
    (128, 32, (0, -5, 1, 1)),
    (128, 32, (-8, 0, 0, 1)),
    (128, 32, (-24, -31, 0, 0)),
    (128, 176, (64, -3, 2, 0)),  # more on both sides
    (128, 256, (0, 0, 1, 1)),
    (128, 80, (0, 50, 1, 1)),  # nothing of the tensor
    (128, 16, (80, 0, 1, 0)),
    (128, 16, (0, 0, 3, 0)),
    (128, 16, (0, 0, 0, 2)),
    (128, 16, (0, 0, -1, 1)),
    (64, 64, (64, 8, 1, 0)),
    (64, 64, (32, -8, 1, 1)),
    (32, 128, (64, -70, 2, 1)),
    (32, 16, (32, 8, 0, 1)),
]


@pytest.mark.parametrize("hint", [0, 1, 2])
@pytest.mark.parametrize(("swizzle", "rows", "at"), BOXES)
def test_tma(hopper: None, swizzle: int, rows: int, at: tuple, hint: int) -> None:
    import cupy

    # The tensor is the inside of an array whose other elements must never be seen.
    whole = np.full((2, 3, 60, 96), np.nan, np.float16)
    inside = (slice(None), slice(None), slice(4, 54), slice(8, 88))
    values = np.random.default_rng(3).standard_normal(whole[inside].shape)
    whole[inside] = values.astype(np.float16)
    on_gpu = cupy.asarray(whole)
    encoded = _encode_tensor_map(on_gpu[inside], swizzle, rows)
    words, state = cupy.zeros(MAX_BOX // 4, "u4"), cupy.zeros(2, "u4")
    numbers = [np.int32(number) for number in (*at, rows * swizzle, hint)]
    Probe("tma").launch("load_box", 128, [encoded, *numbers, words, state])
    assert state.tolist() == [0, 1], "an aligned place, and all bytes came"
    expected = as_it_lands(_box(whole[inside], at, rows, swizzle // 2), swizzle)
    np.testing.assert_array_equal(cupy.asnumpy(words).view(np.uint8), expected)


@pytest.mark.parametrize(("swizzle", "rows", "at"), [box for box in BOXES if min(box[2]) >= 0])
def test_tma_store(hopper: None, swizzle: int, rows: int, at: tuple) -> None:
    import cupy

    # What is not of the tensor, all around it, stays as it is. Unlike a load, a store with a
    # coordinate below 0 is an illegal instruction.
    expected = np.full((2, 3, 60, 96), np.nan, np.float16)
    inside = (slice(None), slice(None), slice(4, 54), slice(8, 88))
    on_gpu = cupy.asarray(expected)
    box = np.random.default_rng(4).standard_normal((rows, swizzle // 2)).astype(np.float16)
    tensor = expected[inside]
    column, row, head, batch = at
    if 0 <= head < tensor.shape[1] and 0 <= batch < tensor.shape[0]:
        for r in range(min(rows, tensor.shape[2] - row)):
            for c in range(min(swizzle // 2, tensor.shape[3] - column)):
                tensor[batch, head, row + r, column + c] = box[r, c]
    words = cupy.asarray(as_it_lands(box, swizzle).view("u4"))
    encoded = _encode_tensor_map(on_gpu[inside], swizzle, rows)
    Probe("tma").launch("store_box", 128, [encoded, *map(np.int32, at), words])
    np.testing.assert_array_equal(cupy.asnumpy(on_gpu), expected)


def test_stmatrix(hopper: None) -> None:
    import cupy

    registers = np.arange(32 * 4 * 2, dtype=np.uint16).reshape(32, 4, 2)
    blocks = cupy.zeros((4, 8, 16), "u2")
    Probe("tma").launch("store_matrices", 32, [cupy.asarray(registers.view("u4")), blocks])
    got = cupy.asnumpy(blocks)
    for lane in range(32):
        for block in range(4):
            pair = got[block, lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2]
            np.testing.assert_array_equal(pair, registers[lane, block])
    np.testing.assert_array_equal(got[:, :, 8:], 0xABAB)


@pytest.mark.parametrize("late", range(-1, 4))
def test_clusters_read_each_others_memory(hopper: None, late: int) -> None:
    """Whoever of four is late; two rounds in the same place, and a warp that has ended."""
    import cupy

    blocks, size, threads = 12, 4, 64
    x = np.arange(blocks * threads, dtype=np.float32).reshape(blocks, threads)
    rank = cupy.full(blocks, -1, "i4")
    four = cupy.full((2, blocks, size, threads, 4), np.nan, "f4")
    two = cupy.full((2, blocks, size, threads, 2), np.nan, "f4")
    arguments = [cupy.asarray(x), np.int32(late), rank, four, two]
    Probe("cluster").launch("exchange", threads, arguments, blocks=blocks)
    np.testing.assert_array_equal(rank.get(), np.arange(blocks) % size)
    for number in range(2):
        for block in range(blocks):
            peers = x[block // size * size :][:size, :, None] + 1000.0 * number
            np.testing.assert_array_equal(four.get()[number, block], peers + np.arange(4) / 4)
            np.testing.assert_array_equal(two.get()[number, block], peers * [-1.0, 1.0])
