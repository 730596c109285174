"""Our attention, torch's and FlashAttention-4 behind one face: bind to inputs, enqueue, capture.

torch is imported by ``require_torch`` alone. It makes the arrays; CuPy sees them through DLPack.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from flashcore_cupy import attention as attend
from flashcore_cupy.attention import plan
from flashcore_cupy.jit import compiler
from flashcore_cupy.launch import builds
from flashcore_cupy.problem.array_spec import ArraySpec, spec_of, spec_of_copy
from flashcore_cupy.problem.attention_problem import AttentionProblem, describe
from flashcore_cupy.problem.gradients import contiguous_gradients
from flashcore_cupy.problem.listed_blocks import LISTS, Lists
from flashcore_cupy.problem.rules import RULES, describe_rules
from flashcore_cupy.select import selector
from flashcore_cupy.select.backward import select_backward
from flashcore_cupy.select.config import KernelConfig
from side_by_side import patterns
from side_by_side.cells import DTYPE, UNBOUNDED, Cell
from side_by_side.results import FA4, FLASH2, FLEX, OURS, SDPA, VARLEN
from side_by_side.timing import reason_of

#: Enqueues one attention on the current stream, and returns its output, a (B, H, Sq, D) tensor,
#: or (H, total, D) of packed sequences.
Run = Callable[[], Any]

#: Times that torch may compile a function; 8 by default.
_RECOMPILED = 256
_SDP = {
    "torch-flash2": "FLASH_ATTENTION",
    "torch-cudnn": "CUDNN_ATTENTION",
    "torch-efficient": "EFFICIENT_ATTENTION",
}


def require_torch() -> Any:
    """The module torch with a GPU that it can use; ``RuntimeError`` with the cure otherwise."""
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        raise RuntimeError(
            "torch is missing, which this benchmark compares with: pip install torch "
            "(the package itself does without it)"
        ) from None
    if not torch.cuda.is_available():
        raise RuntimeError("torch finds no GPU that it can use")
    return torch


@dataclass(frozen=True)
class Inputs:
    """Tensors q (B, Sq, H, D), k (B, Skv, Hkv, D), v (B, Skv, Hkv, Dv); packed: (total, H, D)."""

    q: Any
    k: Any
    v: Any
    cu_seqlens: Any = None
    """Where packed sequences start: (B + 1,) int32."""
    do: Any = None
    """Of the backward pass: the gradient of the output, (B, Sq, H, Dv) or (total, H, Dv)."""

    @property
    def heads_first(self) -> tuple[Any, Any, Any]:
        """(B, H, S, D) views of the same memory, which torch's function takes."""
        return self.q.transpose(1, 2), self.k.transpose(1, 2), self.v.transpose(1, 2)


def random_inputs(torch: Any, cell: Cell, seed: int = 0) -> Inputs:
    """N(0, 1), the same for the same seed."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    make = functools.partial(
        torch.randn, dtype=getattr(torch, DTYPE), device="cuda", generator=generator
    )
    starts = None
    if cell.lengths:
        at = list(itertools.accumulate(cell.lengths, initial=0))
        starts = torch.tensor(at, dtype=torch.int32, device="cuda")
    q, k, v = (make(shape) for shape in (cell.q_shape, cell.k_shape, cell.v_shape))
    return Inputs(q, k, v, starts, make(cell.o_shape) if cell.is_backward else None)


def as_cupy(torch: Any, tensor: Any) -> Any:
    """The tensor's memory as a CuPy array."""
    import cupy

    if tensor.dtype == torch.bfloat16:  # both travel as integers: not every DLPack has these types
        return cupy.from_dlpack(tensor.view(torch.int16)).view(ml_dtypes.bfloat16)
    if tensor.dtype == torch.bool:
        return cupy.from_dlpack(tensor.view(torch.uint8)).view(np.bool_)
    return cupy.from_dlpack(tensor)


