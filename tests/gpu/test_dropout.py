"""Dropout on a GPU: graphs that draw anew, masks of CuPy arrays, torch's arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases_dropout import RNG

from flashcore_cupy import attention, attention_backward, dropout_mask
from flashcore_cupy.cpu.reference import compare, make_inputs, naive, oracle

P = 0.3
SIZES = {"batch": 2, "heads": 8, "heads_kv": 2, "seqlen": 300, "seqlen_kv": 200, "head_dim": 64}
DRAWS = ((0, 0), (0, 1), (5, 0), RNG)


def inputs() -> list[np.ndarray]:
    return list(make_inputs("normal", **SIZES))


def test_the_mask_is_numpys() -> None:
    import cupy

    shape = (2, 3, 130, 90)
    for rng in DRAWS:
        expected = dropout_mask(shape, P, rng)
        like = dropout_mask(shape, P, rng, like=cupy.empty(1))
        array = dropout_mask(shape, P, cupy.asarray(np.array(rng, np.uint64)))
        signed = dropout_mask(shape, P, cupy.asarray(np.array(rng, np.uint64).view(np.int64)))
        for found in (like, array, signed):
            assert isinstance(found, cupy.ndarray)
            np.testing.assert_array_equal(found.get(), expected)
    assert dropout_mask(shape, 0.0, None, like=cupy.empty(1)).all()


def test_a_graph_draws_with_what_the_array_holds() -> None:
    """Forward and backward in one graph; nobody waits while it is captured."""
    import cupy

    host = inputs()
    q, k, v = map(cupy.asarray, host)
    do = cupy.asarray(host[0])
    rng = cupy.zeros(2, np.uint64)
    drop: dict[str, Any] = {"dropout_p": P, "rng": rng}
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        o, lse = attention(q, k, v, causal=True, return_lse=True, **drop)
        g = attention_backward(do, q, k, v, o, lse, causal=True, **drop)
        graph = stream.end_capture()
    seen = set()
    for draw in (*DRAWS, DRAWS[0]):
        rng.set(np.array(draw, np.uint64))
        cupy.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        given: dict[str, Any] = {"causal": True, "dropout_p": P, "rng": draw}
        expected, _ = oracle(*host, **given)
        result = compare(o.get(), expected, naive(*host, **given))
        assert result.ok, result.reason
        again = attention_backward(do, q, k, v, o, lse, **given)
        for x, y in zip(g[:3], again[:3], strict=True):
            assert x.get().tobytes() == y.get().tobytes()
        seen.add(o.get().tobytes())
    assert len(seen) == len(DRAWS)


def test_torch_tensors() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch has no GPU")
    q, k, v = (torch.from_numpy(x).cuda() for x in inputs())
    expected = attention(q, k, v, dropout_p=P, rng=RNG)
    rng = torch.from_numpy(np.array(RNG, np.uint64).view(np.int64)).cuda()
    assert torch.equal(attention(q, k, v, dropout_p=P, rng=rng), expected)
    assert torch.equal(attention(q, k, v, dropout_p=P, rng=rng.cpu()), expected)
    kept = dropout_mask((2, 8, 300, 200), P, rng)
    assert kept.is_cuda
    np.testing.assert_array_equal(kept.cpu().numpy(), dropout_mask(kept.shape, P, RNG))


def test_refused() -> None:
    import cupy

    q, k, v = map(cupy.asarray, inputs())
    with pytest.raises(ValueError, match="rng: got none with"):
        attention(q, k, v, dropout_p=P)
    attention(q, k, v)  # now it is remembered
    with pytest.raises(ValueError, match="rng: got none with"):
        attention(q, k, v, dropout_p=P)
    with pytest.raises(TypeError, match="rng: got float32"):
        attention(q, k, v, dropout_p=P, rng=cupy.zeros(2, np.float32))
