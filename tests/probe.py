"""The probes of the PTX layer: kernels that run on each machine that is here.

A GPU is one, and a C++ compiler makes another: the emulator, under several schedules. A probe is
launched on all of them with the same arguments, and what they return is the same, bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pytest
from helpers import ROOT, gpu_skip_reason

from flashcore_cupy.cpu.emulator.build import Source, library, why_not
from flashcore_cupy.cpu.emulator.plan import tensor_map
from flashcore_cupy.cpu.emulator.run import Grid, Schedule
from flashcore_cupy.cpu.emulator.run import launch as emulate
from flashcore_cupy.cuda.targets import HOPPER, capability
from flashcore_cupy.jit import compiler
from flashcore_cupy.jit.sources import kernels_digest
from flashcore_cupy.select.tensor_view import View

FOLDER = ROOT / "tests" / "probes"
#: Of a GPU that runs a probe; those of Hopper's instructions run on that generation alone.
CAPABILITY = {"thread": 75, "warp": 75, "global": 75, "key_bits": 75}
HOPPERS = ("cluster", "launches", "mbarrier", "tma", "wgmma")
needs_emulator = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
SCHEDULES = (Schedule(0, 0), Schedule(1, 30), Schedule(2, 100))
#: Probes of what orders threads, in which a checking build finds no race.
CHECKED = ("cluster", "cp_async", "mbarrier", "tma", "warp")


@dataclass(frozen=True, eq=False)
class Map:
    """A tensor map of the part of an array (batch, head, row, column) that is ``inside``.

    Its boxes are ``rows`` x ``swizzle`` bytes of each of ``heads``.
    """

    array: np.ndarray
    inside: tuple[slice, ...]
    swizzle: int
    rows: int
    heads: int = 1

    @property
    def view(self) -> View:
        part, size = self.array[self.inside], self.array.itemsize
        strides = part.strides[2::-1]
        offset = part.ctypes.data - self.array.ctypes.data
        box = (self.swizzle // size, self.rows, self.heads)
        return View("x", self.array.dtype.name, part.shape[::-1], strides, box, offset)


@dataclass(frozen=True)
class Launch:
    """A launch's shape."""

    kernel: str
    threads: int
    blocks: int = 1
    shared: int = 0
    cluster: int = 1


class Machine(Protocol):
    """What runs a launch on arrays, in place."""

    arch: str

    def run(self, launch: Launch, arguments: Sequence[Any]) -> None: ...


class Gpu:
    """The GPU of this machine."""

    def __init__(self, probe: str) -> None:
        self.arch = HOPPER if probe in HOPPERS else compiler.device_arch()
        self.module = compiler.load(compiler.compile_kernel(f"probe_{probe}.cu", {}, self.arch))

    def run(self, launch: Launch, arguments: Sequence[Any]) -> None:
        import cupy

        from flashcore_cupy.launch.tensor_map import encode

        given, copies = [], []
        for argument in arguments:
            array = argument.array if isinstance(argument, Map) else argument
            if isinstance(array, np.generic):
                given.append(array)
                continue
            copies.append((array, cupy.asarray(array)))
            given.append(copies[-1][1])
            if isinstance(argument, Map):
                given[-1] = np.zeros((), [("opaque", np.uint64, 16)])
                given[-1]["opaque"] = encode(copies[-1][1].data.ptr, argument.view)
        function = self.module.get_function(launch.kernel)
        if launch.shared > 48 * 1024:
            compiler.allow_shared_memory(function, launch.shared)
        function((launch.blocks,), (launch.threads,), tuple(given), shared_mem=launch.shared)
        for array, copy in copies:
            array[...] = copy.get()