def to_numpy(torch: Any, tensor: Any) -> np.ndarray[Any, Any]:
    """A copy on the host; bfloat16 as ``ml_dtypes.bfloat16``."""
    if tensor.dtype == torch.bfloat16:
        bits: np.ndarray[Any, Any] = tensor.contiguous().view(torch.int16).cpu().numpy()
        return bits.view(ml_dtypes.bfloat16)
    return np.asarray(tensor.cpu().numpy())


def to_torch(torch: Any, array: np.ndarray[Any, Any]) -> Any:
    """A copy on the GPU of a NumPy array."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).cuda().view(torch.bfloat16)
    return torch.from_numpy(array).cuda()


class Backend(Protocol):
    """An implementation of attention."""

    name: str

    def takes(self, cell: Cell) -> bool:
        """Whether it has a place in the cell's row."""

    def bind(self, cell: Cell, inputs: Inputs) -> Run:
        """Prepare everything that a launch does not have to do; raise if it cannot be done."""

    def public_call(self, cell: Cell, inputs: Inputs) -> Run:
        """The call that a user writes, with all that it does on the host."""

    def capture(self, runs: Sequence[Run]) -> Callable[[], Any]:
        """A CUDA graph of these runs one after the other; calling it replays it."""

    def selected(self) -> contextlib.AbstractContextManager[Any]:
        """Entered around ``run()`` and ``public_call``'s calls."""

    def note(self) -> str:
        """What the last bound cell runs, where that is known."""


class Ours:
    """This package, by a plan that is built ahead; ``kernel`` is a rung's name or "auto"."""

    def __init__(self, torch: Any, kernel: str = "auto") -> None:
        self.name = OURS
        self._torch = torch
        # The call that a user writes does not say "auto".
        self._chosen: dict[str, Any] = {} if kernel == "auto" else {"kernel": kernel}
        self._note = ""

    def takes(self, cell: Cell) -> bool:
        """Every cell."""
        return True

    def bind(self, cell: Cell, inputs: Inputs) -> Run:
        """Build the plan, its output a tensor's memory."""
        arrays, out = self._arrays(inputs)
        bound = plan(*arrays, out=as_cupy(self._torch, out), **self._rules(cell, inputs))
        selection = bound.selection
        self._note = f"{selection.kernel.name}: {selection.config.describe()}"
        result = out.transpose(-3, -2)

        def run() -> Any:
            bound.launch()
            return result

        return run

    def public_call(self, cell: Cell, inputs: Inputs) -> Run:
        """``attention(..., out=...)``, every check of its arguments included."""
        arrays, out = self._arrays(inputs)
        rules = self._rules(cell, inputs)
        return functools.partial(attend, *arrays, out=as_cupy(self._torch, out), **rules)

    def capture(self, runs: Sequence[Run]) -> Callable[[], Any]:
        """Capture by CuPy; the replay goes to the current stream."""
        import cupy

        cupy.cuda.Device().synchronize()
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            stream.begin_capture()
            try:
                for run in runs:
                    run()
            finally:
                graph = stream.end_capture()
        return lambda: graph.launch(cupy.cuda.get_current_stream())

    def selected(self) -> contextlib.AbstractContextManager[Any]:
        """Nothing to choose."""
        return contextlib.nullcontext()

    def note(self) -> str:
        """Kernel and configuration."""
        return self._note

    def _arrays(self, inputs: Inputs) -> tuple[list[Any], Any]:
        """The inputs as CuPy arrays, and an output tensor that starts as NaN."""
        out = self._torch.full_like(inputs.q, float("nan"))
        return [as_cupy(self._torch, x) for x in (inputs.q, inputs.k, inputs.v)], out

    def _rules(self, cell: Cell, inputs: Inputs) -> dict[str, Any]:
        rules = {"layout": "bshd", **self._chosen, **cell.rules}
        if cell.lengths:
            starts = as_cupy(self._torch, inputs.cu_seqlens)
            rules |= {"cu_seqlens_q": starts, "cu_seqlens_k": starts}
        if cell.pattern:
            import cupy

            rules["block_mask"] = patterns.ours(cell.pattern, cell.seqlen_q, cupy.asarray)
        return rules


