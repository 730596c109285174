"""Masks that FlexAttention's users have published, in each form that a backend takes.

Block masks of 128 queries by 128 keys, shared by all batches and heads; they are made beforehand.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

BLOCK = 128
_PREFIX, _WINDOW, _SINKS, _DILATED, _DENSITY = 1024, 1024, 4, 2048, 0.1


@dataclass(frozen=True)
class Pattern:
    """What a query sees."""

    cuda: str
    """As our kernels take it."""
    rule: Callable[..., Any]
    """Of q_idx, kv_idx and the arrays, for NumPy's and torch's alike; logic by & and |."""
    keys: Callable[..., Any]
    """How many keys each query sees: of the queries' positions, S, and the arrays."""
    arrays: Callable[[int], dict[str, Any]] = lambda seqlen: {}


def _documents(seqlen: int) -> dict[str, Any]:
    """Of 500 to 3500 tokens, the same for the same length."""
    rng = np.random.default_rng(0)
    ends = np.cumsum(rng.integers(500, 3500, seqlen // 500 + 1))
    return {"document": np.searchsorted(ends, np.arange(seqlen), side="right").astype(np.int32)}


def _images(seqlen: int) -> dict[str, Any]:
    """One of 1024 tokens in every 2048; -1 in text."""
    at = np.arange(seqlen)
    return {"image": np.where(at % 2048 >= 1024, at // 2048, -1).astype(np.int32)}


def _span(ids: Any) -> tuple[Any, Any]:
    """First position of each element's run of equal ids, and one past its last."""
    starts = np.flatnonzero(np.r_[True, ids[1:] != ids[:-1]])
    run = np.searchsorted(starts, np.arange(len(ids)), side="right") - 1
    return starts[run], np.r_[starts[1:], len(ids)][run]


PATTERNS: Mapping[str, Pattern] = {
    "causal": Pattern("q_idx >= kv_idx", lambda i, j: i >= j, lambda i, seqlen: i + 1),
    "documents": Pattern(
        "document[q_idx] == document[kv_idx] && q_idx >= kv_idx",
        lambda i, j, document: (document[i] == document[j]) & (i >= j),
        lambda i, seqlen, document: i + 1 - _span(document)[0],
        _documents,
    ),
    "jagged": Pattern(
        "document[q_idx] == document[kv_idx]",
        lambda i, j, document: document[i] == document[j],
        lambda i, seqlen, document: _span(document)[1] - _span(document)[0],
        _documents,
    ),
    "prefix-lm": Pattern(
        f"kv_idx < {_PREFIX} || q_idx >= kv_idx",
        lambda i, j: (j < _PREFIX) | (i >= j),
        lambda i, seqlen: np.maximum(i + 1, min(_PREFIX, seqlen)),
    ),
    "window-sinks": Pattern(
        f"q_idx >= kv_idx && (q_idx - kv_idx < {_WINDOW} || kv_idx < {_SINKS})",
        lambda i, j: (i >= j) & ((i - j < _WINDOW) | (j < _SINKS)),
        lambda i, seqlen: np.minimum(i + 1, _WINDOW + np.clip(i + 1 - _WINDOW, 0, _SINKS)),
    ),
    "dilated": Pattern(
        f"q_idx >= kv_idx && q_idx - kv_idx < {_DILATED} && (q_idx - kv_idx) % 2 == 0",
        lambda i, j: (i >= j) & (i - j < _DILATED) & ((i - j) % 2 == 0),
        lambda i, seqlen: (np.minimum(i + 1, _DILATED) + 1) // 2,
    ),
    "transfusion": Pattern(
        "q_idx >= kv_idx || (image[q_idx] >= 0 && image[q_idx] == image[kv_idx])",
        lambda i, j, image: (i >= j) | ((image[i] >= 0) & (image[i] == image[j])),
        lambda i, seqlen, image: np.where(image >= 0, _span(image)[1], i + 1),
        _images,
    ),
    # Blocks that are listed, full, without a rule; as a rule for who needs one.
    "random-blocks": Pattern(
        "blocks[q_idx / 128 * row + kv_idx / 128]",
        lambda i, j, blocks, row: blocks[i // BLOCK * row + j // BLOCK],
        lambda i, seqlen, blocks, row: _listed_keys(i, seqlen, blocks),
        lambda seqlen: {"blocks": random_grid(seqlen).reshape(-1)},
    ),
}


def random_grid(seqlen: int) -> Any:
    """A tenth of all blocks, and the diagonal's."""
    n = -(-seqlen // BLOCK)
    return (np.random.default_rng(0).random((n, n)) < _DENSITY) | np.eye(n, dtype=bool)


def _listed_keys(i: Any, seqlen: int, blocks: Any) -> Any:
    grid = blocks.reshape(-(-seqlen // BLOCK), -1)
    sizes = np.minimum(seqlen - np.arange(grid.shape[1]) * BLOCK, BLOCK)
    return (grid @ sizes)[i // BLOCK]


def numpy_arrays(name: str, seqlen: int) -> dict[str, Any]:
    """A pattern's arrays."""
    return PATTERNS[name].arrays(seqlen)


def _constants(name: str, seqlen: int) -> dict[str, int]:
    return {"row": -(-seqlen // BLOCK)} if name == "random-blocks" else {}


@lru_cache(maxsize=64)
def pairs(name: str, seqlen: int) -> int:
    """(query, key) pairs that are visible, per head and batch."""
    given = numpy_arrays(name, seqlen) | _constants(name, seqlen)
    return int(np.sum(PATTERNS[name].keys(np.arange(seqlen), seqlen, **given)))


def for_numpy(name: str, seqlen: int) -> dict[str, Any]:
    """The rule as ``attention`` takes it on NumPy arrays."""
    rule, given = PATTERNS[name].rule, numpy_arrays(name, seqlen) | _constants(name, seqlen)
    return {"mask_mod": lambda b, h, q_idx, kv_idx: rule(q_idx, kv_idx, **given)}


def ours(name: str, seqlen: int, as_array: Callable[[Any], Any]) -> Any:
    """Our block mask; ``as_array`` brings an array to the GPU."""
    flashcore = importlib.import_module("flashcore_cupy")
    sizes: dict[str, Any] = {"seqlen_q": seqlen, "seqlen_kv": seqlen, "block": (BLOCK, BLOCK)}
    if name == "random-blocks":
        return flashcore.BlockMask.from_grid(as_array(random_grid(seqlen)), **sizes)
    arrays = {key: as_array(x) for key, x in numpy_arrays(name, seqlen).items()}
    return flashcore.block_mask(PATTERNS[name].cuda, mod_args=arrays or None, **sizes)


def of_flex(torch: Any, name: str, seqlen: int, device: Any) -> Any:
    """FlexAttention's block mask."""
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    if name == "random-blocks":
        grid = torch.as_tensor(random_grid(seqlen), device=device)[None, None]
        counts = grid.sum(-1).to(torch.int32)
        order = torch.argsort(grid.to(torch.int8), dim=-1, descending=True, stable=True)
        none = torch.zeros_like(counts)
        return flex.BlockMask.from_kv_blocks(
            none, order.to(torch.int32), counts, order.to(torch.int32), BLOCK_SIZE=BLOCK,
            seq_lengths=(seqlen, seqlen),
        )  # fmt: skip
    rule = PATTERNS[name].rule
    arrays = {
        key: torch.as_tensor(x, device=device) for key, x in numpy_arrays(name, seqlen).items()
    }

    def mask_mod(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return rule(q_idx, kv_idx, **arrays)

    return flex.create_block_mask(
        mask_mod, None, None, seqlen, seqlen, device=device, BLOCK_SIZE=BLOCK, _compile=True
    )