@dataclass(frozen=True)
class Emulator:
    """The emulator, which does in one order what may happen in any."""

    probe: str
    arch: str
    schedule: Schedule
    checking: bool = False

    def run(self, launch: Launch, arguments: Sequence[Any]) -> None:
        params = bytearray()
        for argument in arguments:
            if isinstance(argument, Map):
                own = tensor_map(argument.view, argument.array.ctypes.data)
            else:
                own = argument if isinstance(argument, np.generic) else argument.ctypes.data
                own = np.array([own])
            align = 64 if isinstance(argument, Map) else own.itemsize
            params += bytes(-len(params) % align) + own.tobytes()
        made = library(source(self.probe, self.arch), checking=self.checking)
        grid = Grid(launch.blocks, launch.threads, launch.shared, launch.cluster)
        emulate(made, launch.kernel, bytes(params), grid, self.schedule, keep=arguments)


def source(probe: str, arch: str) -> Source:
    """What the emulator builds a probe from."""
    # A library is known by what it is built from, but of a file that is not in kernels/ by its text
    # alone.
    included = {"KERNELS": kernels_digest()}
    return Source(str(FOLDER / f"{probe}.cu"), tuple(entries(probe)), arch, included)


def entries(probe: str) -> list[str]:
    """The kernels of a probe, those that a macro makes included."""
    text = re.sub(r"__\w+__\([^)]*\)", "", (FOLDER / f"{probe}.cu").read_text())
    found = re.findall(r"__global__ void\s+(\w+)\(", text)
    found += [f"pairs_{n}" for n in re.findall(r"^FC_PROBE\((\d+)\)$", text, re.MULTILINE)]
    form = r"^(SS|RS)\((\w+), (\d+), (\w+), (\d+)\)$"
    products = re.findall(form, text, re.MULTILINE)
    found += ["_".join((kind.lower(), *rest)) for kind, *rest in products]
    return [name for name in found if name != "nothing"]


def machines(probe: str, arch: str = HOPPER) -> dict[str, Machine]:
    """Those that are here and have the instructions of a probe; ``arch`` if there is no GPU."""
    found: dict[str, Machine] = {}
    if gpu_skip_reason() is None:
        device = compiler.device_arch()
        wanted = CAPABILITY.get(probe, 80)
        if capability(device) == 90 if probe in HOPPERS else capability(device) >= wanted:
            found["GPU"] = Gpu(probe)
            arch = found["GPU"].arch
    if why_not() is None:
        for schedule in SCHEDULES:
            found[f"emulator, seed {schedule.seed}"] = Emulator(probe, arch, schedule)
        if probe in CHECKED:
            found["checking emulator"] = Emulator(probe, arch, Schedule(3), checking=True)
    return found


@dataclass(frozen=True)
class Probe:
    """The kernels of one probe, launched on all machines."""

    machines: dict[str, Machine]

    def capability(self, machine: str) -> int:
        """Of a machine: 90 for sm_90a."""
        return capability(self.machines[machine].arch)

    def each(
        self, launch: Launch, inputs: Sequence[Any], outputs: Sequence[Any]
    ) -> dict[str, list]:
        """The outputs by the machine's name; parameters are the inputs, then the outputs."""
        results = {}
        for name, machine in self.machines.items():
            fresh = [_copy(argument) for argument in (*inputs, *outputs)]
            machine.run(launch, fresh)
            results[name] = [_array(argument) for argument in fresh[len(inputs) :]]
        return results

    def __call__(self, launch: Launch, inputs: Sequence[Any], outputs: Sequence[Any]) -> list:
        """The outputs, which are the same everywhere."""
        (name, first), *others = self.each(launch, inputs, outputs).items()
        for other, arrays in others:
            for i, (one, two) in enumerate(zip(first, arrays, strict=True)):
                assert_same_bits(two, one, f"{launch.kernel}, output {i}, {other} and {name}")
        return first


#: A probe by its name.
Probes = Callable[[str], Probe]


def _copy(argument: Any) -> Any:
    if isinstance(argument, Map):
        array = argument.array.copy()
        return Map(array, argument.inside, argument.swizzle, argument.rows, argument.heads)
    return argument if isinstance(argument, np.generic) else np.array(argument, order="C")