class OnTorch:
    """What is called on torch's tensors and stream."""

    def __init__(self, torch: Any, name: str) -> None:
        self.name = name
        self._torch = torch

    def capture(self, runs: Sequence[Run]) -> Callable[[], Any]:
        """Capture by torch."""
        graph = self._torch.cuda.CUDAGraph()
        with self.selected(), self._torch.cuda.graph(graph):
            for run in runs:
                run()
        replay: Callable[[], Any] = graph.replay
        return replay

    def selected(self) -> contextlib.AbstractContextManager[Any]:
        """Nothing to choose."""
        return contextlib.nullcontext()

    def note(self) -> str:
        """Nothing: none of them says."""
        return ""


class Torch(OnTorch):
    """``scaled_dot_product_attention``, held to one of its backends."""

    def __init__(self, torch: Any, name: str) -> None:
        super().__init__(torch, name)
        choices = importlib.import_module("torch.nn.attention")
        self._backend = getattr(choices.SDPBackend, _SDP[name])
        self._choose = choices.sdpa_kernel

    def takes(self, cell: Cell) -> bool:
        """All but packed sequences and block masks."""
        return not (cell.lengths or cell.pattern)

    def bind(self, cell: Cell, inputs: Inputs) -> Run:
        """Look at the arguments once; the call is torch's own."""
        if cell.window != UNBOUNDED:
            raise ValueError("torch has no window")
        sdpa = self._torch.nn.functional.scaled_dot_product_attention
        rules: dict[str, Any] = {"is_causal": cell.causal}
        if cell.heads_kv != cell.heads:
            rules["enable_gqa"] = True
        return functools.partial(sdpa, *inputs.heads_first, **rules)

    def public_call(self, cell: Cell, inputs: Inputs) -> Run:
        """The same call."""
        return self.bind(cell, inputs)

    def selected(self) -> contextlib.AbstractContextManager[Any]:
        """Allow this backend alone."""
        chosen: contextlib.AbstractContextManager[Any] = self._choose(self._backend)
        return chosen


class TorchVarlen(OnTorch):
    """torch's ``varlen_attn`` on packed sequences; by name what it chooses, or FlashAttention-2."""

    def takes(self, cell: Cell) -> bool:
        """Packed sequences alone."""
        return bool(cell.lengths)

    def bind(self, cell: Cell, inputs: Inputs) -> Run:
        """Look at the arguments once; the call is torch's own."""
        call = self.public_call(cell, inputs)
        return lambda: call().transpose(0, 1)

    def public_call(self, cell: Cell, inputs: Inputs) -> Run:
        """The call, (total, H, D). Raises ``RuntimeError`` where this torch does not have it."""
        try:
            varlen_attn = importlib.import_module("torch.nn.attention.varlen").varlen_attn
        except ImportError:
            raise RuntimeError("this torch has no varlen_attn; 2.10 is the first") from None
        longest, starts = max(cell.lengths), inputs.cu_seqlens
        rules: dict[str, Any] = {"window_size": (-1, 0) if cell.causal else (-1, -1)}
        if self.name == FLASH2 and not cell.causal:
            # A window that holds everything, which torch gives to FlashAttention-2 alone, and
            # which that takes for none.
            rules = {"window_size": (longest, longest)}
        if "window_size" not in inspect.signature(varlen_attn).parameters:  # torch 2.10
            rules = {"is_causal": cell.causal}
        at = starts, starts, longest, longest
        return functools.partial(varlen_attn, inputs.q, inputs.k, inputs.v, *at, **rules)


