"""The structs that kernels take by value, as NumPy structured dtypes.

Each mirrors a struct of ``kernels/`` field by field (``flashcore/params.cuh``,
``fp8_quantize.cu``). The sizes are asserted against each other when a kernel is compiled.
"""

from __future__ import annotations

import numpy as np

STRIDES = np.dtype([("batch", "i8"), ("head", "i8"), ("row", "i8")])

_POINTERS = [
    *("q", "k", "v", "o", "lse"),
    *("gate", "gate_tile_max", "gate_row_max", "gate_row_sum"),
    *("scratch_scores", "scratch_probs", "scratch_sum"),
    *("q_scale", "k_scale", "v_scale"),
]
_INTEGERS = [
    *("batch", "heads_q", "heads_kv", "seqlen_q", "seqlen_kv", "causal_offset"),
    *("gate_row", "gate_tiles", "rows_padded", "cols_padded", "negate_q"),
]

#: ``AttentionParams``: what every attention kernel takes.
ATTENTION_PARAMS = np.dtype(
    [
        *((name, "u8") for name in _POINTERS),
        *((f"{name}_strides", STRIDES) for name in "qkvo"),
        *((name, "i4") for name in _INTEGERS),
        ("softmax_scale", "f4"),
        ("scale_log2", "f4"),
    ],
    align=True,
)

_QUANTIZE_TENSOR = np.dtype(
    [
        *((name, "u8") for name in ("x", "x8", "scale")),
        ("strides", STRIDES),
        *((name, "i4") for name in ("blocks", "heads", "seqlen", "dim", "visible")),
    ],
    align=True,
)

#: ``QuantizeParams`` of ``fp8_quantize.cu``: q, k, v.
QUANTIZE_PARAMS = np.dtype([("tensor", _QUANTIZE_TENSOR, (3,))], align=True)
