"""Every row of the table, built for every target: no spills, no local memory, no warnings.

Nothing here needs a GPU. All builds go through one parallel warm-up into the session's cache.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from conftest import compiler_skip_reason

from flashcore_cupy import builds, jit, tiles
from flashcore_cupy.config import KernelConfig
from flashcore_cupy.problem import ITEMSIZE, contiguous_problem

MAIN_TARGET = "sm_90a"
GATES = (None, "qk", "softmax", "pv")


def _configs(row: tiles.Row, arch: str, *, all_pairs: bool) -> list[KernelConfig]:
    """The row's builds on a target: dtypes x causal in full, or pairwise; and each gate once."""
    kernel = tiles.KERNELS[row.kernel]
    pairs = [(dtype, causal) for dtype in kernel.dtypes for causal in (False, True)]
    if not all_pairs:
        pairs = [pairs[0], pairs[-1]]
    rules: list[tuple[str, bool, str | None]] = [(*pair, None) for pair in pairs]
    rules += [(*pairs[i % len(pairs)], gate) for i, gate in enumerate(GATES) if gate and all_pairs]
    found = []
    for dtype, causal, gate in rules:
        problem = contiguous_problem(1, 1, 64, row.head_dim, dtype=dtype, causal=causal, gate=gate)
        try:
            config = tiles.check_target(row, tiles.configure_row(row, problem), arch)
        except ValueError:
            continue
        found += tiles.configs_of(tiles.Selection(kernel, config))
    if all_pairs and found:  # narrow loads; and fewer columns than the tile's, unlike for q and v
        narrow = replace(found[-1], align_bytes=ITEMSIZE[found[-1].dtype])
        uneven = replace(found[0], dim_qk=row.head_dim - 8, dim_v=max(8, row.head_dim - 24))
        found += [narrow] if row.kernel == "scalar" else [narrow, uneven]
    return list(dict.fromkeys(found))


WANTED = {
    (kernel, arch): [
        config
        for row in tiles.rows_of(kernel)
        for config in _configs(row, arch, all_pairs=arch == MAIN_TARGET)
    ]
    for kernel in tiles.KERNELS
    for arch in tiles.TARGETS
}


@pytest.fixture(scope="module")
def built() -> dict[tuple[str, str], list[tuple[KernelConfig, jit.CompiledKernel]]]:
    if reason := compiler_skip_reason():
        pytest.skip(reason)
    jobs = [(c, arch) for (_, arch), configs in WANTED.items() for c in configs]
    compiled = iter(jit.compile_many([builds.job_of(*job) for job in jobs]))
    return {key: [(c, next(compiled)) for c in configs] for key, configs in WANTED.items()}


@pytest.mark.parametrize(("kernel", "arch"), WANTED)
def test_builds_without_spills(built, kernel: str, arch: str) -> None:
    expected_entries = {"fp8_quantize.cu": {"fp8_quantize"}}
    for config, compiled in built[kernel, arch]:
        entries = set(tiles.KERNELS[kernel].entries)
        assert set(compiled.entries) == expected_entries.get(config.source, entries)
        assert "warning" not in compiled.log, compiled.log
        for name, used in compiled.entries.items():
            # mma_sm80's tiles fill the registers; what a gate stores is too much for them.
            if config.gate is None or kernel != "mma_sm80":
                assert used.spill_bytes == 0, f"{name} spills: {config}"
                assert used.local_bytes == 0, f"{name} uses local memory: {config}"
            assert used.shared_bytes == 0, "all shared memory is dynamic"
            assert used.registers * config.threads <= 65536, "a block fits the register file"


@pytest.mark.parametrize("arch", tiles.TARGETS)
def test_which_kernels_a_target_has(arch: str) -> None:
    missing = {kernel for kernel in tiles.KERNELS if not WANTED[kernel, arch]}
    with_cp_async = {"wmma_unfused", "wmma_cp_async", "wmma_warp_softmax", "mma_sm80"}
    assert missing == (with_cp_async if arch == "sm_75" else set())


def test_every_row_is_built_somewhere() -> None:
    for row in tiles.ROWS:
        assert any(_configs(row, arch, all_pairs=True) for arch in tiles.TARGETS), row


@pytest.mark.parametrize("arch", tiles.TARGETS)
def test_the_32_rung_stays_small(built, arch: str) -> None:
    """The original's own limits for its first fused kernel."""
    assert built["wmma_fused_32", arch]
    for config, compiled in built["wmma_fused_32", arch]:
        assert compiled.entries["wmma_fused"].registers <= 96, config
        if config.head_dim <= 96:
            assert config.smem_bytes <= 48 * 1024, config


def test_cold_compiles_are_quick(built) -> None:
    """Each rung builds in 3 s; the quickest build of each, since all cores are busy here."""
    for (kernel, arch), pairs in built.items():
        assert min((c.compile_seconds for _, c in pairs), default=0.0) <= 3.0, (kernel, arch)


@pytest.mark.parametrize("arch", tiles.TARGETS)
def test_auto_finds_a_tensor_core_kernel(arch: str) -> None:
    for dim in tiles.WMMA_HEAD_DIMS:
        problem = contiguous_problem(1, 8, 512, dim)
        assert tiles.select(problem, arch).kernel.name.startswith(("mma", "wmma"))
