"""Attention with torch's signature and with flash-attn's, for tensors, with gradients.

``flashcore_cupy.attention`` takes tensors as well; to import this module besides defines the
operators ``torch.ops.flashcore.attention`` and ``attention_backward``.
"""

from __future__ import annotations

from typing import Any

import torch

from flashcore_cupy.attention import attention
from flashcore_cupy.integrations import torch_attention

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "scaled_dot_product_attention"]


def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """``torch.nn.functional.scaled_dot_product_attention``, by flashcore_cupy.

    Parameters
    ----------
    query : Tensor, (..., Hq, L, E)
        float16, bfloat16 or float32; under autocast its dtype is the region's.
    key, value : Tensor, (..., H, S, E) and (..., H, S, Ev)
        With the same leading axes.
    attn_mask : Tensor, optional, broadcastable to (..., Hq, L, S)
        bool: True where a query attends. Floating, query's dtype or float32: added to the scores;
        it has a gradient.
    dropout_p : float
        Each probability is 0 with this chance, and else divided by 1 - dropout_p. torch's generator
        gives the seed of a call; which probabilities are dropped is not what torch would drop.
    is_causal : bool
        Query i sees key j <= i. May be given beside attn_mask.
    scale : float, optional
        Multiplies the scores; 1/sqrt(E) by default.
    enable_gqa : bool
        True: query may have a multiple of the heads of key and value.

    Returns
    -------
    Tensor, (..., Hq, L, Ev)
        A query that sees no key gives zeros.

    Raises
    ------
    TypeError, ValueError
        Before anything is launched; as ``attention``.
    """
    axes = max(4, query.dim())
    q, k, v = (x[(None,) * (axes - x.dim())] for x in (query, key, value))
    if q.shape[-3] != k.shape[-3] and not enable_gqa:
        raise ValueError(
            f"key: got {k.shape[-3]} heads, and query has {q.shape[-3]}; pass enable_gqa=True"
        )
    mask = attn_mask
    if axes > 4:
        if mask is not None and mask.dim() > 3:
            mask = mask.expand(*q.shape[:-3], *mask.shape[-3:]).flatten(0, -4)
        q, k, v = (x.flatten(0, -4) for x in (q, k, v))
    given: dict[str, Any] = {"softmax_scale": scale, "causal": "top-left" if is_causal else False}
    if mask is not None:
        given["mask" if mask.dtype is torch.bool else "bias"] = mask
    o = attention(q, k, v, **given, **_drawn(dropout_p, q))
    if dropout_p == 1:
        o = o * 0
    return o.reshape(*query.shape[:-1], value.shape[-1])


def flash_attn_func(
    q: Any,
    k: Any,
    v: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """flash-attn's ``flash_attn_func``, by flashcore_cupy.

    Parameters
    ----------
    q, k, v : Tensor, (B, Sq, Hq, D), (B, Skv, H, D) and (B, Skv, H, Dv)
        float16, bfloat16 or float32.
    dropout_p : float
        As for ``scaled_dot_product_attention``.
    softmax_scale : float, optional
        Multiplies the scores; 1/sqrt(D) by default.
    causal : bool
        Query i sees key j <= i + Skv - Sq.
    window_size : (left, right)
        Query i sees i + Skv - Sq - left <= j <= i + Skv - Sq + right; -1 is no bound.
    softcap : float
        s becomes softcap * tanh(s / softcap); 0 is none.
    alibi_slopes : Tensor, optional, (Hq,) or (B, Hq)
        s becomes s - slope * abs(i + Skv - Sq - j). It has a gradient.
    deterministic : bool
        True: gradients have the same bits each time. False lets a kernel add in any order. The
        output always has.
    return_attn_probs : bool
        Also return the log-sum-exp, and None for the probabilities.

    Returns
    -------
    o, or (o, lse, None) : Tensor, (B, Sq, Hq, Dv); float32, (B, Hq, Sq)

    Raises
    ------
    TypeError, ValueError
        Before anything is launched; as ``attention``.
    """
    given: dict[str, Any] = dict(
        layout="bshd", softmax_scale=softmax_scale, causal=causal, window=window_size,
        softcap=softcap, alibi_slopes=alibi_slopes,
    )  # fmt: skip
    return _flash(q, k, v, given, dropout_p, deterministic, return_attn_probs)


def flash_attn_varlen_func(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Any = None,
) -> Any:
    """flash-attn's ``flash_attn_varlen_func``, by flashcore_cupy.

    Parameters
    ----------
    q, k, v : Tensor, (total_q, Hq, D), (total_k, H, D) and (total_k, H, Dv)
        Packed sequences.
    cu_seqlens_q, cu_seqlens_k : Tensor, (B + 1,), int32
        Sequence n is rows cu_seqlens[n] to cu_seqlens[n + 1].
    max_seqlen_q, max_seqlen_k : int
        Not needed, and not looked at.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic
        As for ``flash_attn_func``, within each sequence.
    return_attn_probs : bool
        Also return the log-sum-exp, and None for the probabilities.
    block_table : None
        There is no paged cache.

    Returns
    -------
    o, or (o, lse, None) : Tensor, (total_q, Hq, Dv); float32, (Hq, total_q)

    Raises
    ------
    TypeError, ValueError
        Before anything is launched; as ``attention``.
    """
    if block_table is not None:
        raise ValueError("block_table: there is no paged cache; pass k and v packed")
    given: dict[str, Any] = dict(
        softmax_scale=softmax_scale, causal=causal, window=window_size, softcap=softcap,
        alibi_slopes=alibi_slopes, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
    )  # fmt: skip
    return _flash(q, k, v, given, dropout_p, deterministic, return_attn_probs)


def _flash(
    q: Any,
    k: Any,
    v: Any,
    given: dict[str, Any],
    dropout_p: float,
    deterministic: bool,
    return_lse: bool,
) -> Any:
    given |= _drawn(dropout_p, q)
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if differentiated and not deterministic:
        given |= {"deterministic": False, "return_lse": True}
        o, lse = torch_attention.attend(q, k, v, given)
    else:
        o, lse = attention(q, k, v, **given, return_lse=True)
    if dropout_p == 1:
        o = o * 0
    return (o, lse, None) if return_lse else o


def _drawn(dropout_p: float, q: Any) -> dict[str, Any]:
    """Dropout as ``attention`` takes it, with a seed and an offset of torch's generator.

    Nothing is drawn where that would not matter: with 0, and with 1, which leaves zeros.
    """
    if dropout_p in (0, 1):
        return {}
    low, high = -(2**63), 2**63 - 1
    rng = torch.randint(low, high, (2,), dtype=torch.int64, device=q.device)
    return {"dropout_p": dropout_p, "rng": rng}
