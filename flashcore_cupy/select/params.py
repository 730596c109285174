"""The structs that kernels take by value, as NumPy structured dtypes.

Each mirrors a struct of ``kernels/`` field by field (``flashcore/params.cuh``,
``ladder/fp8_quantize.cu``). The sizes are asserted against each other when a kernel is compiled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from flashcore_cupy.problem.mods import MAX_MOD_ARGS
from flashcore_cupy.problem.rule import HEAD_STRIDES
from flashcore_cupy.problem.rules import RULES

STRIDES = np.dtype([("batch", "i8"), ("head", "i8"), ("row", "i8")])

_POINTERS = [
    *("q", "k", "v", "o", "lse"),
    *("gate", "gate_tile_max", "gate_row_max", "gate_row_sum"),
    *("scratch_scores", "scratch_probs", "scratch_sum"),
    *("q_scale", "k_scale", "v_scale"),
    *(rule.pointer for rule in RULES if rule.pointer is not None),
]
_MORE_POINTERS = ["cu_seqlens_q", "cu_seqlens_kv", "split_partials", "counters"]
_INTEGERS = [
    *("batch", "heads_q", "heads_kv", "group", "seqlen_q", "seqlen_kv", "causal_offset"),
    *("window_left", "window_right", "top_left", "m_blocks", "splits", "section"),
    *("gate_row", "gate_tiles", "rows_padded", "cols_padded"),
]

#: ``AttentionParams``: what every attention kernel takes.
ATTENTION_PARAMS = np.dtype(
    [
        *((name, "u8") for name in _POINTERS),
        ("mod_args", "u8", (MAX_MOD_ARGS,)),
        *((name, "u8") for name in _MORE_POINTERS),
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

_MAPS = ("q_map", "k_map", "v_map", "o_map")
_MAP_BYTES = 128
_MAPS_OFFSET = -(-ATTENTION_PARAMS.itemsize // 64) * 64
_SHARED: Mapping[str, Any] = ATTENTION_PARAMS.fields or {}

_HOPPER: Any = {
    "names": [*_SHARED, *_MAPS],
    "formats": [*(field[0] for field in _SHARED.values()), *[("u8", (16,))] * len(_MAPS)],
    "offsets": [
        *(field[1] for field in _SHARED.values()),
        *(_MAPS_OFFSET + _MAP_BYTES * n for n in range(len(_MAPS))),
    ],
    "itemsize": _MAPS_OFFSET + _MAP_BYTES * len(_MAPS),
}
#: ``HopperParams``: the same, and behind it the tensor maps of q, k, v, o from the driver.
HOPPER_PARAMS = np.dtype(_HOPPER)

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
