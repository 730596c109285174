"""Attention with the signature of JAX's own, for arrays and tracers, with gradients."""

from __future__ import annotations

from typing import Any

import jax

from flashcore_cupy.attention import attention

__all__ = ["dot_product_attention"]


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Any:
    """``jax.nn.dot_product_attention``, by flashcore_cupy.

    Parameters
    ----------
    query : Array, (B, T, N, H) or (T, N, H)
        float16, bfloat16 or float32.
    key, value : Array, (B, S, K, H) and (B, S, K, Hv), or without B
        N is a multiple of K.
    bias : Array, optional, broadcastable to (B, N, T, S)
        Added to the scores. It has a gradient.
    mask : Array of bool, optional, broadcastable to (B, N, T, S)
        True where a query attends.
    scale : float, optional
        Multiplies the scores; 1/sqrt(H) by default. Not traced.
    is_causal : bool
        Query i sees key j <= i.
    query_seq_lengths, key_value_seq_lengths : Array of int32, optional, (B,)
        Queries and keys beyond are hidden; such queries give zeros.
    local_window_size : int or (left, right), optional
        Query i sees keys i - left to i + right.
    implementation : None
        Ignored, so that calls with one work.
    return_residual : bool
        Also return the log-sum-exp, float32, (B, T, N) or (T, N).

    Returns
    -------
    o, or (o, lse) : Array, (B, T, N, Hv) or (T, N, Hv)
        A query that sees no key gives zeros, and a log-sum-exp of -inf.

    Raises
    ------
    TypeError, ValueError
        Before anything is compiled; as ``attention``.
    """
    numpy = jax.numpy
    query, key, value = (numpy.asarray(x) for x in (query, key, value))
    without_batch = query.ndim == 3
    if without_batch:
        query, key, value = (x[None] for x in (query, key, value))
    rows, columns = query.shape[1], key.shape[1]
    i, j = numpy.arange(rows)[:, None], numpy.arange(columns)[None]
    hidden = [] if mask is None else [numpy.asarray(mask)]
    given: dict[str, Any] = {"causal": "top-left" if is_causal else False}
    if local_window_size is not None:
        left, right = _both_sides(local_window_size)
        if is_causal or rows == columns:
            given["window"] = left, right
        else:  # a window without causal is aligned with the last key
            hidden.append((j >= i - left) & (j <= i + right))
    for lengths, places in ((query_seq_lengths, i), (key_value_seq_lengths, j)):
        if lengths is not None:
            hidden.append(places < numpy.asarray(lengths)[:, None, None, None])
    if hidden:
        given["mask"] = hidden[0]
        for other in hidden[1:]:
            given["mask"] = given["mask"] & other
    if bias is not None:
        bias = numpy.asarray(bias)
        given["bias"] = bias if bias.dtype == query.dtype else bias.astype(numpy.float32)
    o, lse = attention(
        query, key, value, layout="bshd", softmax_scale=scale, return_lse=True, **given
    )
    lse = lse.swapaxes(1, 2)
    if without_batch:
        o, lse = o[0], lse[0]
    return (o, lse) if return_residual else o


def _both_sides(window: int | tuple[int, int]) -> tuple[int, int]:
    """(left, right) of a window; of a number, both."""
    return (window, window) if isinstance(window, int) else (window[0], window[1])
