"""Where arrays lie, and what lies beside them: guards, neighbours, more than 2**31 elements."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases_edges import RULED, Place, arrays, check, each, everywhere, off_by_a_byte, pack
from kernel_gradients import gradients, runs
from places import PACKED, unchecked_boundaries

from flashcore_cupy.attention import attention, explain
from flashcore_cupy.check.selftest.arrays import Embedded, embed
from flashcore_cupy.select.backward import BACKWARD_KERNELS

FAR = 2**31 + 64


def needs_memory(on: Place) -> None:
    """Of a GPU; of the CPU's little is touched."""
    if on.kind == "gpu":
        import cupy

        cupy.get_default_memory_pool().free_all_blocks()
        if cupy.cuda.Device().mem_info[0] < 30e9:
            pytest.skip("needs 30 GB of free GPU memory")


def far_apart(on: Place, x: np.ndarray, axis: int) -> Any:
    """A view of x whose last step along an axis leads beyond 2**31 elements."""
    step = -(-FAR // (x.shape[axis] - 1) // 8) * 8
    try:
        base = on.xp.empty(step * (x.shape[axis] - 1) + x.size, x.dtype)
    except MemoryError as error:
        pytest.skip(f"needs gigabytes of memory: {error}")
    strides = [*x.strides]
    strides[axis] = step * x.itemsize
    memory = base if on.xp is np else base.data
    view = on.xp.ndarray(x.shape, x.dtype, memory, strides=tuple(strides))
    view[...] = on.xp.asarray(x)
    return view


@pytest.mark.parametrize(
    "kernel", ["scalar", "wmma_unfused", "wmma_warp_softmax", "mma_sm80", "wgmma_sm90", "fp8_wmma"]
)
def test_rows_beyond_2_to_31_elements(on: Place, kernel: str) -> None:
    """Between batches, between heads, and between the first row and the last."""
    if not on.takes(kernel):
        pytest.skip(f"{kernel} is for another GPU")
    needs_memory(on)
    on = on.by(kernel)
    host = arrays(40, 50, batch=2, heads=2)
    plain = on.run(*host)
    for axis in range(3):
        q, k, v, out = (far_apart(on, x, axis) for x in (*host, host[0]))
        got = on.attention(q, k, v, out=out)
        np.testing.assert_array_equal(on.to_host(on.xp.ascontiguousarray(got)), plain)


@everywhere(*RULED)
@each("queries", [3, 40])
def test_a_bias_and_a_mask_beyond_2_to_31_elements(on: Place, queries: int) -> None:
    needs_memory(on)
    q, k, v = arrays(queries, 48, batch=2, heads=4, heads_kv=1)
    rng = np.random.default_rng(4)
    bias = rng.standard_normal((2, 4, queries, 48)).astype(np.float32)
    mask = rng.random(bias.shape) < 0.7
    given = [on.xp.asarray(x) for x in (q, k, v)]
    for axis in range(4):
        rules = {"bias": far_apart(on, bias, axis), "mask": far_apart(on, mask, axis)}
        check(on.to_host(on.attention(*given, **rules)), q, k, v, bias=bias, mask=mask)


@everywhere(*PACKED)
@each("queries", [3, 90])
def test_packed_rows_beyond_2_to_31_elements(on: Place, queries: int) -> None:
    needs_memory(on)
    operands, bounds = pack(((queries, 100), (2, 150), (queries, 120)), heads=4, heads_kv=1)
    given = [far_apart(on, x, 0) for x in operands]
    out = far_apart(on, np.zeros_like(operands[0]), 0)
    starts = {name: on.xp.asarray(x) for name, x in bounds.items()}
    on.attention(*given, out=out, causal=True, **starts)
    got = on.to_host(on.xp.ascontiguousarray(out))
    check(got, *operands, causal=True, **bounds)


# ---- boundaries that nobody has checked ----------------------------------------------------------


@everywhere(*PACKED)
@each("dtype", ["float16", "float32"])
@each("heads", [(4, 4), (8, 1), (16, 4)])
@each("queries", [5, 200])
def test_garbage_boundaries_stay_inside(
    on: Place, queries: int, heads: tuple[int, int], dtype: str
) -> None:
    """Outputs lie between guards, and inputs between NaN: none of it is written, or read."""
    keys, sequences = 300, 4
    like = [x.swapaxes(1, 2) for x in arrays(queries, keys, heads=heads[0], heads_kv=heads[1])]
    placed = [embed(x.shape, dtype, "contiguous", like=x) for x in like]
    out = embed(like[0].shape, placed[0].buffer.dtype, "contiguous", like=np.full_like(like[0], 7))
    q, k, v = (buffer_and_view(on, x)[1][0] for x in placed)
    rng = np.random.default_rng(3)
    extremes = np.array([-(2**31), -7, -1, 0, 1, 3, 299, 300, 301, 2**31 - 1])
    for draw in range(12 if on.is_emulated else 60):
        bounds = rng.choice(extremes, (2, sequences + 1)).astype(np.int32)
        if draw % 3 == 0:
            bounds = rng.integers(-50, 350, bounds.shape).astype(np.int32)
        if draw % 5 == 0:
            bounds = np.sort(bounds)[:, ::-1]
        rules: dict[str, Any] = {"causal": True}
        if not on.is_emulated:  # where each is another build
            rules = {"causal": draw % 2 == 0, "batch_invariant": draw % 7 == 0}
            rules |= {"window": (30, -1)} if draw % 4 == 0 else {}
        buffer, target = buffer_and_view(on, out)
        starts = (on.xp.asarray(np.ascontiguousarray(x)) for x in bounds)
        rules |= dict(zip(("cu_seqlens_q", "cu_seqlens_k"), starts, strict=True))
        with unchecked_boundaries():
            on.attention(q, k, v, out=target[0], return_lse=True, **rules)
        assert out.surroundings_are_nan(on.to_host(buffer)), bounds
        assert np.isfinite(on.to_host(target)).all(), bounds


@each("kernel", [name for name, family in BACKWARD_KERNELS.items() if family.takes_packed])
@each("deterministic", [True, False])
@each("heads", [(2, 1), (1, 1)])
def test_gradients_with_garbage_boundaries_stay_inside(
    on: Place, kernel: str, deterministic: bool, heads: tuple[int, int]
) -> None:
    """And they end: nobody waits for the turn of a block that boundaries hide."""
    runs(on, kernel)
    queries, keys, sequences = 200, 300, 4
    shapes = {"q": (queries, heads[0]), "k": (keys, heads[1]), "v": (keys, heads[1])}
    given: dict[str, Any] = {n: np.ones((*shape, 64), np.float16) for n, shape in shapes.items()}
    given |= {"o": given["q"], "do": given["q"], "dlse": None}
    given["lse"] = np.zeros((heads[0], queries), np.float32)
    rng = np.random.default_rng(3)
    extremes = np.array([-(2**31), -7, 0, 1, 130, 299, 300, 301, 2**31 - 1])
    falling = np.array([[0, 200, 0, 150, 200], [0, 300, 0, 150, 300]])
    for draw in range(6 if on.is_emulated else 60):
        bounds = rng.choice(extremes, (2, sequences + 1)) if draw else falling
        if draw % 3 == 2:
            bounds = rng.integers(-50, 350, bounds.shape)
        starts = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), bounds.astype(np.int32), strict=True))
        placed = {
            n: embed((1, *x.shape), x.dtype, "contiguous", like=np.full_like(x, 7)[None])
            for n, x in given.items()
            if n in shapes
        }
        held = {n: buffer_and_view(on, x) for n, x in placed.items()}
        out = {f"d{n}": view[0] for n, (_, view) in held.items()}
        rules = starts | {"causal": True}
        with unchecked_boundaries():
            gradients(on, kernel, given, tuple("qkv"), rules, deterministic=deterministic, out=out)
        for name, (buffer, _) in held.items():
            assert placed[name].surroundings_are_nan(on.to_host(buffer)), (name, bounds)


