"""Which kernel and tile a problem gets on a target, and why faster kernels were passed over."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

from flashcore_cupy.cuda.targets import capability, smem_limit
from flashcore_cupy.problem.attention_problem import AttentionProblem, Operand, check_choice
from flashcore_cupy.select import own_lists
from flashcore_cupy.select.config import KernelConfig, check_overrides
from flashcore_cupy.select.grids import check_sizes
from flashcore_cupy.select.registry import AUTO_ORDER, KERNELS, Kernel
from flashcore_cupy.select.row import Row
from flashcore_cupy.select.table import ROWS
from flashcore_cupy.select.tile_lists import TakesLists


@dataclass(frozen=True)
class Selection:
    """The kernel that a problem gets on a target, and why the faster ones were passed over."""

    kernel: Kernel
    config: KernelConfig
    passed_over: tuple[tuple[str, str], ...] = ()
    why_unlisted: str | None = None
    """Why the kernel itself asks a mask_mod, score by score; None of a call without."""

    def seen(self, problem: AttentionProblem) -> AttentionProblem:
        """The problem as the kernel sees it: with lists, if its own call makes them."""
        return own_lists.with_lists(problem) if self.config.tile.own_lists else problem

    @property
    def name(self) -> str:
        """The kernel's."""
        return self.kernel.name

    @property
    def configs(self) -> tuple[KernelConfig, ...]:
        """Each that is launched, in launch order."""
        return (*self.config.before(), self.config)

    def describe(self) -> str:
        """One line for people about the kernel's tile."""
        return self.config.describe()

    def stored_to(self, problem: AttentionProblem, output: Operand) -> Selection:
        """The same for an output; ``ValueError`` if a launch cannot have so many blocks."""
        check_sizes(problem, self.config)
        return replace(self, config=self.config.stored_to(output))

    def explained(self, arch: str) -> list[str]:
        """Return a line for the kernel on its target, and one for each that was passed over."""
        lines = [f"{self.name} on {arch}: {self.describe()}"]
        if isinstance(self.config, TakesLists):
            lines += self.config.told()
        if self.why_unlisted is not None:
            lines.append(f"mask_mod: asked score by score, not ahead: {self.why_unlisted}")
        return lines + [f"passed over {name}: {reason}" for name, reason in self.passed_over]


def rows_of(kernel: str) -> list[Row]:
    """The rows of a kernel, in order of preference."""
    return [row for row in ROWS if row.kernel == kernel]


def configure(
    problem: AttentionProblem,
    kernel: Kernel,
    arch: str,
    overrides: Mapping[str, object] | None = None,
    *,
    auto: bool = False,
) -> KernelConfig:
    """The kernel's configuration for a problem; ``ValueError`` says why there is none.

    ``auto``: also where another kernel is meant for grids as small as this one.
    """
    if problem.dtype not in kernel.dtypes:
        raise ValueError(f"takes {' and '.join(kernel.dtypes)}, not {problem.dtype}")
    _refuse(kernel.family.why_not_on(arch))
    kernel.family.check_problem(problem)
    lists = problem.rules.block_mask
    if lists is not None:
        family = kernel.family
        if not (issubclass(family, TakesLists) and family.takes_blocks):
            raise ValueError(f"has no {'own_lists' if lists.made else 'block_mask'}")
    if auto:
        _refuse(kernel.family.why_slow(problem))
    dims = (problem.head_dim, problem.head_dim_v)
    own = [row for row in rows_of(kernel.name) if problem.dtype in row.dtypes]
    wide = {row.dims for row in own if row.dims[0] >= dims[0] and row.dims[1] >= dims[1]}
    if not wide:
        most = max(row.head_dim for row in own)
        asked = "/".join(map(str, dict.fromkeys(dims)))
        raise ValueError(f"takes head dims up to {most} in {problem.dtype}, not {asked}")
    reasons = []
    narrowest = min(wide, key=lambda dims: (sum(dims), dims))
    meant = [row for row in own if row.dims == narrowest and row.serves(problem)]
    filled = [row for row in meant if not row.unfilled_by(problem)]
    filled.sort(key=lambda row: row.grid_cost(problem))  # otherwise as they stand in the table
    if auto and meant and not filled:
        raise ValueError(meant[0].unfilled_by(problem))
    if not auto:
        filled += [row for row in meant if row not in filled]
    for row in filled:
        try:
            return check_target(row, configure_row(row, problem, overrides), arch)
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError(reasons[0])


def configure_row(
    row: Row, problem: AttentionProblem, overrides: Mapping[str, object] | None = None
) -> KernelConfig:
    """Join a row with a problem, for any target; ``ValueError`` says what is wrong with a tile."""
    kernel = KERNELS[row.kernel]
    tile = row.tile
    if issubclass(kernel.family, TakesLists):
        tile = kernel.family.tile_for(tile, problem)
    tile = tile.override(overrides or {})
    config = kernel.family.of(kernel.name, row.dims, tile, problem)
    config.check()
    config.check_heads(problem)
    return config


