"""The public function on a GPU: what it says about bad arguments, and what it explains."""

from __future__ import annotations

import re

import pytest
from helpers import three_arrays

import flashcore_cupy

attention = flashcore_cupy.attention


def test_bad_gpu_arguments_are_named() -> None:
    import cupy

    host = three_arrays(shape=(1, 2, 8, 64))
    q, k, v = (cupy.asarray(x) for x in host)
    cases = [
        ((q, host[1], v), {}, TypeError, "k: on the CPU"),
        ((q, k, v), {"kernel": "wmma_fused_64", "config": {"block_m": 24}}, ValueError, "block_m"),
        ((q, k, v), {"config": {"tile": 3}}, ValueError, "unknown field 'tile'"),
        ((q, k, v), {"config": {"block_n": "32"}}, ValueError, "block_n='32' is not int"),
        ((q, k, v), {"config": {"block_n": [32]}}, ValueError, "block_n=[32] is not int"),
        ((q, k, v), {"config": {"cp_async": 1}}, ValueError, "cp_async=1 is not bool"),
        ((q, k, v), {"config": {"block_m": 24}}, ValueError, "kernel 'mma_sm80': config"),
        ((q, k, v), {"stream": 7}, TypeError, "stream: got 7; use a CuPy stream"),
        ((q, k, v), {"out": host[0]}, TypeError, "out: got numpy.ndarray"),
        ((q, k, v), {"out": q}, ValueError, "out: overlaps q"),
        (
            [x.astype("f4") for x in (q, k, v)],
            {"kernel": "wmma_cp_async"},
            ValueError,
            "kernel 'wmma_cp_async': takes float16 and bfloat16, not float32",
        ),
        (
            [cupy.zeros((1, 1, 4, 200), q.dtype)] * 3,
            {"kernel": "wmma_fused_32"},
            ValueError,
            "takes head dims up to 128 in float16, not 200",
        ),
        (
            [cupy.zeros((1, 1, 4, 128), q.dtype)] * 3,
            {"kernel": "wmma_cp_async", "config": {"block_m": 256, "warps_m": 16}},
            ValueError,
            "bytes of shared memory",
        ),
    ]
    for args, rules, kind, message in cases:
        with pytest.raises(kind) as caught:
            attention(*args, **rules)
        assert message in str(caught.value)


def test_explain_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy

    q, k, v = (cupy.asarray(x) for x in three_arrays(shape=(1, 2, 8, 64)))
    text = flashcore_cupy.explain(q, k, v)
    assert re.match("(wgmma_sm90|mma_sm80) on sm_", text)
    text = flashcore_cupy.explain(*(x.astype("f4") for x in (q, k, v)), softcap=30.0)
    assert text.startswith("mma_sm80 on sm_") and "softcap" in text
    monkeypatch.setenv("FLASHCORE_ARCH", "sm_75")
    text = flashcore_cupy.explain(q, k, v)
    assert text.startswith("wmma_fused_32 on sm_75")
    assert "passed over mma_sm80: needs cp.async, hence sm_80 or later" in text
    turned = cupy.ascontiguousarray(q.swapaxes(2, 3)).swapaxes(2, 3)
    assert "copied q" in flashcore_cupy.explain(turned, k, v)
