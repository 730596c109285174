"""The backward pass: which kernels a problem gets on a target, their tiles, and their launches.

A backward pass is a few kernels, one after the other: what belongs to each query; dK and dV of
blocks of keys; dQ of blocks of queries. What is not asked for is neither built nor launched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from flashcore_cupy.cuda.targets import smem_limit
from flashcore_cupy.problem.array_spec import usable
from flashcore_cupy.problem.attention_problem import AttentionProblem, check_choice
from flashcore_cupy.problem.gradients import BackwardCall, BackwardProblem
from flashcore_cupy.select import grids
from flashcore_cupy.select.backward_table import BACKWARD_KERNELS, BackwardRow, rows_of
from flashcore_cupy.select.config import KernelConfig, Tile, check_overrides
from flashcore_cupy.select.parameters import fixed_params
from flashcore_cupy.select.plan import Launch, Params
from flashcore_cupy.select.sm80_backward import (
    BackwardHeads,
    BackwardModArgs,
    BackwardRows,
    BackwardScale,
    Sm80Backward,
    Sm80BackwardBias,
)
from flashcore_cupy.select.sm90_backward import Sm90Backward
from flashcore_cupy.select.tensor_view import View
from flashcore_cupy.select.tile_lists import TileLister, is_listed
from flashcore_cupy.select.units import MAX_GRID, round_up

_BIAS_AXES = ("batches", "heads", "rows", "columns")
# Of so many thread blocks that own keys, those of several heads are interleaved: as many as run
# side by side on the larger GPUs. Blocks of one head wait for each other's additions to dq.
_SECTION_BLOCKS = 132
_ROWS_TILE, _HEADS_TILE = Tile(16, 16, warps_m=4), Tile(16, 16, warps_m=8)


@dataclass(frozen=True)
class BackwardSelection:
    """The kernels that a problem's gradients get on a target; None where one is not needed."""

    name: str
    rows: BackwardRows
    keys: Sm80Backward | None
    queries: Sm80Backward | None
    scale: BackwardScale | None
    bias: Sm80BackwardBias | None
    heads: BackwardHeads | None
    mod_args: tuple[BackwardModArgs, ...] = ()
    passed_over: tuple[tuple[str, str], ...] = ()
    """Faster kernels, and why they cannot do it."""

    def scratch(self, problem: AttentionProblem) -> dict[str, tuple[int, ...]]:
        """Shapes of arrays, of 4 bytes each element, that kernels leave for those behind them.

        Numbers of each query; sums of dq, and whose turn it is to add; lists of tiles.
        """
        rows = problem.lse_shape
        found = {"delta": rows, "shift": rows}
        if self.queries is not None and self.queries.sums:
            found["distances"] = (self.queries.sums, *rows)
        if self.keys is not None and self.scale is not None:
            tiles = self.scale.tiles(problem)
            found["dq_sum"] = (tiles * self.scale.tile.block_n * self.scale.head_dim,)
            if self.keys.ordered:
                found["turns"] = (round_up(1 + tiles, 4),)
        for lister in self._listers:
            found |= {name: shape for name, (shape, _) in lister.lists(problem).items()}
        return found

    @property
    def _listers(self) -> list[TileLister]:
        """What makes lists of tiles for the passes."""
        every = (config.lister for _, config in self._passes)
        return [lister for lister in every if lister is not None]

    @property
    def _passes(self) -> list[tuple[str, Sm80Backward]]:
        """The kernels that take tiles, and what each computes."""
        of_keys = "dk, dv" if self.scale is None else "dq, dk, dv"
        every = (of_keys, self.keys), ("dq", self.queries), ("dbias", self.bias)
        return [(what, config) for what, config in every if config is not None]

    @property
    def configs(self) -> tuple[KernelConfig, ...]:
        """Each that is launched, in launch order."""
        every = (self.keys, self.queries, self.scale, self.bias, self.heads)
        found = (config for config in every if config is not None)
        return (self.rows, *self._listers, *found, *self.mod_args)

    @staticmethod
    def views(config: KernelConfig, problem: BackwardProblem) -> tuple[View, ...]:
        """What the tensor maps of a launch show; none if the kernel takes none."""
        return config.own_views(problem) if isinstance(config, Sm90Backward) else ()

    def describe(self) -> str:
        """One line for people about the tiles of each pass."""
        return "; ".join(f"{what}: {config.describe()}" for what, config in self._passes)

    def explained(self, arch: str) -> list[str]:
        """Return a line for each kernel that takes tiles, and for each that was passed over."""
        lines = [f"{self.name} on {arch}, {what}: {x.describe()}" for what, x in self._passes]
        lines += dict.fromkeys(lister.told() for lister in self._listers)
        return lines + [f"passed over {name}: {reason}" for name, reason in self.passed_over]


