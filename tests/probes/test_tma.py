"""ptx/tma.cuh: boxes of a tensor, to shared memory and back; and stmatrix, elections."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from cases_ptx_sm90 import MAX_BOX, as_it_lands
from probe import Launch, Map, Probes, assert_same_bits

SHARED = MAX_BOX + 8
#: The tensor is the inside of an array whose other elements must never be seen.
WHOLE = (2, 3, 60, 96)
INSIDE = (slice(None), slice(None), slice(4, 54), slice(8, 88))


def box_of(x: np.ndarray, at: Sequence[int], shape: tuple[int, int, int]) -> np.ndarray:
    """The box (heads, rows, columns) at (column, row, head, batch): zeros outside of the tensor."""
    column, row, head, batch = at
    box = np.zeros(shape, x.dtype)
    for place in np.ndindex(shape):
        h, r, c = place[0] + head, place[1] + row, place[2] + column
        if all(0 <= i < n for i, n in zip((batch, h, r, c), x.shape, strict=True)):
            box[place] = x[batch, h, r, c]
    return box


#: Bytes of a row, which are those of the swizzle; rows; heads; the box's place.
BOXES = [
    (128, 32, 1, (0, 0, 0, 0)),
    (128, 32, 1, (8, 7, 2, 1)),
    (128, 32, 1, (64, 16, 1, 1)),  # 16 of 64 columns
    (128, 32, 1, (0, 32, 1, 0)),  # 18 of 32 rows
    (128, 32, 1, (0, -5, 1, 1)),
    (128, 32, 1, (-8, 0, 0, 1)),
    (128, 32, 1, (-24, -31, 0, 0)),
    # (Elsewhere than at a multiple of 16 bytes it is an illegal instruction on an H100.)
    (128, 176, 1, (64, -3, 2, 0)),  # more on both sides
    (128, 256, 1, (0, 0, 1, 1)),
    (128, 80, 1, (0, 50, 1, 1)),  # nothing of the tensor
    (128, 16, 1, (80, 0, 1, 0)),
    (128, 16, 1, (0, 0, 3, 0)),
    (128, 16, 1, (0, 0, 0, 2)),
    (128, 16, 1, (0, 0, -1, 1)),
    (128, 16, 2, (16, 3, 0, 1)),
    (128, 8, 4, (0, 48, -1, 0)),  # one head before the first, none after the last
    (128, 1, 3, (0, 20, 0, 1)),
    (64, 64, 1, (64, 8, 1, 0)),
    (64, 64, 1, (32, -8, 1, 1)),
    (64, 16, 3, (56, 40, 1, 0)),
    (32, 128, 1, (64, -70, 2, 1)),
    (32, 16, 1, (32, 8, 0, 1)),
]


def tensor(seed: int) -> np.ndarray:
    whole = np.full(WHOLE, np.nan, np.float16)
    values = np.random.default_rng(seed).standard_normal(whole[INSIDE].shape)
    whole[INSIDE] = values.astype(np.float16)
    return whole


@pytest.mark.parametrize("hint", [0, 1, 2])
@pytest.mark.parametrize(("swizzle", "rows", "heads", "at"), BOXES)
def test_load(probe: Probes, swizzle: int, rows: int, heads: int, at: tuple, hint: int) -> None:
    whole = tensor(3)
    numbers = [np.int32(number) for number in (*at, 1, 0, heads * rows * swizzle, hint)]
    inputs = [Map(whole, INSIDE, swizzle, rows, heads), *numbers]
    outputs = [np.zeros(MAX_BOX // 4, "u4"), np.zeros(2, "u4")]
    words, state = probe("tma")(Launch("load_boxes", 128, shared=SHARED), inputs, outputs)
    assert state.tolist() == [0, 1], "an aligned place, and all bytes came"
    box = box_of(whole[INSIDE], at, (heads, rows, swizzle // 2))
    assert_same_bits(words.view(np.uint8), as_it_lands(box.reshape(-1, swizzle // 2), swizzle))


@pytest.mark.parametrize("step", [-1, 0, 1])
def test_loads_of_one_barrier(probe: Probes, step: int) -> None:
    """A barrier waits for the bytes of all boxes, those outside of the tensor included."""
    whole, rows, count, at = tensor(5), 16, 5, (8, 40, 1, 0)
    numbers = [np.int32(number) for number in (*at, count, step, rows * 128, 0)]
    outputs = [np.zeros(MAX_BOX // 4, "u4"), np.zeros(2, "u4")]
    launch = Launch("load_boxes", 128, shared=SHARED)
    words, state = probe("tma")(launch, [Map(whole, INSIDE, 128, rows), *numbers], outputs)
    assert state.tolist() == [0, 1]
    places = [(at[0], at[1], at[2] + i * step, at[3]) for i in range(count)]
    boxes = np.concatenate([box_of(whole[INSIDE], place, (1, rows, 64)) for place in places])
    assert_same_bits(words.view(np.uint8), as_it_lands(boxes.reshape(-1, 64), 128))


@pytest.mark.parametrize(
    ("swizzle", "rows", "heads", "at"), [box for box in BOXES if min(box[3]) >= 0]
)
def test_store(probe: Probes, swizzle: int, rows: int, heads: int, at: tuple) -> None:
    """What is not of the tensor, all around it, stays as it is.

    Unlike a load, a store with a coordinate below 0 is an illegal instruction.
    """
    before = np.full(WHOLE, np.nan, np.float16)
    expected, (column, row, head, batch) = before.copy(), at
    box = np.random.default_rng(4).standard_normal((heads, rows, swizzle // 2)).astype(np.float16)
    inside = expected[INSIDE][batch : batch + 1, head:, row:, column:]
    if inside.size:
        h, r, c = (min(sizes) for sizes in zip(inside.shape[1:], box.shape, strict=True))
        inside[0, :h, :r, :c] = box[:h, :r, :c]
    words = as_it_lands(box.reshape(-1, swizzle // 2), swizzle).view("u4")
    output = Map(before, INSIDE, swizzle, rows, heads)
    launch = Launch("store_box", 128, shared=SHARED)
    (after,) = probe("tma")(launch, [words, *map(np.int32, at)], [output])
    assert_same_bits(after, expected)


def test_stmatrix(probe: Probes) -> None:
    registers = np.random.default_rng(6).integers(0, 2**16, (32, 4, 2), np.uint16)
    launch = Launch("store_matrices", 32, shared=32 * 32)
    (got,) = probe("tma")(launch, [registers.view("u4")], [np.zeros((4, 8, 16), "u2")])
    for lane in range(32):
        for block in range(4):
            pair = got[block, lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2]
            assert_same_bits(pair, registers[lane, block])
    assert_same_bits(got[:, :, 8:], 0xABAB)


def test_stmatrix_transposed(probe: Probes) -> None:
    registers = np.random.default_rng(6).integers(0, 2**16, (32, 4, 2), np.uint16)
    launch = Launch("store_transposed", 32, shared=32 * 32)
    (got,) = probe("tma")(launch, [registers.view("u4")], [np.zeros((4, 8, 16), "u2")])
    for lane in range(32):
        for block in range(4):
            pair = got[block, lane % 4 * 2 : lane % 4 * 2 + 2, lane // 4]
            assert_same_bits(pair, registers[lane, block])
    assert_same_bits(got[:, :, 8:], 0xABAB)


def test_one_lane_is_elected(probe: Probes) -> None:
    """It is not said which."""
    results = probe("tma").each(Launch("elections", 128), [], [np.full(128, -1, "i4")])
    for machine, (elected,) in results.items():
        assert set(elected) == {0, 1}, machine
        np.testing.assert_array_equal(elected.reshape(-1, 32).sum(1), 1)


def test_reductions(probe: Probes) -> None:
    """Of whole numbers, so that the order makes no difference."""
    x = np.random.default_rng(17).integers(-1000, 1000, (100, 128)).astype(np.float32)
    start = np.arange(128, dtype=np.float32)
    (total,) = probe("tma")(Launch("reductions", 32, 100), [x], [start])
    assert_same_bits(total, start + x.sum(0))