class Flex(OnTorch):
    """torch's ``flex_attention``, compiled for each shape, with its own block mask."""

    def takes(self, cell: Cell) -> bool:
        """Block masks alone."""
        return bool(cell.pattern)

    def bind(self, cell: Cell, inputs: Inputs) -> Run:
        """Make the block mask, and compile; the call is torch's own."""
        return self.public_call(cell, inputs)

    def public_call(self, cell: Cell, inputs: Inputs) -> Run:
        """The call, (B, H, Sq, D). Raises ``RuntimeError`` where this torch does not have it."""
        try:
            flex = importlib.import_module("torch.nn.attention.flex_attention")
        except ImportError:
            raise RuntimeError("this torch has no flex_attention; 2.5 is the first") from None
        dynamo = importlib.import_module("torch._dynamo").config
        for limit in ("recompile_limit", "cache_size_limit"):  # since torch 2.7, and before
            if hasattr(dynamo, limit):  # every cell is another shape, or another rule
                setattr(dynamo, limit, max(getattr(dynamo, limit), _RECOMPILED))
        compiled = self._torch.compile(flex.flex_attention, dynamic=False)
        made = patterns.of_flex(self._torch, cell.pattern, cell.seqlen_q, inputs.q.device)
        return functools.partial(compiled, *inputs.heads_first, block_mask=made)


class FlashAttention4(OnTorch):
    """FlashAttention-4's CuTe kernels, which are compiled at the first call of a kind."""

    def __init__(self, torch: Any) -> None:
        super().__init__(torch, FA4)
        self._module: Any = None
        self._missing = ""
        try:
            self._module = importlib.import_module("flash_attn.cute")
        except Exception as error:  # of the many packages that it needs, each in its own way
            self._missing = (
                f"flash_attn.cute (pip install flash-attn-4) does not import: {reason_of(error)}"
            )

    @property
    def version(self) -> str | None:
        """The package's version; None where it does not import."""
        if self._module is None:
            return None
        try:
            return importlib.metadata.version("flash-attn-4")
        except importlib.metadata.PackageNotFoundError:
            return "of unknown version"

    def takes(self, cell: Cell) -> bool:
        """Every cell but block masks."""
        return not cell.pattern

    def bind(self, cell: Cell, inputs: Inputs) -> Run:
        """Look at the arguments once; the call is the package's own."""
        call = self.public_call(cell, inputs)

        def run() -> Any:
            result = call()
            out = result[0] if isinstance(result, tuple) else result  # with it, the log-sum-exp
            return out.transpose(-3, -2)

        return run

    def public_call(self, cell: Cell, inputs: Inputs) -> Run:
        """The call, (B, Sq, H, D) or (total, H, D). Raises ``RuntimeError`` without the package."""
        if self._module is None:
            raise RuntimeError(self._missing)
        tensors = inputs.q, inputs.k, inputs.v
        window = tuple(None if bound < 0 else bound for bound in cell.window)
        rules: dict[str, Any] = {"causal": cell.causal, "window_size": window}
        if not cell.lengths:
            return functools.partial(self._module.flash_attn_func, *tensors, **rules)
        for side in "qk":
            rules[f"cu_seqlens_{side}"] = inputs.cu_seqlens
            rules[f"max_seqlen_{side}"] = max(cell.lengths)
        return functools.partial(self._module.flash_attn_varlen_func, *tensors, **rules)


def torchs(torch: Any) -> list[Backend]:
    """All of torch's, in the order of ``results.PEERS``."""
    varlen = [TorchVarlen(torch, name) for name in (FLASH2, VARLEN)]
    return [*(Torch(torch, name) for name in SDPA), *varlen, Flex(torch, FLEX)]


