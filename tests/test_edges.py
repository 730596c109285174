"""The edges of ``attention``, the same on a GPU and on NumPy arrays.

What a query sees decides everything: nothing (zero, -inf), NaN (exactly there), neighbours (never).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import flashcore_cupy
from flashcore_cupy import reference, tiles

NUMPY = "numpy"
EXACT = tuple(name for name, kernel in tiles.KERNELS.items() if not kernel.quantizes)


def everywhere(*kernels: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test on NumPy arrays; and, as one more item, with each of the kernels on the GPU."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @pytest.mark.parametrize("on", [NUMPY, pytest.param("gpu", marks=pytest.mark.gpu)])
        @functools.wraps(test)
        def on_each(on: str, **rest: object) -> None:
            failed = {}
            for name in (NUMPY,) if on == NUMPY else kernels:
                try:
                    test(on=name, **rest)
                except AssertionError as error:
                    failed[name] = error
            assert not failed, "\n".join(f"{name}: {error}" for name, error in failed.items())

        return on_each

    return decorate


def run(on: str, q: Any, k: Any, v: Any, **rules: Any) -> Any:
    """``attention`` on NumPy, or by a kernel on the GPU, with NumPy arrays in and out."""
    if on == NUMPY:
        return flashcore_cupy.attention(q, k, v, **rules)
    import cupy

    got = flashcore_cupy.attention(*(cupy.asarray(x) for x in (q, k, v)), kernel=on, **rules)
    return tuple(map(cupy.asnumpy, got)) if isinstance(got, tuple) else cupy.asnumpy(got)


def arrays(
    seqlen_q: int, seqlen_kv: int, dim: int = 64, *, batch: int = 1, heads: int = 2, seed: int = 0
) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = [(batch, heads, s, dim) for s in (seqlen_q, seqlen_kv, seqlen_kv)]
    return [rng.standard_normal(shape).astype(np.float16) for shape in shapes]


def check(got: np.ndarray, q: Any, k: Any, v: Any, **rules: Any) -> None:
    expected, _ = reference.oracle(q, k, v, **rules)
    comparison = reference.compare(got, expected, reference.naive(q, k, v, **rules))
    assert comparison.ok, comparison.reason


@everywhere(*tiles.KERNELS)
@pytest.mark.parametrize("causal", [False, True, "top-left"])
def test_nothing_to_see(on: str, causal: object) -> None:
    for seqlen_q, seqlen_kv, batch in ((5, 0, 1), (0, 5, 1), (0, 0, 1), (5, 7, 0)):
        q, k, v = arrays(seqlen_q, seqlen_kv, batch=batch)
        o, lse = run(on, q, k, v, causal=causal, return_lse=True)
        assert o.shape == q.shape and lse.shape == q.shape[:3]
        assert (o == 0).all() and (lse == -np.inf).all()


@everywhere(*tiles.KERNELS)
@pytest.mark.parametrize("gate", ["qk", "softmax", "pv"])
def test_gates_with_nothing_to_see(on: str, gate: str) -> None:
    q, k, v = arrays(5, 0)
    got = run(on, q, k, v, gate=gate)
    assert got.shape == (1, 2, 5, 64 if gate == "pv" else 0)
    q, k, v = arrays(100, 30)  # causal: the first 70 queries see nothing
    got = run(on, q, k, v, gate=gate, causal=True)
    nothing = -np.inf if gate == "qk" else 0
    assert (got[:, :, :70] == nothing).all()


@everywhere(*EXACT)
def test_queries_without_keys(on: str) -> None:
    q, k, v = arrays(150, 60)
    o, lse = run(on, q, k, v, causal=True, return_lse=True)
    assert (o[:, :, :90] == 0).all() and (lse[:, :, :90] == -np.inf).all()
    assert np.isfinite(lse[:, :, 90:]).all()
    check(o, q, k, v, causal=True)


@everywhere(*tiles.KERNELS)
def test_queries_without_keys_stay_zero_beside_nan(on: str) -> None:
    """Their tile holds values that others see; NaN among those must not reach them."""
    q, k, v = arrays(20, 10)
    v[...] = np.nan
    o, lse = run(on, q, k, v, causal=True, return_lse=True)
    assert (o[:, :, :10] == 0).all() and (lse[:, :, :10] == -np.inf).all()
    assert np.isnan(o[:, :, 10:]).all()


@everywhere(*tiles.KERNELS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_in_q_reaches_its_row_alone(on: str, value: float) -> None:
    q, k, v = arrays(100, 130)
    clean = run(on, q, k, v)
    q[0, 1, 37, 5] = value
    o = run(on, q, k, v)
    touched = np.isnan(o).any(-1)
    assert touched[0, 1, 37] and touched.sum() == 1
    if on == NUMPY or not tiles.KERNELS[on].quantizes:  # there a head shares one scale
        np.testing.assert_array_equal(o[~touched], clean[~touched])


@everywhere(*tiles.KERNELS)
def test_nan_in_k_reaches_the_queries_that_see_it(on: str) -> None:
    q, k, v = arrays(130, 130)
    k[0, 1, 77, 3] = np.nan
    o, lse = run(on, q, k, v, causal=True, return_lse=True)
    seen = np.zeros((1, 2, 130), bool)
    seen[0, 1, 77:] = True
    np.testing.assert_array_equal(np.isnan(o).any(-1), seen)
    np.testing.assert_array_equal(np.isnan(lse), seen)


@everywhere(*EXACT)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_in_v_reaches_whom_it_may(on: str, value: float) -> None:
    """Every query that sees it; beyond those, at most queries of the tile of keys."""
    q, k, v = arrays(600, 600)
    v[0, 1, 577, 3] = value
    o = run(on, q, k, v, causal=True)
    bad = ~np.isfinite(o)
    assert bad[0, 1, 577:, 3].all(), "the queries that see it"
    assert not bad[0, 0].any(), "another head"
    assert not np.delete(bad, 3, axis=-1).any(), "another column"
    if on in (NUMPY, "scalar"):
        assert not bad[0, 1, :577].any(), "exact here: a hidden value is never multiplied"
    else:
        assert not bad[0, 1, :512].any(), "queries whose tiles end before it"


@everywhere(*tiles.KERNELS)
def test_keys_that_nobody_sees_do_not_leak(on: str) -> None:
    """Top-left causal with more keys than queries: the last keys are hidden from all."""
    q, k, v = arrays(70, 200)
    clean = run(on, q, k[:, :, :70], v[:, :, :70], causal="top-left")
    for hidden_k, hidden_v in ((np.nan, np.inf), (60000.0, -60000.0)):
        k[:, :, 70:], v[:, :, 70:] = hidden_k, hidden_v
        got = run(on, q, k, v, causal="top-left")
        if on == NUMPY:  # other tiles, other bits
            check(got, q, k, v, causal="top-left")
        else:
            np.testing.assert_array_equal(got, clean, err_msg=on)


@everywhere(*EXACT)
@pytest.mark.parametrize("scale", [0.0, -0.125, 3.0])
def test_any_finite_scale(on: str, scale: float) -> None:
    q, k, v = arrays(90, 110)
    check(run(on, q, k, v, softmax_scale=scale), q, k, v, softmax_scale=scale)


@everywhere(*EXACT)
def test_large_scores(on: str) -> None:
    """Scores past 1e4: exp of them overflows, exp of differences does not."""
    q, k, v = arrays(90, 110)
    q, k = (x * np.float16(60) for x in (q, k))
    o = run(on, q, k, v, softmax_scale=1.0)
    assert np.isfinite(o).all()
    check(o, q, k, v, softmax_scale=1.0)


@everywhere(*tiles.KERNELS)
def test_invariants(on: str) -> None:
    q, k, v = arrays(100, 150)
    ones = run(on, q, k, np.ones_like(v), causal=True)
    assert np.abs(ones[:, :, :].astype(np.float64) - 1).max() <= 2**-10
    constant = np.broadcast_to(v[:, :, :1], v.shape).copy()  # whatever the weights
    tolerance = 0.07 if on != NUMPY and tiles.KERNELS[on].quantizes else 2**-9
    got = run(on, q, k, constant).astype(np.float64)
    assert np.abs(got - constant[:, :, :1]).max() <= tolerance * np.abs(constant).max()
    first = run(on, q, k, v)
    np.testing.assert_array_equal(first, run(on, q, k, v), "the same bits twice")


@everywhere(*EXACT)
def test_one_query_many_keys(on: str) -> None:
    q, k, v = arrays(1, 20_000, heads=1)
    check(run(on, q, k, v), q, k, v)


def _off_by_a_byte(x: np.ndarray, xp: Any) -> Any:
    base = xp.zeros(1 + x.nbytes, np.uint8)
    base[1:] = xp.asarray(x.reshape(-1).view(np.uint8))
    memory = base[1:] if xp is np else base[1:].data
    return xp.ndarray(x.shape, x.dtype, memory)


def test_elements_off_their_multiples_are_copied() -> None:
    """Views of bytes: contiguous by their strides, yet no vector of elements."""
    host = arrays(30, 40)
    check(flashcore_cupy.attention(*(_off_by_a_byte(x, np) for x in host)), *host)


@pytest.mark.gpu
def test_elements_off_their_multiples_are_refused() -> None:
    import cupy

    q, k, v = (cupy.asarray(x) for x in arrays(30, 40))
    off = _off_by_a_byte(cupy.asnumpy(k), cupy)
    for call in (flashcore_cupy.attention, flashcore_cupy.explain):
        with pytest.raises(ValueError, match="k: its elements do not lie on multiples of their 2"):
            call(q, off, v)
    with pytest.raises(ValueError, match="out: its elements do not lie"):
        flashcore_cupy.attention(q, k, v, out=_off_by_a_byte(cupy.asnumpy(q), cupy))


@everywhere(*EXACT)
def test_out_beside_its_inputs(on: str) -> None:
    """q, k, v and o as neighbours in one array: their spans overlap, their elements do not."""
    q, k, v = arrays(50, 50)
    if on == NUMPY:
        xp = np
    else:
        import cupy as xp
    packed = xp.stack([xp.asarray(x) for x in (q, k, v, q)], axis=3)
    rules = {} if on == NUMPY else {"kernel": on}
    views = [packed[:, :, :, i] for i in range(4)]
    flashcore_cupy.attention(*views[:3], out=views[3], **rules)
    host = packed if on == NUMPY else xp.asnumpy(packed)
    check(host[:, :, :, 3], q, k, v)
    np.testing.assert_array_equal(host[:, :, :, 0], q)


@everywhere(*EXACT)
def test_out_is_written_in_place(on: str) -> None:
    """Between guards, as every second row of a wider array that starts an element late."""
    q, k, v = arrays(50, 60)
    if on == NUMPY:
        xp = np
    else:
        import cupy as xp
    base = xp.full((1, 2, 100, 70), xp.nan, np.float16)
    out = base[:, :, ::2, 1:65]
    rules = {} if on == NUMPY else {"kernel": on}
    args = [xp.asarray(x) for x in (q, k, v)]
    returned = flashcore_cupy.attention(*args, out=out, **rules)
    assert returned is out
    host = base if on == NUMPY else xp.asnumpy(base)
    check(host[:, :, ::2, 1:65], q, k, v)
    host[:, :, ::2, 1:65] = np.nan
    assert np.isnan(host).all(), "nothing else was written"


@pytest.mark.gpu
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


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", tiles.KERNELS)
def test_graph_capture(kernel: str) -> None:
    """A plan's launches are captured, and a replay reads what the arrays hold by then."""
    import cupy

    from flashcore_cupy.attention import plan

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


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["scalar", "wmma_unfused", "wmma_warp_softmax", "fp8_wmma"])
def test_offsets_beyond_2_to_31_elements(kernel: str) -> None:
    import cupy

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


