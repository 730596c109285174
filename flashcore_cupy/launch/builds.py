"""What gets compiled for a problem or a table row, and what each build takes of a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from flashcore_cupy.cuda.targets import target_without_gpu
from flashcore_cupy.jit import compiler, nvrtc
from flashcore_cupy.problem.attention_problem import DTYPES, contiguous_problem
from flashcore_cupy.problem.gradients import BackwardProblem, contiguous_gradients
from flashcore_cupy.select import backward, backward_table, registry, selector
from flashcore_cupy.select.backward_table import BACKWARD_KERNELS
from flashcore_cupy.select.config import KernelConfig
from flashcore_cupy.select.row import Row

#: All whose rows are compiled ahead, of both passes.
KERNELS = (*registry.KERNELS, *BACKWARD_KERNELS)

OnDone = Callable[[compiler.CompiledKernel | Exception], None]


@dataclass(frozen=True)
class Build:
    """One compiled configuration and its resources. Bytes; shared and local memory per block."""

    kernel: str
    source: str
    arch: str
    from_cache: bool
    compile_seconds: float
    dynamic_shared_bytes: int
    entries: Mapping[str, nvrtc.EntryResources]

    @property
    def registers(self) -> int:
        """Registers per thread of the entry point that takes most."""
        return max(entry.registers for entry in self.entries.values())

    @property
    def shared_bytes(self) -> int:
        """Dynamic and static shared memory of the entry point that takes most."""
        return self.dynamic_shared_bytes + max(e.shared_bytes for e in self.entries.values())

    @property
    def local_bytes(self) -> int:
        """Stack frame per thread of the entry point that takes most."""
        return max(entry.local_bytes for entry in self.entries.values())

    @property
    def spill_bytes(self) -> int:
        """Bytes spilled, all entry points together."""
        return sum(entry.spill_bytes for entry in self.entries.values())

    def resources(self) -> dict[str, int]:
        """Return the four figures under the names that every JSON of this package uses."""
        names = ("registers", "shared_bytes", "local_bytes", "spill_bytes")
        return {name: int(getattr(self, name)) for name in names}

    def to_json(self) -> dict[str, Any]:
        """Return everything, with the summary of ``resources`` beside the single entry points."""
        return {
            "kernel": self.kernel,
            "source": self.source,
            "arch": self.arch,
            "from_cache": self.from_cache,
            "compile_seconds": self.compile_seconds,
            "dynamic_shared_bytes": self.dynamic_shared_bytes,
            **self.resources(),
            "entries": {name: asdict(entry) for name, entry in self.entries.items()},
        }


def combined(builds: Sequence[Build]) -> dict[str, Any]:
    """Resources of several builds that run after each other: the most of each, spills summed."""
    figures = [build.resources() for build in builds]
    most = {name: max(f[name] for f in figures) for name in figures[0]}
    return most | {"spill_bytes": sum(f["spill_bytes"] for f in figures)}


def describe_build(config: KernelConfig, compiled: compiler.CompiledKernel) -> Build:
    """Join a configuration with what the compiler made of it."""
    return Build(
        kernel=config.kernel,
        source=compiled.source,
        arch=compiled.arch,
        from_cache=compiled.from_cache,
        compile_seconds=compiled.compile_seconds,
        dynamic_shared_bytes=config.smem_bytes,
        entries=compiled.entries,
    )


def job_of(config: KernelConfig, arch: str) -> compiler.Job:
    """Return what ``jit.compile_many`` takes for a configuration."""
    return config.source, config.defines(), arch, config.headers


def build(config: KernelConfig, arch: str) -> Build:
    """Compile one configuration, or take it from the cache. Raises ``jit.CompileError``."""
    return describe_build(config, compiler.compile_kernel(*job_of(config, arch)))


def build_all(
    wanted: Sequence[tuple[KernelConfig, str]], on_done: OnDone | None = None
) -> list[Build]:
    """Compile (configuration, target) pairs in parallel processes, in the order given.

    Raises the first failure, such as ``jit.CompileError``, once all the others are done.
    """
    compiled = compiler.compile_many([job_of(*pair) for pair in wanted], on_done=on_done)
    return [describe_build(pair[0], c) for pair, c in zip(wanted, compiled, strict=True)]


def build_each(
    wanted: Sequence[tuple[KernelConfig, str]], on_done: OnDone | None = None
) -> list[Build | nvrtc.CompileError]:
    """``build_all``, where a configuration that does not compile gives its error instead."""
    made = []
    results = compiler.compile_each([job_of(*pair) for pair in wanted], on_done=on_done)
    for (config, _), result in zip(wanted, results, strict=True):
        if isinstance(result, Exception) and not isinstance(result, nvrtc.CompileError):
            raise result
        made.append(result if isinstance(result, Exception) else describe_build(config, result))
    return made


def what(done: compiler.CompiledKernel | Exception) -> str:
    """Word for a progress bar about what ``on_done`` was called with."""
    return done.source if isinstance(done, compiler.CompiledKernel) else "failed"


def table_configs(kernels: Iterable[str], arch: str) -> Iterator[KernelConfig]:
    """Every row of the tables for these kernels on a target: its dtypes, causal and not.

    Rows that the target cannot run (no cp.async, too little shared memory) are left out, and those
    that it never takes because one before them fits.
    """
    seen: set[KernelConfig] = set()
    for name in kernels:
        found = _backward_configs if name in BACKWARD_KERNELS else _forward_configs
        for config in found(name, arch):
            if config not in seen:
                seen.add(config)
                yield config


def _forward_configs(name: str, arch: str) -> Iterator[KernelConfig]:
    kernel = registry.KERNELS[name]
    for dtype, causal in product(kernel.dtypes, (False, True)):
        served = set()
        for row in selector.rows_of(name):
            meant_for = (row.dims, row.sizes)
            if dtype not in row.dtypes or meant_for in served:
                continue
            try:
                config = _row_config(row, dtype, causal, arch)
            except ValueError:
                continue
            served.add(meant_for)
            yield from selector.Selection(kernel, config).configs


def _backward_configs(name: str, arch: str) -> Iterator[KernelConfig]:
    """Of a row's dims, the first row that fits."""
    for dtype, causal in product(DTYPES, (False, True)):
        rows = (row for row in backward_table.ROWS if row.kernel == name and dtype in row.dtypes)
        for dims in dict.fromkeys(row.dims for row in rows):
            with contextlib.suppress(ValueError):
                problem = _gradients_of(dims, dtype, causal)
                yield from backward.select_backward(problem, arch, kernel=name).configs