def first_result(run: Run, selected: Callable[[], Any]) -> Any:
    """Run once. Raises ``RuntimeError`` with torch's explanation where it warns of one."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            with selected():
                return run()
        except RuntimeError as error:
            raise RuntimeError(_why(error, [str(w.message) for w in told])) from error


def _why(error: RuntimeError, told: Sequence[str]) -> str:
    """The first warning that explains, else the error: torch says why in warnings alone."""
    for text in told:
        said = text.partition(" (Triggered internally")[0].strip()
        heading = said.endswith("not used because:")
        if said and not heading and "runtime disabled" not in said:
            return said.partition("\n")[0].partition(". ")[0]  # sizes follow
    return str(error).strip().partition("\n")[0]


class Call(NamedTuple):
    """A call to compile for, its arrays as ``dense`` describes them."""

    q: ArraySpec
    k: ArraySpec
    v: ArraySpec
    rules: Mapping[str, Any]
    kernel: str = "auto"
    is_backward: bool = False
    """Its gradients are asked for, too, with the same bits each time and without."""


def dense(shape: Sequence[int], dtype: DTypeLike) -> ArraySpec:
    """A C-contiguous array that has not been made."""
    return spec_of_copy(ArraySpec(tuple(shape), (), np.dtype(dtype), 0))


def call_of(cell: Cell, kernel: str = "auto") -> Call:
    """The call that a cell makes of a kernel."""
    shapes = cell.q_shape, cell.k_shape, cell.v_shape
    q, k, v = (dense(shape, ml_dtypes.bfloat16) for shape in shapes)
    packed = {"sequences": cell.batch} if cell.lengths else {}
    rules = {"layout": "bshd", **packed, **cell.rules}
    if cell.pattern:
        rules |= _described_blocks(cell)
    return Call(q, k, v, rules, kernel, cell.is_backward)


def _described_blocks(cell: Cell) -> dict[str, Any]:
    """A cell's block mask without its data, as ``patterns.ours`` makes it."""
    rows = -(-cell.seqlen_q // patterns.BLOCK)
    shapes = [(1, 1, rows, *[rows] * (n % 2)) for n in range(4)]
    specs = {name: dense(shape, np.int32) for name, shape in zip(LISTS, shapes, strict=True)}
    arrays = patterns.numpy_arrays(cell.pattern, cell.seqlen_q)
    if cell.pattern == "random-blocks":  # full blocks alone, which need no rule
        specs, arrays = {name: specs[name] for name in LISTS[2:]}, {}
    lists = Lists(specs, (patterns.BLOCK,) * 2, (cell.seqlen_q, cell.seqlen_kv))
    found: dict[str, Any] = {"block_mask": lists}
    if len(specs) == len(LISTS):
        found["mask_mod"] = patterns.PATTERNS[cell.pattern].cuda
        found["mod_args"] = {name: spec_of(x) for name, x in arrays.items()}
    return found


def problem_of(call: Call) -> AttentionProblem:
    """What a call asks for. Raises ``TypeError`` or ``ValueError`` as the call does."""
    named = {rule.name for rule in RULES} | {"mod_args"}
    rules = {name: call.rules[name] for name in named & call.rules.keys()}
    others = {name: x for name, x in call.rules.items() if name not in rules}
    problem = describe(call.q, call.k, call.v, **others)
    described = describe_rules(problem.scores, problem.dtype, packed=problem.packed, **rules)
    return replace(problem, rules=described)


def compile_ahead(calls: Iterable[Call], on_done: builds.OnDone | None = None) -> None:
    """Compile in parallel processes what ours will need.

    A call that cannot be described, or whose kernel does not compile, fails here in silence: it
    does so again, and is reported, when its turn comes.
    """
    arch = compiler.device_arch()
    wanted: dict[KernelConfig, None] = {}
    for call in calls:
        with contextlib.suppress(TypeError, ValueError, AttributeError):
            wanted |= dict.fromkeys(_configs(call, arch))
    builds.build_each([(config, arch) for config in wanted], on_done)


def _configs(call: Call, arch: str) -> Iterator[KernelConfig]:
    problem = problem_of(call)
    if not call.is_backward:
        yield from selector.select(problem, arch, kernel=call.kernel).configs
        return
    yield from selector.select(problem, arch).configs
    for deterministic in (True, False):
        asked = contiguous_gradients(problem, deterministic=deterministic)
        yield from select_backward(asked, arch, kernel=call.kernel).configs
