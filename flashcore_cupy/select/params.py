"""The structs that kernels take by value, as NumPy structured dtypes.

Each mirrors a struct of ``kernels/`` field by field (``flashcore/params.cuh``,
``ladder/fp8_quantize.cu``, ``bwd_mod_args.cu``). The sizes are asserted against each other when a
kernel is compiled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flashcore_cupy.problem.mods import MAX_MOD_ARGS
from flashcore_cupy.problem.rule import BROADCAST_STRIDES, HEAD_STRIDES
from flashcore_cupy.problem.rules import RULES

STRIDES = np.dtype([("batch", "i8"), ("head", "i8"), ("row", "i8")])

_POINTERS = [
    *("q", "k", "v", "o", "lse"),
    *("gate", "gate_tile_max", "gate_row_max", "gate_row_sum"),
    *("scratch_scores", "scratch_probs", "scratch_sum"),
    *("q_scale", "k_scale", "v_scale"),
    *(rule.pointer for rule in RULES if rule.pointer is not None),
]
_MORE_POINTERS = [
    *("cu_seqlens_q", "cu_seqlens_kv", "split_partials", "counters"),
    *("tile_entries", "tile_counts", "rng"),
]
_INTEGERS = [
    *("batch", "heads_q", "heads_kv", "group", "seqlen_q", "seqlen_kv", "causal_offset"),
    *("window_left", "window_right", "top_left", "m_blocks", "splits", "section"),
    *("gate_row", "gate_tiles", "rows_padded", "cols_padded"),
    *(name for rule in RULES for name in rule.integers),
    *("tile_rows", "tile_keys", "tile_capacity"),
]

#: ``AttentionParams``: what every attention kernel takes.
ATTENTION_PARAMS = np.dtype(
    [
        *((name, "u8") for name in _POINTERS),
        ("mod_args", "u8", (MAX_MOD_ARGS,)),
        *((name, "u8") for name in _MORE_POINTERS),
        ("rng_key", "u8"),
        *((f"{name}_strides", STRIDES) for name in "qkvo"),
        ("lse_strides", HEAD_STRIDES),
        *((f"{rule.pointer}_strides", rule.strides) for rule in RULES if rule.strides is not None),
        *((name, "i4") for name in _INTEGERS),
        ("softmax_scale", "f4"),
        ("scale_log2", "f4"),
        *((name, "f4") for rule in RULES for name in rule.numbers),
    ],
    align=True,
)

_GRADIENT_POINTERS = (
    *("dout", "dlse", "dq", "dk", "dv", "dbias", "dsink", "dalibi_slopes"),
    *("delta", "shift", "dq_sum", "turns", "distances"),
)

#: ``BackwardParams``: the same, and behind it the gradients.
BACKWARD_PARAMS = np.dtype(
    [
        *((name, *field[:1]) for name, field in (ATTENTION_PARAMS.fields or {}).items()),
        *((name, "u8") for name in _GRADIENT_POINTERS),
        *((f"{name}_strides", STRIDES) for name in ("dout", "dq", "dk", "dv")),
        ("dbias_strides", BROADCAST_STRIDES),
        *((f"{name}_strides", HEAD_STRIDES) for name in ("dlse", "dalibi_slopes")),
        *((name, "i8") for name in ("dq_sum_size", "turns_size")),
        ("n_blocks", "i4"),
        *((f"bias_{axis}", "i4") for axis in ("batches", "heads", "rows", "columns")),
    ],
    align=True,
)

#: ``ModArgsParams`` of ``bwd_mod_args.cu``: the same, and behind it an array of mod_args' gradient.
MOD_ARGS_PARAMS = np.dtype(
    [
        *((name, *field[:1]) for name, field in (BACKWARD_PARAMS.fields or {}).items()),
        ("mod_gradient", "u8"),
        ("first_sum", "i4"),
    ],
    align=True,
)

#: ``TileListsParams`` of ``tile_lists.cu``: the same as all take, and behind it a block mask's
#: lists, of mixed blocks and of full ones. Strides in elements.
TILE_LISTS_PARAMS = np.dtype(
    [
        *((name, *field[:1]) for name, field in (ATTENTION_PARAMS.fields or {}).items()),
        ("counts", "u8", (2,)),
        ("indices", "u8", (2,)),
        ("counts_strides", "i8", (2, 3)),
        ("indices_strides", "i8", (2, 4)),
        ("capacity", "i4", (2,)),
    ],
    align=True,
)

#: ``BlockMaskParams`` of ``block_mask.cu``: the same, and behind it the lists that it writes.
BLOCK_MASK_PARAMS = np.dtype(
    [
        *((name, *field[:1]) for name, field in (ATTENTION_PARAMS.fields or {}).items()),
        ("counts", "u8", (2,)),
        ("indices", "u8", (2,)),
        ("q_blocks", "i4"),
        ("kv_blocks", "i4"),
    ],
    align=True,
)

_MAP_BYTES = 128


def _with_maps(params: np.dtype[Any], names: Sequence[str]) -> np.dtype[Any]:
    """A struct, and behind it tensor maps from the driver, which begin on multiples of 64."""
    fields: Mapping[str, Any] = params.fields or {}
    first = -(-params.itemsize // 64) * 64
    described: Any = {
        "names": [*fields, *names],
        "formats": [*(field[0] for field in fields.values()), *[("u8", (16,))] * len(names)],
        "offsets": [
            *(field[1] for field in fields.values()),
            *(first + _MAP_BYTES * n for n in range(len(names))),
        ],
        "itemsize": first + _MAP_BYTES * len(names),
    }
    made: np.dtype[Any] = np.dtype(described)
    return made


#: ``HopperParams``: the same, and behind it the maps of q, k, v, o.
HOPPER_PARAMS = _with_maps(ATTENTION_PARAMS, ("q_map", "k_map", "v_map", "o_map"))
#: ``HopperBackwardParams``: ``BackwardParams``, and behind it the maps of q, k, v, dO.
HOPPER_BACKWARD_PARAMS = _with_maps(BACKWARD_PARAMS, ("q_map", "k_map", "v_map", "dout_map"))

_QUANTIZE_TENSOR = np.dtype(
    [
        *((name, "u8") for name in ("x", "x8", "scale")),
        ("strides", STRIDES),
        *((name, "i4") for name in ("blocks", "heads", "seqlen", "dim", "visible")),
    ],
    align=True,
)

#: ``QuantizeParams`` of ``ladder/fp8_quantize.cu``: q, k, v.
QUANTIZE_PARAMS = np.dtype([("tensor", _QUANTIZE_TENSOR, (3,))], align=True)
