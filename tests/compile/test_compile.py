"""Every row of the table, built for every target: no spills, no local memory, no warnings.

Where ``TEST_ALL`` is set it is all of them, else a tenth, another one each day. Nothing here needs
a GPU. All builds go through one parallel warm-up into the session's cache.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases_rules import ASKED, array
from helpers import one_at_a_time, todays

from flashcore_cupy.cuda import targets
from flashcore_cupy.jit import compiler
from flashcore_cupy.launch import builds
from flashcore_cupy.problem.array_spec import spec_of
from flashcore_cupy.problem.attention_problem import ITEMSIZE, AttentionProblem, contiguous_problem
from flashcore_cupy.problem.blocks import ScoreShape
from flashcore_cupy.problem.rules import RULES, describe_rules
from flashcore_cupy.select import registry, selector, table
from flashcore_cupy.select.config import KernelConfig
from flashcore_cupy.select.row import Row
from flashcore_cupy.select.sm90 import Sm90

# Whichever test is first waits for all builds: an hour on two cores, if it is every row.
pytestmark = pytest.mark.timeout(7200)

MAIN_TARGET = "sm_90a"
STAGES = ("qk", "softmax", "pv")
LENGTH = 64


# A mask whose rows begin on multiples of two bytes, and of one.
PAIRS, LOOSE = (spec_of(np.empty((LENGTH, LENGTH + n), "?")[:, :LENGTH]) for n in (2, 1))


# What fwd_sm80 has beyond causal masks, and fwd_sm90 in part; the second goes with every row.
TOGETHER: tuple[dict[str, Any], ...] = (
    {"window": (20, 5)},
    {"packed": True, "causal": True},
    {"softcap": 30.0, "alibi_slopes": array("f4", 1)},
    {"bias": array("f4", LENGTH, LENGTH), "mask": array("?", LENGTH, LENGTH)},
    {"bias": array("f4", LENGTH, 1), "mask": LOOSE, "sink": array("f4", 1)},
    {
        "score_mod": "score + 0.1f * x[kv_idx]",
        "mask_mod": "x[q_idx] <= x[kv_idx]",
        "mod_args": {"x": array("f2", LENGTH)},
    },
    {"softcap": 30.0, "window": (20, 0), "packed": True, "mask_mod": "kv_idx % 3 != b"},
    {"alibi_slopes": array("f4", 1), "mask": PAIRS},
    {"dropout_p": 0.1},
    {"dropout_p": 0.1, "alibi_slopes": array("f4", 1), "sink": array("f4", 1)},
    {"dropout_p": 0.1, "bias": array("f4", LENGTH, LENGTH)},
)
# A rule that is in none of them is built alone.
ALONE = (
    ASKED[next(iter(rule.codes))]
    for rule in RULES
    if not any(rule.name in asked for asked in TOGETHER)
)
CALLS = (*TOGETHER, *ALONE)


def _problem(row: Row, dtype: str, causal: Any = False, **rules: Any) -> AttentionProblem:
    (dim, dim_v), gate = row.dims, rules.pop("gate", None)
    problem = contiguous_problem(
        1, 1, LENGTH, dim, head_dim_v=dim_v, dtype=dtype, causal=causal, gate=gate
    )
    described = describe_rules(ScoreShape(1, 1, LENGTH, LENGTH), dtype, **rules)
    return replace(problem, rules=described, sequences=1 if rules.get("packed") else None)


def _fits(row: Row, problem: AttentionProblem, arch: str) -> KernelConfig | None:
    try:
        return selector.check_target(row, selector.configure_row(row, problem), arch)
    except ValueError:
        return None


def _is_taken(row: Row, arch: str) -> bool:
    """Whether the row fits the target, and no row before it that is meant for the same problems."""

    def meant_for(row: Row) -> tuple[object, ...]:
        return row.dims, row.dtypes, row.sizes, row.spills_with

    rows = [other for other in selector.rows_of(row.kernel) if meant_for(other) == meant_for(row)]
    return next((r for r in rows if _fits(r, _problem(r, r.dtypes[0]), arch)), None) == row


def _configs(row: Row, arch: str) -> list[KernelConfig]:
    """The row's builds on a target.

    On the main target, both dtypes and both choices of causal; in turns with the kernel's other
    rows, the gates, and the rules, of which wgmma's rows, whose consumers fill all registers, get
    all. On others, if it takes the row, one of dtypes x causal.
    """
    if arch != MAIN_TARGET and not _is_taken(row, arch):
        return []
    kernel, rows = registry.KERNELS[row.kernel], selector.rows_of(row.kernel)
    turn = rows.index(row)
    pairs = [(dtype, causal) for dtype in row.dtypes for causal in (False, True)]
    if arch != MAIN_TARGET:
        problems = [_problem(row, *pairs[(turn + targets.TARGETS.index(arch)) % len(pairs)])]
    else:
        flipped = enumerate(row.dtypes, turn)
        problems = [_problem(row, dtype, i % 2 == 0) for i, dtype in flipped]
        if kernel.has_rules:
            dtype = row.dtypes[turn % len(row.dtypes)]
            ruled = [
                _problem(row, dtype, **{"causal": (turn + i) % 2 == 0} | rules)
                for i, rules in enumerate(_rules_of(kernel))
            ]
            taken = [problem for problem in ruled if row.takes_rules(problem)]
            # Rows of clusters differ in the merge alone.
            in_turns = kernel.family is not Sm90 or row.tile.cluster > 1
            problems += [taken[turn % len(taken)]] if in_turns else taken
    found = [_fits(row, problem, arch) for problem in problems]
    if arch == MAIN_TARGET and any(found):
        shared = min(len(STAGES), len(rows))
        for gate in STAGES[turn % shared :: shared]:
            problem = _problem(row, *pairs[turn % len(pairs)], gate=gate)
            found.append(_other_rows(row, _fits(row, problem, arch), narrow=turn % 2 == 0))
    selections = [selector.Selection(kernel, config) for config in found if config is not None]
    return list(dict.fromkeys(c for chosen in selections for c in chosen.configs))


def _rules_of(kernel: registry.Kernel) -> list[dict[str, Any]]:
    """CALLS as the kernel takes them, and is not passed over for."""
    if kernel.family.mask_keys == 1:
        return list(CALLS)
    aligned = {name: array(t, LENGTH, LENGTH) for name, t in (("bias", "f4"), ("mask", "?"))}
    return [rules | {n: x for n, x in aligned.items() if n in rules} for rules in CALLS]


def _other_rows(row: Row, config: KernelConfig | None, *, narrow: bool) -> KernelConfig:
    """Rows that are loaded element by element, or have fewer columns than the tile."""
    assert config is not None
    if narrow or row.kernel == "scalar":
        return replace(config, align_bytes=ITEMSIZE[config.dtype])
    return replace(config, dim_qk=row.dims[0] - 8, dim_v=max(8, row.dims[1] - 24))


WANTED = {
    (kernel, arch): todays([c for row in selector.rows_of(kernel) for c in _configs(row, arch)])
    for kernel in registry.KERNELS
    for arch in targets.TARGETS
}


@pytest.fixture(scope="module")
def built(
    request: pytest.FixtureRequest,
) -> dict[tuple[str, str], list[tuple[KernelConfig, compiler.CompiledKernel]]]:
    """What the tests that were chosen ask for, by the kernel and the target of each."""
    asked = [
        getattr(getattr(test, "callspec", None), "params", {})
        for test in request.session.items
        if getattr(test, "module", None) is request.module and "built" in test.fixturenames
    ]
    wanted = {
        (kernel, arch): configs
        for (kernel, arch), configs in WANTED.items()
        if any({"kernel": kernel, "arch": arch}.items() >= params.items() for params in asked)
    }
    jobs = [(c, arch) for (_, arch), configs in wanted.items() for c in configs]
    with one_at_a_time("compile"):
        compiled = iter(compiler.compile_many([builds.job_of(*job) for job in jobs]))
    return {key: [(c, next(compiled)) for c in configs] for key, configs in wanted.items()}


@pytest.mark.parametrize(("kernel", "arch"), WANTED)
def test_builds_without_spills(built, kernel: str, arch: str) -> None:
    for config, compiled in built[kernel, arch]:
        assert set(compiled.entries) == set(config.entries)
        # C75..: wgmma that waits for the one before, or a register count that cannot be set.
        assert not re.search(r"warning|\(C75\d\d\)", compiled.log), compiled.log
        for name, used in compiled.entries.items():
            # These tiles fill the registers; what a gate stores is too much for them.
            if config.gate is None or not config.has_rules:
                assert used.spill_bytes == 0, f"{name} spills: {config}"
                assert used.local_bytes == 0, f"{name} uses local memory: {config}"
            assert used.shared_bytes == 0, "all shared memory is dynamic"
            assert used.registers * config.threads <= 65536, "a block fits the register file"


@pytest.mark.parametrize("arch", targets.TARGETS)
def test_which_kernels_a_target_has(arch: str) -> None:
    missing = {kernel for kernel in registry.KERNELS if not WANTED[kernel, arch]}
    with_cp_async = {
        name
        for name in registry.KERNELS
        if all(row.tile.cp_async for row in selector.rows_of(name))
    }
    expected = with_cp_async if arch == "sm_75" else set()
    expected |= {name for name, kernel in registry.KERNELS.items() if not kernel.runs_on(arch)}
    assert missing == expected < set(registry.KERNELS)


def test_every_row_is_built_somewhere() -> None:
    for row in table.ROWS:
        assert any(_configs(row, arch) for arch in targets.TARGETS), row


@pytest.mark.parametrize("arch", targets.TARGETS)
@pytest.mark.parametrize("kernel", ["wmma_fused_32"])
def test_the_32_rung_stays_small(built, kernel: str, arch: str) -> None:
    """The original's own limits for its first fused kernel."""
    assert built[kernel, arch]
    for config, compiled in built[kernel, arch]:
        assert compiled.entries["wmma_fused"].registers <= 96, config
        if config.head_dim <= 96:
            assert config.smem_bytes <= 48 * 1024, config


def test_cold_compiles_are_quick(built) -> None:
    """Each rung builds in 3 s; the quickest build of each, since all cores are busy here."""
    for kernel in registry.KERNELS:
        of_all = [pair for (name, _), pairs in built.items() if name == kernel for pair in pairs]
        assert min((c.compile_seconds for _, c in of_all), default=0.0) <= 3.0, kernel
