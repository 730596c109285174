"""Every row of the backward kernels' table, built for every target: no spills, no warnings.

As in ``test_compile`` a tenth of them, another one each day, or all.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from cases_rules import ASKED, array
from helpers import one_at_a_time, todays

from flashcore_cupy.cuda import targets
from flashcore_cupy.jit import compiler
from flashcore_cupy.launch import builds
from flashcore_cupy.problem.attention_problem import contiguous_problem
from flashcore_cupy.problem.blocks import ScoreShape
from flashcore_cupy.problem.gradients import INPUTS, BackwardProblem, Result
from flashcore_cupy.problem.rules import describe_rules
from flashcore_cupy.select import backward, backward_table
from flashcore_cupy.select.config import KernelConfig

pytestmark = pytest.mark.timeout(7200)

LENGTH = 64
MAIN_TARGET = "sm_90a"
#: In turns with the rows.
RULES: tuple[dict[str, Any], ...] = (
    {},
    {"window": (20, 5)},
    {"softcap": 30.0, "alibi_slopes": array("f4", 1)},
    {"bias": array("f4", LENGTH, LENGTH)},
    {"score_mod": "tanhf(score) + x[kv_idx]", "mod_args": {"x": array("f2", LENGTH)}},
    {"mask": array("?", LENGTH, LENGTH), "sink": array("f4", 1)},
    {"dropout_p": 0.1},
    {"mask_mod": "(q_idx + kv_idx + b) % 3 != 0", "window": (20, -1)},
    {"mask": array("?", LENGTH, LENGTH), "dropout_p": 0.1},
    ASKED["blocks"],
)
HIDES = [rules for rules in RULES if rules.keys() & {"mask", "mask_mod"}]
ROWS = [(number, row) for number, row in enumerate(backward_table.ROWS)]


def problem(
    row: backward_table.BackwardRow, dtype: str, causal: Any, **rules: Any
) -> BackwardProblem:
    dim, dim_v = row.dims
    plain = contiguous_problem(1, 1, LENGTH, dim, head_dim_v=dim_v, dtype=dtype, causal=causal)
    described = describe_rules(ScoreShape(1, 1, LENGTH, LENGTH), dtype, **rules)
    wrt = [name for name in INPUTS if name in "qkv" or name in rules]
    o = replace(plain.v, name="o")
    results = tuple(
        Result(f"d{n}", dtype, replace(getattr(plain, n), name=f"d{n}"), (1, 1, LENGTH, 1), ())
        if n in "qkv"
        else Result(f"d{n}", "float32", None, (LENGTH, LENGTH) if n == "bias" else (1,), (0,))
        for n in wrt
    )
    forward = replace(plain, rules=described)
    return BackwardProblem(forward, replace(o, name="do"), o, results, False, True, False, None)


def packed(row: backward_table.BackwardRow, dtype: str, causal: Any) -> BackwardProblem:
    plain = problem(row, dtype, causal)
    return replace(plain, attention=replace(plain.attention, sequences=2))


def configs(number: int, row: backward_table.BackwardRow, arch: str) -> list[KernelConfig]:
    """What a row is built as: on the main target causal and not, and with some rule."""
    found: list[KernelConfig] = []
    several = row.dtypes if arch == MAIN_TARGET else row.dtypes[:1]
    for turn, dtype in enumerate(several, number):
        for causal in (False, True) if arch == MAIN_TARGET else (turn % 2 == 0,):
            rules = RULES[(turn + causal) % len(RULES)]
            if row.kernel == "bwd_sm90_wide":
                rules = {"window": (20, 5)} if turn % 2 else {}
            asked = [problem(row, dtype, causal, **rules)]
            if row.kernel != "bwd_sm90_wide":
                asked.append(packed(row, dtype, causal))
            if row.kernel == "bwd_sm90":  # what is hidden takes the most registers
                asked += [problem(row, dtype, causal, **hides) for hides in HIDES]
            for each in (*asked, *(replace(one, deterministic=False) for one in asked)):
                try:
                    found += backward._configure_row(row, each, arch, {}).configs
                except ValueError:  # it does not fit the target
                    continue
    return list(dict.fromkeys(found))


EVERY = [
    (config, arch)
    for arch in targets.TARGETS
    for number, row in ROWS
    if backward_table.BACKWARD_KERNELS[row.kernel].why_not(problem(row, row.dtypes[0], False), arch)
    is None
    for config in configs(number, row, arch)
]


def test_no_row_spills() -> None:
    wanted = todays(EVERY)
    with one_at_a_time("compile"):
        compiled = compiler.compile_many([builds.job_of(*job) for job in wanted])
    built = dict(zip(wanted, compiled, strict=True))
    spilled = [
        f"{config.source} {config.describe()}, {arch}: {entry.local_bytes} bytes"
        for (config, arch), kernel in built.items()
        for entry in kernel.entries.values()
        if entry.local_bytes
    ]
    assert not spilled, "\n".join(spilled)
    # Products that wait for the ones before, or a register count that cannot be set.
    told = [kernel.log for kernel in built.values() if re.search(r"\(C75\d\d\)", kernel.log)]
    assert not told, told[0]


def of_mod_args(row: backward_table.BackwardRow) -> list[KernelConfig]:
    """What sums up the gradient of an array of mod_args, and what adds up the sums."""
    rules = {"score_mod": "score * x[h]", "mod_args": {"x": array("f2", LENGTH)}}
    asked = problem(row, row.dtypes[0], True, **rules)
    gradient = Result("dmod_args.x", "float16", None, (LENGTH,), (1,))
    try:
        found = backward._configure_row(row, replace(asked, results=(gradient,)), MAIN_TARGET, {})
    except ValueError:  # it has tiles for no rule
        return []
    assert found.queries is not None and found.queries.elements == (("x", "h"),)
    assert [config.source for config in found.configs] == [
        *("bwd_rows.cu", "bwd_sm80.cu", "bwd_mod_args.cu")
    ]
    return [found.queries, *found.mod_args]


def test_gradients_of_mod_args_do_not_spill() -> None:
    rows = [row for _, row in ROWS if row.kernel == "bwd_sm80"]
    wanted = todays([(config, MAIN_TARGET) for row in rows for config in of_mod_args(row)])
    with one_at_a_time("compile"):
        built = compiler.compile_many([builds.job_of(*job) for job in wanted])
    for kernel in built:
        assert all(entry.local_bytes == 0 for entry in kernel.entries.values()), kernel.source
        assert "warning" not in kernel.log


def test_every_row_is_built_for_some_target() -> None:
    tiles = {(config.kernel, config.tile) for config, _ in EVERY}
    missing = [
        row for _, row in ROWS if {(row.kernel, row.keys), (row.kernel, row.queries)} - tiles
    ]
    assert not missing