@pytest.mark.gpu
def test_every_gpu_of_the_machine() -> None:
    import cupy

    for device in range(cupy.cuda.runtime.getDeviceCount()):
        with cupy.cuda.Device(device):
            q, k, v = (cupy.asarray(x) for x in arrays(100, 100))
        for kernel in tiles.KERNELS:  # from the current device, whichever holds the arrays
            o = flashcore_cupy.attention(q, k, v, kernel=kernel)
            assert o.device.id == device
            assert cupy.isfinite(o).all()


@pytest.mark.gpu
def test_a_length_compiles_nothing_anew() -> None:
    import cupy

    from flashcore_cupy import launch

    def call(batch: int, heads: int, seqlen_q: int, seqlen_kv: int) -> None:
        q, k, v = arrays(seqlen_q, seqlen_kv, batch=batch, heads=heads)
        flashcore_cupy.attention(*(cupy.asarray(x) for x in (q, k, v)))

    call(1, 1, 64, 64)
    before = launch.load_kernel.cache_info().misses
    for problem in ((3, 2, 1, 100), (2, 5, 333, 64), (1, 1, 65, 1)):
        call(*problem)
    assert launch.load_kernel.cache_info().misses == before


@pytest.mark.gpu
def test_bfloat16_and_float32_dtypes_come_back() -> None:
    import cupy

    for dtype in (np.float16, ml_dtypes.bfloat16, np.float32):
        q, k, v = (cupy.asarray(x.astype(dtype)) for x in arrays(20, 30))
        o, lse = flashcore_cupy.attention(q, k, v, return_lse=True)
        assert isinstance(o, cupy.ndarray) and o.dtype == dtype
        assert lse.dtype == np.float32