def _refuse(reason: str | None) -> None:
    if reason is not None:
        raise ValueError(reason)


def check_target(row: Row, config: KernelConfig, arch: str) -> KernelConfig:
    """Return the row's configuration; ``ValueError`` says what of it the target lacks."""
    _refuse(KERNELS[row.kernel].family.why_not_on(arch))
    if row.max_arch is not None and capability(arch) > row.max_arch:
        raise ValueError(f"has a row up to sm_{row.max_arch} alone, the target is {arch}")
    if row.min_arch is not None and capability(arch) < row.min_arch:
        raise ValueError(f"has a row from sm_{row.min_arch} on alone, the target is {arch}")
    _check_fits(config, arch)
    return config


def _check_fits(config: KernelConfig, arch: str) -> None:
    """Raise ``ValueError`` if ``arch`` lacks instructions or shared memory that it takes."""
    needs = None
    if config.tile.cp_async:
        needs = "cp.async"
    elif config.dtype == "bfloat16":
        needs = "bfloat16 conversions"
    if needs and capability(arch) < 80:
        raise ValueError(f"needs {needs}, hence sm_80 or later; the target is {arch}")
    if config.smem_bytes > smem_limit(arch):
        columns = max(config.dim_qk, config.dim_v)
        raise ValueError(
            f"needs {config.smem_bytes} bytes of shared memory at head dim {columns}, "
            f"{arch} has {smem_limit(arch)}; smaller tiles (block_m, block_n, num_stages) may fit"
        )


def select(
    problem: AttentionProblem,
    arch: str,
    *,
    kernel: str = "auto",
    overrides: Mapping[str, object] | None = None,
) -> Selection:
    """The kernel for a problem on a target.

    ``kernel`` names one, or is "auto" for the fastest that can do it. Raises ``ValueError`` with
    the reason if there is none.
    """
    check_choice("kernel", kernel, ("auto", *KERNELS))
    changes = check_overrides(overrides or {})
    return _select(problem, arch, kernel, tuple(changes.items()))


@functools.lru_cache(maxsize=4096)
def _select(
    problem: AttentionProblem, arch: str, kernel: str, changes: tuple[tuple[str, int | bool], ...]
) -> Selection:
    tile = dict(changes)
    if tile.pop("own_lists", own_lists.is_asked(problem)):
        if "own_lists" in dict(changes):
            own_lists.check(problem)
            return _chosen(own_lists.with_lists(problem), arch, kernel, tile)
        return _with_lists_if_they_pay(problem, arch, kernel, tile)
    found = _chosen(problem, arch, kernel, tile)
    forbidden = own_lists.is_asked(problem)
    return replace(found, why_unlisted="own_lists=False") if forbidden else found


def _with_lists_if_they_pay(
    problem: AttentionProblem, arch: str, kernel: str, changes: Mapping[str, int | bool]
) -> Selection:
    """What a problem with a mask_mod gets: the kernel asks it, or walks over lists of it."""
    asking = _chosen(problem, arch, kernel, changes)
    reason = own_lists.why_not(problem)
    if reason is None:
        listed = own_lists.with_lists(problem)
        try:
            found = _chosen(listed, arch, asking.name, changes)
            reason = own_lists.why_too_large(listed, found.config)
        except ValueError as error:  # of a kernel, or of a tile, that goes without lists
            reason = str(error)
        if reason is None:
            return replace(found, passed_over=asking.passed_over)
    return replace(asking, why_unlisted=reason)


def _chosen(
    problem: AttentionProblem, arch: str, kernel: str, changes: Mapping[str, int | bool]
) -> Selection:
    if kernel == "auto":
        fastest = _fastest(problem, arch)
        if not changes:
            return fastest
        passed_over, kernel = fastest.passed_over, fastest.kernel.name
    else:
        passed_over = ()
    try:
        config = configure(problem, KERNELS[kernel], arch, changes)
    except ValueError as error:
        raise ValueError(f"kernel {kernel!r}: {error}") from None
    return Selection(KERNELS[kernel], config, passed_over)


def _fastest(problem: AttentionProblem, arch: str) -> Selection:
    passed_over: list[tuple[str, str]] = []
    for name in AUTO_ORDER:
        if not KERNELS[name].family.is_meant_for(problem):
            continue
        try:
            config = configure(problem, KERNELS[name], arch, auto=True)
        except ValueError as error:
            passed_over.append((name, str(error)))
        else:
            return Selection(KERNELS[name], config, tuple(passed_over))
    reasons = "; ".join(f"{name} {why}" for name, why in passed_over)
    raise ValueError(f"kernel: none can do this problem on {arch}: {reasons}")
