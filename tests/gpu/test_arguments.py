"""Rules as CuPy arrays: what is refused and how, and kinds of arrays that say the same."""

from __future__ import annotations

from typing import Any

import numpy as np
from cases_arguments import SKV, SLOPES, SQ, attention, ones, operands, refusal


def test_bad_rules_with_cupy_arrays() -> None:
    import cupy

    q, k, v = (cupy.asarray(x) for x in operands())
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"mask": ones(SQ, SKV, dtype=bool)}, TypeError, "mask: a NumPy array while q is a CuPy"),
        (
            {"score_mod": "score", "mod_args": {"x": ones(3)}},
            TypeError,
            "mod_args['x']: a NumPy array",
        ),
        ({"mask_mod": lambda *at: True}, TypeError, "mask_mod: got a Python function"),
        ({"kernel": "wmma_fused_64", "softcap": 30.0}, ValueError, "has no softcap"),
        ({"kernel": "scalar", "window": (3, 0)}, ValueError, "has no window"),
    ]
    for arguments, error, message in cases:
        assert message in refusal(error, lambda rules=arguments: attention(q, k, v, **rules))
    packed = [x[0].swapaxes(0, 1) for x in (q, k, v)]
    for cu_seqlens in (cupy.asarray([0.0, SQ]), cupy.asarray([0, SQ], "i8")):
        both = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": [0, SKV]}
        message = refusal(TypeError, lambda both=both: attention(*packed, **both))
        assert "cu_seqlens_q: got" in message and "int32" in message


def test_slopes_sinks_and_numbers_on_a_gpu() -> None:
    import cupy

    q, k, v = (cupy.asarray(x) for x in operands())
    for name in ("alibi_slopes", "sink"):
        wanted = attention(q, k, v, **{name: cupy.asarray(SLOPES)})
        for x in (SLOPES.tolist(), cupy.asarray(SLOPES, "f8"), cupy.asarray(SLOPES, "f2")):
            cupy.testing.assert_array_equal(attention(q, k, v, **{name: x}), wanted)
    for name in ("softmax_scale", "softcap"):
        wanted = attention(q, k, v, **{name: 0.25})
        for number in (np.array(0.25), cupy.array(0.25), np.float32(0.25)):
            for _ in range(2):  # the second by the short way, if there is one
                cupy.testing.assert_array_equal(attention(q, k, v, **{name: number}), wanted)
    wanted = attention(q, k, v, causal=True)
    for _ in range(2):
        cupy.testing.assert_array_equal(attention(q, k, v, causal=np.True_), wanted)
        attention(q, k, v, return_lse=True)
        assert refusal(TypeError, lambda: attention(q, k, v, return_lse=1)).startswith("return_lse")
        assert refusal(ValueError, lambda: attention(q, k, v, causal=1)).startswith("causal: got 1")