def why_none(kernel: str, arch: str) -> str | None:
    """Why ``table_configs`` has nothing of a kernel for a target; None if it has something."""
    if next(table_configs([kernel], arch), None) is not None:
        return None
    try:
        if kernel in BACKWARD_KERNELS:
            first = next(row for row in backward_table.ROWS if row.kernel == kernel)
            problem = _gradients_of(first.dims, first.dtypes[0], False)
            backward.select_backward(problem, arch, kernel=kernel)
        else:
            row = selector.rows_of(kernel)[0]
            _row_config(row, row.dtypes[0], False, arch)
    except ValueError as error:
        return str(error).removeprefix(f"kernel {kernel!r}: ")
    return None


def _row_config(row: Row, dtype: str, causal: bool, arch: str) -> KernelConfig:
    dim, dim_v = row.dims
    problem = contiguous_problem(1, 1, 1, dim, head_dim_v=dim_v, dtype=dtype, causal=causal)
    return selector.check_target(row, selector.configure_row(row, problem), arch)


def _gradients_of(dims: tuple[int, int], dtype: str, causal: bool) -> BackwardProblem:
    problem = contiguous_problem(1, 1, 1, dims[0], head_dim_v=dims[1], dtype=dtype, causal=causal)
    return contiguous_gradients(problem)


def target(arch: str | None, *, on_gpu: bool) -> str:
    """The target to compile for: the GPU's own, or ``arch``, or the default without a GPU."""
    if on_gpu:
        return compiler.device_arch()
    return target_without_gpu(arch)
