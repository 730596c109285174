"""What tests of gradients share: small problems with every rule, their run, and their judgement."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from flashcore_cupy import attention
from flashcore_cupy.backward import attention_backward
from flashcore_cupy.check import verify_gradients
from flashcore_cupy.problem.gradients import INPUTS, Gradients

Rules = dict[str, Any]
FLOAT32 = np.dtype(np.float32)
#: Arguments that the oracle does not take.
NOT_OF_THE_ORACLE = ("out", "accumulate", "deterministic", "batch_invariant", "kernel")


def random(*shape: int, dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32).astype(dtype)


def operands(
    heads: int = 2,
    heads_kv: int = 1,
    seqlen: int = 9,
    seqlen_kv: int = 13,
    head_dim: int = 8,
    head_dim_v: int = 8,
    batch: int = 1,
    dtype: Any = np.float32,
) -> list[np.ndarray]:
    """q, k, v, each of its own seed."""
    shapes = (
        (batch, heads, seqlen, head_dim),
        (batch, heads_kv, seqlen_kv, head_dim),
        (batch, heads_kv, seqlen_kv, head_dim_v),
    )
    return [random(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes, 1)]


def bent(score: Any, b: Any, h: Any, i: Any, j: Any, **arrays: Any) -> Any:
    """A score_mod whose derivative depends on all that it is given."""
    return score + 0.3 * np.where(i > j, np.tanh(score), -np.abs(score)) * (1 + h) - 0.1 * b


def looked_up(score: Any, b: Any, h: Any, i: Any, j: Any, table: Any) -> Any:
    return score * table[j % len(table)] + table[0] * score**2


def sees_some(b: Any, h: Any, i: Any, j: Any, **arrays: Any) -> Any:
    return (i + 2 * j + h) % 3 != 0


def extras(batch: int, heads: int, seqlen: int, seqlen_kv: int) -> dict[str, Rules]:
    """Each rule by itself, in each of its forms; at the end some together."""
    full = (batch, heads, seqlen, seqlen_kv)
    mask = np.random.default_rng(7).random(full) > 0.3
    slopes, sink = random(heads, seed=8), random(heads, seed=9)
    table = 1 + 0.5 * random(5, seed=10)
    alone: dict[str, Rules] = {
        "none": {},
        "scale": {"softmax_scale": -0.7},
        "no scale": {"softmax_scale": 0.0},
        "causal": {"causal": True},
        "causal at the top left": {"causal": "top-left"},
        "window": {"window": (3, 2)},
        "window to the left": {"window": (2, -1)},
        "window and causal": {"window": (4, -1), "causal": True},
        "softcap": {"softcap": 0.8},
        "slopes": {"alibi_slopes": slopes},
        "slopes of batches": {"alibi_slopes": random(batch, heads, seed=11)},
        "slopes at the top left": {"alibi_slopes": slopes, "causal": "top-left"},
        "bias": {"bias": random(*full, seed=12)},
        **{
            f"bias of {axes}": {"bias": random(*shape, seed=12)}
            for axes, shape in {
                "queries and keys": (seqlen, seqlen_kv),
                "one batch, one head": (1, 1, seqlen, seqlen_kv),
                "heads and keys": (heads, 1, seqlen_kv),
                "batches and queries": (batch, 1, seqlen, 1),
                "heads": (1, heads, 1, 1),
                "keys": (seqlen_kv,),
                "one number": (1,),
                "no axes": (),
            }.items()
        },
        "sink": {"sink": sink},
        "dropout": {"dropout_p": 0.3, "rng": (5, 2)},
        "score_mod": {"score_mod": bent},
        "score_mod of an array": {"score_mod": looked_up, "mod_args": {"table": table}},
        "mask": {"mask": mask},
        "mask of heads": {"mask": mask[0, :, :1]},
        "mask_mod": {"mask_mod": sees_some},
    }
    together: dict[str, Rules] = {
        "softcap, slopes, causal": alone["softcap"] | alone["slopes"] | {"causal": True},
        "softcap, bias, score_mod": alone["softcap"] | alone["bias"] | alone["score_mod"],
        "bias, sink, mask": alone["bias"] | alone["sink"] | alone["mask"],
        "slopes, score_mod, mask_mod": alone["slopes"] | alone["score_mod"] | alone["mask_mod"],
        "all": {
            **alone["softcap"], **alone["slopes"], **alone["bias"], **alone["sink"],
            **alone["dropout"],
            **alone["score_mod"], **alone["mask"], **alone["mask_mod"], "causal": True,
            "window": (6, -1),
        },
    }  # fmt: skip
    return alone | together


def asked(rules: Mapping[str, Any]) -> tuple[str, ...]:
    """All that has a gradient."""
    return tuple(name for name in INPUTS if name in "qkv" or name in rules)


def run(
    q: Any, k: Any, v: Any, *, do: Any = None, dlse: Any = None, wrt: Any = None, **arguments: Any
) -> Gradients:
    """Forward and backward, from a do of N(0, 1) if none is given."""
    forward = {n: x for n, x in arguments.items() if n not in ("out", "accumulate")}
    o, lse = attention(q, k, v, return_lse=True, **forward)
    do = random(*o.shape, dtype=q.dtype, seed=5) if do is None else do
    wrt = asked(arguments) if wrt is None else wrt
    return attention_backward(do, q, k, v, o, lse, dlse=dlse, wrt=wrt, **arguments)


def check(
    q: Any, k: Any, v: Any, *, do: Any = None, dlse: Any = None, wrt: Any = None, **arguments: Any
) -> Gradients:
    """``run``, judged against the oracle."""
    wrt = asked(arguments) if wrt is None else wrt
    if do is None:
        do = random(*q.shape[:-1], v.shape[-1], dtype=q.dtype, seed=5)
    got = run(q, k, v, do=do, dlse=dlse, wrt=wrt, **arguments)
    asks = {n: x for n, x in arguments.items() if n not in NOT_OF_THE_ORACLE}
    expected = verify_gradients.expect(do, q, k, v, dlse=dlse, wrt=wrt, **asks)
    faults = expected.faults(got)
    assert not faults, faults
    assert [name for name in got._fields if getattr(got, name) is not None] == [
        name for name in got._fields if name[1:] in wrt
    ]
    return got


def central_difference(
    loss: Callable[[np.ndarray], float], x: np.ndarray, step: float = 1e-5
) -> np.ndarray:
    """The derivative of a loss by each element of a float64 array."""
    found = np.empty(x.shape)
    for at in np.ndindex(*x.shape):
        change = np.zeros(x.shape)
        change[at] = step
        found[at] = (loss(x + change) - loss(x - change)) / (2 * step)
    return found
