"""What a call launches that asks its mask_mod ahead compiles, and keeps all in registers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from flashcore_cupy.jit import compiler
from flashcore_cupy.launch import builds
from flashcore_cupy.problem.array_spec import spec_of
from flashcore_cupy.problem.attention_problem import contiguous_problem
from flashcore_cupy.problem.rules import describe_rules
from flashcore_cupy.select import selector

LENGTH = 8192
MASK = np.lib.stride_tricks.as_strided(np.ones(1, bool), (1, 1, LENGTH, LENGTH), (0, 0, LENGTH, 1))
RULES: dict[str, dict[str, Any]] = {
    "documents": {
        "mask_mod": "document[q_idx] == document[kv_idx]",
        "mod_args": {"document": spec_of(np.ones(LENGTH, np.int32))},
    },
    "with a mask and a score_mod": {
        "mask_mod": "kv_idx >= first[b]",
        "score_mod": "score + table[h]",
        "mod_args": {name: spec_of(np.ones(32, np.float32)) for name in ("first", "table")},
        "mask": spec_of(MASK),
    },
}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize(("arch", "head_dim"), [("sm_80", 64), ("sm_90a", 128)])
def test_all_launches_compile_without_spills(rules: Any, arch: str, head_dim: int) -> None:
    problem = contiguous_problem(2, 32, LENGTH, head_dim)
    described = describe_rules(problem.scores, problem.dtype, **rules)
    found = selector.select(
        replace(problem, rules=described), arch, overrides={"own_lists": True}
    ).configs
    assert [config.source for config in found][:2] == ["block_mask.cu", "tile_lists.cu"]
    for config in found:
        kernel = compiler.compile_kernel(*builds.job_of(config, arch))
        assert "warning" not in kernel.log, config.source
        assert sum(entry.spill_bytes for entry in kernel.entries.values()) == 0, config.source
