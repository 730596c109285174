"""dP and dS of each pass of each backward kernel alone, by the debug gates."""

from __future__ import annotations

from typing import Any

import numpy as np
from cases_gradients import random
from places import Place, each

from flashcore_cupy.check.selftest import gradients
from flashcore_cupy.check.selftest.case import Case
from flashcore_cupy.check.selftest.matrix import Emulated, runnable
from flashcore_cupy.cuda.targets import HOPPER
from flashcore_cupy.jit import compiler
from flashcore_cupy.select.backward_table import BACKWARD_KERNELS, ROWS

#: Queries and keys by which an edge is met: of one tile, one less, one more, several.
EDGES = ((0, 0), (-1, -1), (1, 1), (37, 41))
RULES: tuple[dict[str, Any], ...] = (
    {"window": (40, -1), "sink": True},
    {"causal": True},
    {"window": (33, 7), "softcap": 5.0},
    {"alibi": "bh", "bias": "1hqk"},
    {"mask": "bhqk", "score_mod": "table"},
    {"dropout_p": 0.3, "causal": True},
    {"block_mask": "64x128 1h", "mask_mod": "thirds", "causal": True},
)


def passes_here(on: Place, case: Case) -> None:
    arch = HOPPER if on.is_emulated else compiler.device_arch()
    if not runnable([case], arch):
        takes_all = case.kernel != "bwd_sm90_wide"
        assert case.mask or arch != HOPPER or not takes_all, "a kernel takes what it is made for"
        return
    result = gradients.run_case(case, Emulated(arch, seed=1) if on.is_emulated else None)
    assert result.ok, result.reason


@each("kernel", BACKWARD_KERNELS)
@each("gate", ["dp", "ds"])
@each("only", ["q", "k", "bias"])
@each("rules", RULES)
def test_stages(on: Place, kernel: str, gate: Any, only: str, rules: dict[str, Any]) -> None:
    tile = next(row for row in ROWS if row.kernel == kernel and row.head_dim >= 64)
    own, other = (
        (tile.keys.block_n, tile.keys.block_m)
        if only == "k"
        else (tile.queries.block_m, tile.queries.block_n)
    )
    for m, n in on.few(*EDGES):
        case = Case(
            "gate", kernel, gate=gate, only=only, heads=4, seqlen_q=own + m, seqlen_kv=other + n,
            **rules | ({"bias": "1hqk"} if only == "bias" else {}),
        )  # fmt: skip
        passes_here(on, case)


@each("dims, dtype", [((256, 256), "float16"), ((512, 512), "bfloat16"), ((128, 64), "float32")])
def test_blocks_of_columns_store_the_same(on: Place, dims: Any, dtype: str) -> None:
    """CTAs that own the same rows each compute all of dP and dS."""
    sizes = {"head_dim": dims[0], "head_dim_v": dims[1], "seqlen_q": 40, "seqlen_kv": 70}
    for gate in on.few("ds", "dp"):
        passes_here(on, Case("gate", "bwd_sm80", dtype, gate=gate, only="k", **sizes))


def test_a_gate_does_not_change_the_gradients(on: Place) -> None:
    if on.is_emulated:
        from flashcore_cupy import attention
        from flashcore_cupy.cpu.emulator.backward import emulated_backward

        q, k, v, do = (random(1, 2, 70, 32, dtype=np.float16, seed=n) for n in range(4))
        o, lse = attention(q, k, v, return_lse=True)
        given = {"do": do, "q": q, "k": k, "v": v, "o": o, "lse": lse}
        found = []
        for gate in (None, "ds"):
            bound = emulated_backward(given, HOPPER, kernel="bwd_sm80", wrt=("q",), gate=gate)
            bound.launch(next(on.schedules))
            found.append(bound.gradients.dq)
        assert found[0].tobytes() == found[1].tobytes()