def _array(argument: Any) -> np.ndarray:
    return argument.array if isinstance(argument, Map) else argument


def bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(f"u{x.itemsize}")


def assert_same_bits(got: np.ndarray, expected: np.ndarray, what: str = "") -> None:
    """Signs of zeros and bits of NaN included; shapes may be broadcast."""
    expected = np.broadcast_to(np.asarray(expected, got.dtype), got.shape)
    differ = np.flatnonzero(bits(got) != bits(expected))
    lines = [
        f"  {i}: {got.flat[i]!r} {bits(got).flat[i]:#x}, not {expected.flat[i]!r} "
        f"{bits(expected).flat[i]:#x}"
        for i in differ[:8]
    ]
    assert not differ.size, "\n".join([f"{what}: {differ.size} of {got.size} differ", *lines])


# --- products of matrices -------------------------------------------------------------------------

PRODUCT_BOUND = 2.0**-22
"""By which a product may differ from the right one: of |c| + sum |a b|. A GPU truncates."""


def random_operands(kind: str, m: int, n: int, k: int, count: int) -> tuple[np.ndarray, ...]:
    """A (count, m, k), B (count, k, n) and C (count, m, n), float64, of one of OPERANDS."""
    rng = np.random.default_rng([m, n, k, OPERANDS.index(kind)])
    a, b, c = (rng.standard_normal((count, *shape)) for shape in ((m, k), (k, n), (m, n)))
    if kind == "no c":
        c *= 0
    elif kind == "large c":
        c *= 256
    elif kind == "of one sign":
        a, b, c = np.abs(a), np.abs(b), np.abs(c)
    elif kind == "of all sizes":
        a, b, c = (x * 2.0 ** rng.integers(-6, 7, x.shape) for x in (a, b, c))
    elif kind == "nothing left":
        c = -(a @ b)
    elif kind == "one large":  # beside which the others are cut off one by one
        a, b, c = (2.0**-12 * (1 + rng.random(x.shape)) for x in (a, b, c))
        a[..., 0], b[..., 0, :], c = 1, 1, c * 2.0**-12
    return a, b, c


OPERANDS = (
    *("normal", "no c", "large c", "of one sign", "of all sizes", "nothing left"),
    "one large",
)


def exact_product(a: np.ndarray, b: np.ndarray, c: np.ndarray, depth: int) -> np.ndarray:
    """C + A B as the emulator has it: exact products, summed in double precision.

    An instruction takes ``depth`` of them and rounds once.
    """
    for first in range(0, a.shape[-1], depth):
        total = np.zeros(c.shape)
        for k in range(first, first + depth):
            total += a[..., :, k, None] * b[..., None, k, :]
        c = (c + total).astype(np.float32)
    return c


def check_products(
    run: Probe,
    results: dict[str, np.ndarray],
    a: np.ndarray,
    b: np.ndarray,
    c: np.ndarray,
    what: str,
    *,
    depth: int = 16,
) -> None:
    """The emulator's are what they are said to be; a GPU's differ by at most the bound.

    That of each instruction, where there are several.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    expected = exact_product(a, b, c, depth)
    steps = a.shape[-1] // depth
    limit = steps * PRODUCT_BOUND * (np.abs(c) + np.abs(a) @ np.abs(b))
    # One term far above the others: 2.0 times the bound on an H100 by wgmma, 1.44 by mma.sync.
    most = 2.5 if what.endswith(("one large", "large c")) else 1
    for machine, got in results.items():
        if isinstance(run.machines[machine], Emulator):
            assert_same_bits(got, expected, f"{what}, {machine}")
            continue
        off = np.abs(got.astype(np.float64) - expected) / limit
        print(f"figure: {what}, {machine}: {off.max():.3f} of the bound, {off.mean():.4f} mean")
        assert off.max() <= most, what