def select_backward(
    problem: BackwardProblem,
    arch: str,
    *,
    kernel: str = "auto",
    overrides: Mapping[str, object] | None = None,
) -> BackwardSelection:
    """The kernels for a problem's gradients on a target.

    Raises ``ValueError`` with the reason if there are none.
    """
    check_choice("kernel", kernel, ("auto", *BACKWARD_KERNELS))
    return _select(problem, arch, kernel, tuple(check_overrides(overrides or {}).items()))


@functools.lru_cache(maxsize=4096)
def _select(
    problem: BackwardProblem, arch: str, kernel: str, changes: tuple[tuple[str, int | bool], ...]
) -> BackwardSelection:
    passed_over: list[tuple[str, str]] = []
    meant = (n for n, x in BACKWARD_KERNELS.items() if x.is_meant_for(problem.attention))
    for name in meant if kernel == "auto" else (kernel,):
        try:
            why_slow = BACKWARD_KERNELS[name].why_slow(problem.attention)
            if kernel == "auto" and why_slow:
                raise ValueError(why_slow)
            selection = _configure(name, problem, arch, dict(changes))
        except ValueError as error:
            passed_over.append((name, str(error)))
        else:
            return replace(selection, passed_over=tuple(passed_over))
    if kernel != "auto":
        raise ValueError(f"kernel {kernel!r}: {passed_over[0][1]}")
    reasons = "; ".join(f"{name} {why}" for name, why in passed_over)
    raise ValueError(f"kernel: none has the gradients of this problem on {arch}: {reasons}")


def _configure(
    name: str, problem: BackwardProblem, arch: str, changes: Mapping[str, object]
) -> BackwardSelection:
    """The first of a kernel's rows that fits; ``ValueError`` if none does."""
    if reason := BACKWARD_KERNELS[name].why_not(problem, arch):
        raise ValueError(reason)
    reasons = []
    for row in rows_of(name, problem.attention):
        try:
            return _configure_row(row, problem, arch, changes)
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError(reasons[0])


def _configure_row(
    row: BackwardRow, problem: BackwardProblem, arch: str, changes: Mapping[str, object]
) -> BackwardSelection:
    name, attention = row.kernel, problem.attention
    row.check(attention)
    asked = {result.name: result for result in problem.results}
    stored = [problem.do, problem.o]
    stored += [r.operand for r in problem.results if r.operand and r.dtype == attention.dtype]
    align_bytes = min(attention.align_bytes, *(operand.align_bytes for operand in stored))

    def of(family: type[Sm80Backward], tile: Tile, dims: tuple[int, int], **own: Any) -> Any:
        joined = family.of(name, dims, tile, attention)
        config = replace(
            cast(Sm80Backward, joined),
            align_bytes=align_bytes,
            fp32=tuple(r.name for r in problem.results if r.dtype == "float32"),
            accumulates=problem.accumulate,
            score_mod_grad=problem.score_mod_grad,
            gate=problem.gate,
            **own,
        )
        config.check()
        _check_fits(config, arch)
        return config

    family, slopes = BACKWARD_KERNELS[name], "dalibi_slopes" in asked
    keys = queries = bias = heads = scale = None
    wants_keys = not asked.keys().isdisjoint(family.of_keys)
    tile = row.keys.override(changes)
    columns = family.dq_columns(row.head_dim, tile)
    adds_dq = wants_keys and "dq" in asked and not slopes and columns > 0 and _has_turns(attention)
    if wants_keys:
        ordered = adds_dq and problem.deterministic
        keys = of(family, tile, row.dims, owns_keys=True, adds_dq=adds_dq, ordered=ordered)
    if adds_dq:
        units = BackwardScale.of(name, row.dims, Tile(64, tile.block_n, warps_m=4), attention)
        scale = replace(
            cast(BackwardScale, units),
            columns=columns,
            align_bytes=align_bytes,
            is_fp32=asked["dq"].dtype == "float32",
            accumulates=problem.accumulate,
        )
    tile = row.queries.override(changes)
    mods = BackwardModArgs.of_each(name, row.dims, tile, problem)
    if ("dq" in asked and not adds_dq and "dq" not in family.of_keys) or slopes or mods:
        queries = of(family, tile, row.dims, sums_distances=slopes, elements=problem.elements)
    if "dbias" in asked:
        plain = rows_of("bwd_sm80", attention)[-1]
        shape = _of_four(asked["dbias"].shape, 1)
        one = replace(plain.queries, num_stages=1)
        bias = of(Sm80BackwardBias, one, plain.dims, bias_shape=shape)
    if "dsink" in asked or slopes:
        per_head = BackwardHeads.of(name, row.dims, _HEADS_TILE, attention)
        heads = replace(cast(BackwardHeads, per_head), accumulates=problem.accumulate)
    rows = replace(
        cast(BackwardRows, BackwardRows.of(name, row.dims, _ROWS_TILE, attention)),
        align_bytes=min(problem.do.align_bytes, problem.o.align_bytes),
    )
    return BackwardSelection(name, rows, keys, queries, scale, bias, heads, mods)