def buffer_and_view(on: Place, embedded: Embedded) -> tuple[Any, Any]:
    if on.kind == "gpu":
        return embedded.on_gpu()
    copy = replace(embedded, buffer=embedded.buffer.copy())
    return copy.buffer, copy.on_host()


# ---- where arrays lie ----------------------------------------------------------------------------


def test_elements_off_their_multiples(on: Place) -> None:
    """A GPU refuses them; on the CPU they are copied."""
    host = arrays(30, 40)
    q, k, v = (on.xp.asarray(x) for x in host)
    off, by = off_by_a_byte(host[1], on.xp), {"kernel": "mma_sm80"}
    if on.is_emulated:
        check(attention(q, off, v, **by), *host)
        assert "copied k: its elements do not lie on" in explain(q, off, v, **by)
    else:
        for call in (attention, explain):
            with pytest.raises(ValueError, match="k: its elements do not lie on multiples of"):
                call(q, off, v, **by)
    with pytest.raises(ValueError, match="out: its elements do not lie"):
        attention(q, k, v, **by, out=off_by_a_byte(host[0], on.xp))


@everywhere(*RULED)
@each("queries", [3, 200])
@each("where", ["late", "reversed", "boxes"])
def test_out_of_a_full_grid_lies_anywhere(on: Place, where: str, queries: int) -> None:
    """Rows that TMA can store, and others: an element late, or from the last to the first."""
    heads, keys = (32, 130) if on.is_emulated else (32, 900)
    q, k, v = arrays(queries, keys, heads=heads, heads_kv=heads // 4)
    base = on.xp.full((1, heads, queries, 80), np.nan, np.float16)
    out = {
        "late": base[..., 1:65],
        "reversed": base[:, :, ::-1, 8:72],
        "boxes": base[..., 8:72],
    }[where]
    on.attention(*(on.xp.asarray(x) for x in (q, k, v)), out=out)
    check(on.to_host(out), q, k, v)
    out.fill(np.nan)
    assert on.xp.isnan(base).all(), "nothing else was written"