def _has_turns(attention: AttentionProblem) -> bool:
    """Whether all blocks of keys that see a tile of queries come to it, by turns.

    Of a block mask only the device knows which do.
    """
    return attention.seqlen_q > 0 and attention.rules.block_mask is None


def _of_four(axes: Sequence[int], missing: int) -> tuple[int, int, int, int]:
    """Sizes or strides of an array that broadcasts to (B, Hq, Sq, Skv), of all four axes."""
    return (*(missing,) * (4 - len(axes)), *axes)  # type: ignore[return-value]


def _check_fits(config: KernelConfig, arch: str) -> None:
    if config.smem_bytes > smem_limit(arch):
        raise ValueError(
            f"needs {config.smem_bytes} bytes of shared memory, {arch} has {smem_limit(arch)}; "
            f"smaller tiles (block_m, block_n, num_stages) may fit"
        )


def backward_params(problem: BackwardProblem, selection: BackwardSelection) -> Params:
    """``BackwardParams`` with all addresses 0."""
    attention = problem.attention
    of_blocks = selection.queries or selection.rows
    params = fixed_params(attention, of_blocks, problem.o, resident=1, multiprocessors=1)
    params["seqlen_kv"] = attention.seqlen_kv  # keys that no query sees have gradients: zeros
    params["dlse_strides"] = params["lse_strides"]
    for operand in (problem.do, *(r.operand for r in problem.results if r.operand)):
        params[f"{pointer_of(operand.name)}_strides"] = operand.strides
    for name, shape in selection.scratch(attention).items():
        if name in ("dq_sum", "turns"):
            (params[f"{name}_size"],) = shape
    if selection.keys is not None:
        params["n_blocks"] = selection.keys.own_blocks(attention)
        params["section"] = -(-_SECTION_BLOCKS // max(1, selection.keys.own_blocks(attention)))
    results = {result.name: result for result in problem.results}
    if bias := results.get("dbias"):
        params["dbias_strides"] = _of_four(bias.strides, 0)
        for axis, size in zip(_BIAS_AXES, _of_four(bias.shape, 1), strict=True):
            params[f"bias_{axis}"] = size
    if slopes := results.get("dalibi_slopes"):
        strides = slopes.strides if len(slopes.strides) == 2 else (0, *slopes.strides)
        params["dalibi_slopes_strides"] = strides
    return params


def pointer_of(name: str) -> str:
    """The field of ``BackwardParams`` for an array; C++ has a use of its own for "do"."""
    return {"do": "dout"}.get(name, name)


def arrays_of(call: BackwardCall, xp: Any, boundaries: Callable[[Any], Any]) -> dict[str, Any]:
    """What kernels read of a call, by the names in ``BackwardParams``; copied where need be.

    ``xp``: CuPy or NumPy; ``boundaries`` brings cu_seqlens to where the kernels run.
    """
    arrays = {name: usable(call.arrays[name], xp) for name in ("q", "k", "v", "o")}
    arrays["dout"] = usable(call.arrays["do"], xp)
    for name in ("lse", "dlse"):
        if name in call.arrays:
            arrays[name] = xp.ascontiguousarray(call.arrays[name])
    return arrays | call.forward.pointers(xp, boundaries=boundaries)


def backward_launches(
    problem: BackwardProblem,
    selection: BackwardSelection,
    params: Params,
    addresses: Mapping[str, int],
    mod_args: Sequence[int],
    encode: Callable[[int, View], Params],
) -> Iterator[Launch]:
    """Yield every launch, in order.

    ``addresses``: of the arrays, by their names in ``BackwardParams``; ``mod_args``: of the mods'.
    ``encode``: makes the tensor map of an array at an address.
    """
    for name in addresses.keys() & set(params.dtype.names or ()):  # mod_args' gradients have none
        params[name] = addresses[name]
    params["mod_args"][: len(mod_args)] = mod_args
    for number, config in enumerate(selection.configs):
        grid = config.grids(problem.attention, 0)[0]
        if grid > min(MAX_GRID, grids.MAX_BLOCKS):
            raise ValueError(f"q: needs {grid} thread blocks; split the batch over several calls")
        if grid:
            own = _own_params(config, problem, params, addresses, encode)
            yield Launch(number, config, config.entries[0], grid, own)


def _own_params(
    config: KernelConfig,
    problem: BackwardProblem,
    params: Params,
    addresses: Mapping[str, int],
    encode: Callable[[int, View], Params],
) -> Params:
    """The struct that a kernel takes: with the tensor maps, lists, mod_args that only it has."""
    is_own = isinstance(config, Sm90Backward | BackwardModArgs | TileLister)
    if not is_own and not is_listed(config):
        return params
    own = np.zeros((), config.params)
    shared = () if isinstance(config, TileLister) else config.params.names or ()
    for name in shared:
        if name in (params.dtype.names or ()):
            own[name] = params[name]
    config.bind(own, problem.attention, addresses)
    for view in BackwardSelection.views(config, problem):
        own[f"{view.name}_map"] = encode(addresses[view.name] or addresses["q"], view)
    return own
