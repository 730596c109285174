"""What the benchmark asks of torch and FlashAttention-4, with stand-ins that are as strict."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from side_by_side import backends, backward, cells
from side_by_side.backends import FlashAttention4, Inputs, Ours, TorchVarlen
from side_by_side.backward import FlashAttention4Gradients, TorchGradients
from side_by_side.cells import Cell
from side_by_side.results import (
    BACKENDS,
    CUDNN,
    FA4,
    FA4_FIXED,
    FLASH2,
    FLASH2_FIXED,
    FLEX,
    NAMES,
    OURS,
    OURS_ANY,
    VARLEN,
)

from flashcore_cupy.cpu import reference, reference_gradients

DENSE = (
    Cell("grid", "full", 2, 4, 4, 9, 9, 8),
    Cell("grid", "causal", 2, 4, 2, 6, 11, 8, True),
    Cell("variants", "window", 2, 4, 2, 30, 30, 8, True, (7, 0)),
    Cell("variants", "both sides", 1, 4, 4, 30, 30, 8, False, (7, 3)),
)
LENGTHS = (5, 1, 12)
PACKED = tuple(
    Cell("varlen", "packed", 3, 4, 4, 12, 12, 8, causal, lengths=LENGTHS)
    for causal in (False, True)
)


class Tensor(np.ndarray):  # type: ignore[type-arg]
    """As much of a torch tensor as backends use."""

    def transpose(self, first: int, second: int) -> Tensor:
        return self.swapaxes(first, second)


def as_tensor(array: np.ndarray[Any, Any]) -> Tensor:
    return np.ascontiguousarray(array).view(Tensor)


def inputs_of(cell: Cell) -> Inputs:
    rng = np.random.default_rng(0)
    shapes = cell.q_shape, cell.k_shape, cell.v_shape, cell.o_shape
    q, k, v, do = (as_tensor(rng.standard_normal(shape, dtype=np.float32)) for shape in shapes)
    starts = np.cumsum([0, *cell.lengths]).astype(np.int32) if cell.lengths else None
    return Inputs(q, k, v, starts, do if cell.is_backward else None)


def attention(q: Any, k: Any, v: Any, **rules: Any) -> np.ndarray[Any, Any]:
    """(B, S, H, D) in and out."""
    heads_first = [np.asarray(x).swapaxes(1, 2) for x in (q, k, v)]
    return reference.naive(*heads_first, **rules).swapaxes(1, 2)


def attention_varlen(q: Any, k: Any, v: Any, starts: Any, **rules: Any) -> np.ndarray[Any, Any]:
    arrays = (np.asarray(x) for x in (q, k, v))
    return reference.naive_varlen(*arrays, starts, starts, **rules)


def expected(cell: Cell, inputs: Inputs) -> np.ndarray[Any, Any]:
    """(B, H, Sq, D) or (H, total, D)."""
    arrays = inputs.q, inputs.k, inputs.v
    if cell.lengths:
        found = attention_varlen(*arrays, inputs.cu_seqlens, **cell.rules)
    else:
        found = attention(*arrays, **cell.rules)
    return found.swapaxes(-3, -2)


# --- FlashAttention-4 ----------------------------------------------------------------------------


class Cute:
    """flash_attn.cute, as 4.0.0b36 has it: None where a window ends nowhere."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def _window(self, causal: bool, window_size: Any) -> tuple[int, int]:
        left, right = window_size
        assert all(bound is None or bound >= 0 for bound in window_size)
        return -1 if left is None else left, 0 if causal else -1 if right is None else right

    def flash_attn_func(
        self, q: Any, k: Any, v: Any, *, causal: bool = False, window_size: Any = (None, None)
    ) -> tuple[Any, None]:
        self.calls.append("dense")
        assert q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3]
        out = attention(q, k, v, window=self._window(causal, window_size))
        return as_tensor(out), None

    def flash_attn_varlen_func(
        self,
        q: Any,
        k: Any,
        v: Any,
        *,
        cu_seqlens_q: Any = None,
        cu_seqlens_k: Any = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        causal: bool = False,
        window_size: Any = (None, None),
    ) -> tuple[Any, None]:
        self.calls.append("varlen")
        assert cu_seqlens_q is cu_seqlens_k and cu_seqlens_q.dtype == np.int32
        longest = max(np.diff(cu_seqlens_q))
        assert max_seqlen_q == max_seqlen_k == longest
        window = self._window(causal, window_size)
        return as_tensor(attention_varlen(q, k, v, cu_seqlens_q, window=window)), None


@pytest.fixture
def cute(monkeypatch: pytest.MonkeyPatch) -> Cute:
    made = Cute()
    monkeypatch.setitem(sys.modules, "flash_attn.cute", made)  # type: ignore[arg-type]
    return made


@pytest.mark.parametrize("cell", [*DENSE, *PACKED], ids=lambda c: f"{c.name}, {c.causal:d}")
def test_flash_attention_4_is_asked_for_the_cell(cell: Cell, cute: Cute) -> None:
    backend, inputs = FlashAttention4(None), inputs_of(cell)
    assert backend.name == FA4 and backend.takes(cell) and backend.note() == ""
    run = backend.bind(cell, inputs)
    assert not cute.calls  # binding starts nothing
    with backend.selected():
        np.testing.assert_array_equal(run(), expected(cell, inputs))
    out, _ = backend.public_call(cell, inputs)()
    np.testing.assert_array_equal(out.transpose(-3, -2), expected(cell, inputs))
    assert cute.calls == ["varlen" if cell.lengths else "dense"] * 2


def test_a_version_that_returns_the_output_alone_will_do(
    cute: Cute, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = cute.flash_attn_func
    monkeypatch.setattr(cute, "flash_attn_func", lambda *q, **rules: both(*q, **rules)[0])
    cell, inputs = DENSE[0], inputs_of(DENSE[0])
    run = FlashAttention4(None).bind(cell, inputs)
    np.testing.assert_array_equal(run(), expected(cell, inputs))


def test_without_flash_attention_4_its_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)  # its import raises ImportError
    backend = FlashAttention4(None)
    assert backend.version is None
    for ask in (backend.bind, backend.public_call):
        with pytest.raises(RuntimeError, match=r"flash_attn\.cute \(pip install flash-attn-4\) "):
            ask(DENSE[0], inputs_of(DENSE[0]))


def test_the_version_of_flash_attention_4_is_told(
    cute: Cute, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = {"flash-attn-4": "4.0.0b36"}
    monkeypatch.setattr(backends.importlib.metadata, "version", versions.__getitem__)
    assert FlashAttention4(None).version == "4.0.0b36"

    def unknown(name: str) -> str:
        raise backends.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(backends.importlib.metadata, "version", unknown)
    assert FlashAttention4(None).version == "of unknown version"


# --- torch's varlen_attn -------------------------------------------------------------------------


def torch_2_10(
    query: Any,
    key: Any,
    value: Any,
    cu_seq_q: Any,
    cu_seq_k: Any,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
) -> Any:
    assert cu_seq_q is cu_seq_k and max_q == max_k == max(np.diff(cu_seq_q))
    return as_tensor(attention_varlen(query, key, value, cu_seq_q, causal=is_causal))


chosen_by_torch: list[str] = []


def torch_2_11(
    query: Any,
    key: Any,
    value: Any,
    cu_seq_q: Any,
    cu_seq_k: Any,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int] = (-1, -1),
) -> Any:
    assert cu_seq_q is cu_seq_k and max_q == max_k == max(np.diff(cu_seq_q))
    chosen_by_torch.append("cudnn" if window_size == (-1, -1) else "flash")
    return as_tensor(attention_varlen(query, key, value, cu_seq_q, window=window_size))


@pytest.mark.parametrize("varlen_attn", [torch_2_10, torch_2_11])
@pytest.mark.parametrize("name", [VARLEN, FLASH2])
@pytest.mark.parametrize("cell", PACKED, ids=["full", "causal"])
def test_torch_is_asked_for_packed_sequences(
    cell: Cell, name: str, varlen_attn: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = SimpleNamespace(varlen_attn=varlen_attn)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)  # type: ignore[arg-type]
    backend, inputs = TorchVarlen(None, name), inputs_of(cell)
    run = backend.bind(cell, inputs)
    np.testing.assert_array_equal(run(), expected(cell, inputs))
    if varlen_attn is torch_2_11 and name == FLASH2:
        assert chosen_by_torch[-1] == "flash"


def test_a_torch_without_varlen_attn_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    with pytest.raises(RuntimeError, match=r"this torch has no varlen_attn; 2\.10 is the first"):
        TorchVarlen(None, VARLEN).bind(PACKED[0], inputs_of(PACKED[0]))


# --- all of them ---------------------------------------------------------------------------------


def test_each_peer_has_one_place_in_the_rows_that_it_takes(
    cute: Cute, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = SimpleNamespace(FLASH_ATTENTION=1, CUDNN_ATTENTION=2, EFFICIENT_ATTENTION=3)
    module = SimpleNamespace(SDPBackend=kinds, sdpa_kernel=None)
    monkeypatch.setitem(sys.modules, "torch.nn.attention", module)  # type: ignore[arg-type]
    found = [Ours(None), *backends.torchs(None), FlashAttention4(None)]
    of_gradients = backward.compared(None, "auto")
    for cell in cells.cells("backward"):
        names = [backend.name for backend in of_gradients if backend.takes(cell)]
        assert names == [OURS, OURS_ANY, FLASH2, CUDNN, FA4, FLASH2_FIXED, FA4_FIXED]
    assert names == [name for name in NAMES if name in names]
    for group in set(cells.GROUPS) - {"backward"}:
        for cell in cells.cells(group):
            names = [backend.name for backend in found if backend.takes(cell)]
            absent = ("torch-cudnn", "torch-efficient") if cell.lengths else (VARLEN,)
            others = [name for name in BACKENDS if name not in (*absent, FLEX)]
            assert names == ([OURS, FLEX] if cell.pattern else others)


def test_a_graph_holds_all_runs_and_is_captured_by_torch(cute: Cute) -> None:
    class Graph:
        replayed = 0

        def replay(self) -> None:
            self.replayed += 1

    inside: list[Any] = []
    graphs: list[Graph] = []

    @contextmanager
    def capturing(graph: Graph) -> Iterator[None]:
        graphs.append(graph)
        inside.append("begin")
        yield
        inside.append("end")

    torch = SimpleNamespace(cuda=SimpleNamespace(CUDAGraph=Graph, graph=capturing))
    replay = FlashAttention4(torch).capture([lambda: inside.append(1), lambda: inside.append(2)])
    assert inside == ["begin", 1, 2, "end"]
    replay()
    assert graphs[0].replayed == 1 and inside[-1] == "end"


@pytest.mark.parametrize("cell", [DENSE[2], *PACKED], ids=lambda c: f"{c.name}, {c.causal:d}")
def test_ours_is_asked_for_the_cell(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    def attended(
        q: Any, k: Any, v: Any, layout: str, cu_seqlens_q: Any = None, **rules: Any
    ) -> Any:
        assert layout == "bshd" and rules.pop("cu_seqlens_k", None) is cu_seqlens_q
        if cu_seqlens_q is None:
            return attention(q, k, v, **rules)
        return attention_varlen(q, k, v, cu_seqlens_q, **rules)

    def plan(*arrays: Any, out: Any, **rules: Any) -> Any:
        selection = SimpleNamespace(
            kernel=SimpleNamespace(name="mma_sm80"),
            config=SimpleNamespace(describe=lambda: "64 x 64"),
        )

        def launch() -> None:
            out[...] = attended(*arrays, **rules)

        return SimpleNamespace(selection=selection, launch=launch)

    monkeypatch.setattr(backends, "plan", plan)
    monkeypatch.setattr(backends, "as_cupy", lambda _, tensor: tensor)
    backend, inputs = Ours(SimpleNamespace(full_like=np.full_like)), inputs_of(cell)
    run = backend.bind(cell, inputs)
    assert backend.takes(cell) and backend.note() == "mma_sm80: 64 x 64"
    np.testing.assert_array_equal(run(), expected(cell, inputs))


def test_inputs_of_packed_sequences_say_where_each_starts() -> None:
    class Generator:
        def __init__(self, device: str) -> None:
            assert device == "cuda"

        def manual_seed(self, seed: int) -> np.random.Generator:
            return np.random.default_rng(seed)

    def randn(shape: Any, *, dtype: Any, device: str, generator: np.random.Generator) -> Any:
        assert device == "cuda"
        return generator.standard_normal(shape).astype(dtype)

    torch = SimpleNamespace(
        Generator=Generator,
        bfloat16=ml_dtypes.bfloat16,
        int32=np.int32,
        randn=randn,
        tensor=lambda values, dtype, device: np.array(values, dtype),
    )
    inputs = backends.random_inputs(torch, PACKED[0])
    assert inputs.cu_seqlens.tolist() == [0, 5, 6, 18] and inputs.cu_seqlens.dtype == np.int32
    assert inputs.q.shape == inputs.k.shape == inputs.v.shape == (18, 4, 8)
    assert not np.array_equal(inputs.k, inputs.v)
    np.testing.assert_array_equal(inputs.q, backends.random_inputs(torch, PACKED[0]).q)
    plain = backends.random_inputs(torch, DENSE[0])
    assert plain.cu_seqlens is None and plain.do is None
    uneven = Cell("backward", "uneven", 2, 4, 2, 6, 6, 8, head_dim_v=16)
    made = backends.random_inputs(torch, uneven)
    assert (made.k.shape, made.v.shape, made.do.shape) == (
        (2, 6, 2, 8),
        (2, 6, 2, 16),
        (2, 6, 4, 16),
    )


# --- the backward pass ---------------------------------------------------------------------------

GRADIENTS = (
    Cell("backward", "full", 2, 4, 4, 9, 9, 8),
    Cell("backward", "grouped", 2, 4, 2, 6, 6, 8, True),
    Cell("backward", "uneven", 1, 4, 4, 7, 7, 8, head_dim_v=16),
    *(replace(cell, group="backward", name="packed") for cell in PACKED),
)
each_cell = pytest.mark.parametrize("cell", GRADIENTS, ids=lambda c: f"{c.name}, {c.causal:d}")


def differentiated(
    do: Any, q: Any, k: Any, v: Any, starts: Any = None, **rules: Any
) -> tuple[Tensor, ...]:
    """dq, dk, dv of (B, S, H, D) arrays, or of packed ones."""
    arrays = [np.asarray(x) for x in (do, q, k, v)]
    if starts is not None:
        found = reference_gradients.of_packed(
            reference_gradients.oracle, *arrays, starts, starts, **rules
        )
        return tuple(found[name].view(Tensor) for name in "qkv")
    found = reference_gradients.oracle(*(x.swapaxes(1, 2) for x in arrays), **rules)
    return tuple(found[name].swapaxes(1, 2).view(Tensor) for name in "qkv")


def expected_gradients(cell: Cell, inputs: Inputs) -> tuple[Tensor, ...]:
    arrays = inputs.do, inputs.q, inputs.k, inputs.v
    return differentiated(*arrays, inputs.cu_seqlens, **cell.rules)


def assert_gradients(got: Any, cell: Cell, inputs: Inputs) -> None:
    right = expected_gradients(cell, inputs)
    assert [x.shape for x in got] == [cell.q_shape, cell.k_shape, cell.v_shape]
    for x, y in zip(got, right, strict=True):
        np.testing.assert_array_equal(x, y)


class Aten:
    """torch.ops.aten: its arguments in their order; what nobody looks into is a word."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def _forward(self, q: Any, v: Any, causal: bool) -> tuple[Any, Any]:
        self.causal = causal
        return np.zeros((*q.shape[:-1], v.shape[-1])), "lse"

    def _heads_first(self, *arrays: Any, causal: bool) -> tuple[Any, ...]:
        assert causal == self.causal
        found = differentiated(*(x.swapaxes(1, 2) for x in arrays), causal=causal)
        return tuple(x.swapaxes(1, 2) for x in found)

    def _scaled_dot_product_flash_attention(
        self, q: Any, k: Any, v: Any, dropout_p: float, is_causal: bool
    ) -> tuple[Any, ...]:
        self.calls.append("flash forward")
        assert dropout_p == 0.0
        others = "cum q", "cum k", "max q", "max k", "seed", "offset", "mask"
        return *self._forward(q, v, is_causal), *others

    def _scaled_dot_product_flash_attention_backward(
        self, do: Any, q: Any, k: Any, v: Any, o: Any, lse: Any, *rest: Any
    ) -> tuple[Any, ...]:
        self.calls.append("flash backward")
        assert lse == "lse" and o.shape == do.shape
        assert rest == ("cum q", "cum k", "max q", "max k", 0.0, self.causal, "seed", "offset")
        return self._heads_first(do, q, k, v, causal=rest[5])

    def _scaled_dot_product_cudnn_attention(
        self, q: Any, k: Any, v: Any, bias: Any, with_lse: bool, dropout_p: float, is_causal: bool
    ) -> tuple[Any, ...]:
        self.calls.append("cudnn forward")
        assert bias is None and with_lse is True and dropout_p == 0.0
        others = "cum q", "cum k", "max q", "max k", "seed", "offset", "mask"
        return *self._forward(q, v, is_causal), *others

    def _scaled_dot_product_cudnn_attention_backward(
        self, do: Any, q: Any, k: Any, v: Any, o: Any, lse: Any, *rest: Any
    ) -> tuple[Any, ...]:
        self.calls.append("cudnn backward")
        at = "cum q", "cum k", "max q", "max k", 0.0, self.causal
        assert lse == "lse" and rest == ("seed", "offset", None, *at)
        return self._heads_first(do, q, k, v, causal=rest[-1])

    def _flash_attention_forward(
        self, q: Any, k: Any, v: Any, starts: Any, also: Any, longest: int, longest_k: int,
        dropout_p: float, is_causal: bool, return_debug_mask: bool,
    ) -> tuple[Any, ...]:  # fmt: skip
        self.calls.append("flash forward")
        assert also is starts and longest == longest_k == max(np.diff(starts))
        assert dropout_p == 0.0 and return_debug_mask is False
        return *self._forward(q, v, is_causal), "seed", "offset", "mask"

    def _flash_attention_backward(
        self, do: Any, q: Any, k: Any, v: Any, o: Any, lse: Any, starts: Any, also: Any,
        longest: int, longest_k: int, dropout_p: float, is_causal: bool, seed: Any, offset: Any,
    ) -> tuple[Any, ...]:  # fmt: skip
        self.calls.append("flash backward")
        assert also is starts and longest == longest_k == max(np.diff(starts))
        assert (lse, dropout_p, seed, offset) == ("lse", 0.0, "seed", "offset")
        return differentiated(do, q, k, v, starts, causal=is_causal)

    def _cudnn_attention_forward(
        self, q: Any, k: Any, v: Any, bias: Any, starts: Any, also: Any, longest: int,
        longest_k: int, with_lse: bool, dropout_p: float, is_causal: bool, debug: bool,
    ) -> tuple[Any, ...]:  # fmt: skip
        self.calls.append("cudnn forward")
        assert bias is None and also is starts and longest == longest_k == max(np.diff(starts))
        assert with_lse is True and dropout_p == 0.0 and debug is False
        others = "cum q", "cum k", "max q", "max k", "seed", "offset", "mask"
        return *self._forward(q, v, is_causal), *others

    def _cudnn_attention_backward(
        self, do: Any, q: Any, k: Any, v: Any, o: Any, lse: Any, seed: Any, offset: Any,
        bias: Any, starts: Any, also: Any, longest: int, longest_k: int, dropout_p: float,
        is_causal: bool,
    ) -> tuple[Any, ...]:  # fmt: skip
        self.calls.append("cudnn backward")
        assert bias is None and also is starts and longest == longest_k == max(np.diff(starts))
        assert (lse, dropout_p, seed, offset) == ("lse", 0.0, "seed", "offset")
        return differentiated(do, q, k, v, starts, causal=is_causal)


@each_cell
@pytest.mark.parametrize("name", [FLASH2, CUDNN])
def test_torch_is_asked_for_gradients_alone(cell: Cell, name: str) -> None:
    aten, inputs = Aten(), inputs_of(cell)
    backend = TorchGradients(SimpleNamespace(ops=SimpleNamespace(aten=aten)), name)
    run = backend.bind(cell, inputs)
    library = "cudnn" if name == CUDNN else "flash"
    assert aten.calls == [f"{library} forward"]
    with backend.selected():
        assert_gradients(run(), cell, inputs)
    assert aten.calls[1:] == [f"{library} backward"]


@pytest.mark.parametrize("was", [False, True])
def test_torch_repeats_its_bits_where_that_is_measured(
    was: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its memory is not filled: that would be timed."""
    state = [was]
    torch = SimpleNamespace(
        are_deterministic_algorithms_enabled=lambda: state[0],
        use_deterministic_algorithms=lambda on: state.__setitem__(0, on),
    )
    filling = SimpleNamespace(fill_uninitialized_memory=True)
    monkeypatch.setitem(sys.modules, "torch.utils.deterministic", filling)  # type: ignore[arg-type]
    with TorchGradients(torch, FLASH2_FIXED).selected():
        assert state == [True] and not filling.fill_uninitialized_memory
    assert state == [was] and filling.fill_uninitialized_memory
    with pytest.raises(KeyError), TorchGradients(torch, FLASH2_FIXED).selected():
        raise KeyError
    assert state == [was] and filling.fill_uninitialized_memory
    with TorchGradients(torch, FLASH2).selected():
        assert state == [was]


@each_cell
@pytest.mark.parametrize("deterministic", [False, True])
def test_flash_attention_4_is_asked_for_gradients_alone(
    cell: Cell, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lengths are arguments of packed batches alone."""
    calls: list[str] = []

    def checked(
        causal: bool, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None, **rest: Any
    ) -> Any:
        assert cu_seqlens_q is cu_seqlens_k and causal == cell.causal
        longest = {f"max_seqlen_{side}": max(cell.lengths) for side in "qk" if cell.lengths}
        assert rest == longest
        return cu_seqlens_q

    def forward(q: Any, k: Any, v: Any, *, return_lse: bool, **rules: Any) -> tuple[Any, ...]:
        calls.append("forward")
        assert return_lse is True
        checked(**rules)
        return "o", "lse", None, None, None

    def backward_pass(
        q: Any, k: Any, v: Any, o: Any, do: Any, lse: Any, *, deterministic: bool, **rules: Any
    ) -> tuple[Any, ...]:
        calls.append(f"backward {deterministic}")
        assert (o, lse) == ("o", "lse")
        return differentiated(do, q, k, v, checked(**rules), causal=cell.causal)

    inner = SimpleNamespace(_flash_attn_fwd=forward, _flash_attn_bwd=backward_pass)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", SimpleNamespace())  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", inner)  # type: ignore[arg-type]
    backend, inputs = FlashAttention4Gradients(None, deterministic=deterministic), inputs_of(cell)
    assert backend.name == (FA4_FIXED if deterministic else FA4)
    run = backend.bind(cell, inputs)
    assert calls == ["forward"]
    assert_gradients(run(), cell, inputs)
    assert calls == ["forward", f"backward {deterministic}"]


def test_gradients_without_flash_attention_4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)  # its import raises ImportError
    with pytest.raises(RuntimeError, match=r"flash_attn\.cute \(pip install flash-attn-4\) "):
        FlashAttention4Gradients(None).bind(GRADIENTS[0], inputs_of(GRADIENTS[0]))


@each_cell
@pytest.mark.parametrize("kernel", ["auto", "bwd_sm80"])
def test_ours_is_asked_for_gradients(
    cell: Cell, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a kernel of the backward pass, which the forward one does not know."""

    def attended(*arrays: Any, return_lse: bool, **rules: Any) -> tuple[Any, Any]:
        assert return_lse is True and "kernel" not in rules and "deterministic" not in rules
        return "o", "lse"

    def plan(
        do: Any, q: Any, k: Any, v: Any, o: Any, lse: Any, *, out: Any, deterministic: bool,
        layout: str, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None, **rules: Any,
    ) -> Any:  # fmt: skip
        assert (o, lse, layout) == ("o", "lse", "bshd") and cu_seqlens_k is cu_seqlens_q
        assert rules.pop("kernel", "auto") == kernel
        assert all(np.isnan(x).all() for x in out)

        def launch() -> None:
            for x, y in zip(out, differentiated(do, q, k, v, cu_seqlens_q, **rules), strict=True):
                x[...] = y

        selection = SimpleNamespace(name="bwd_sm80", describe=lambda: f"bits {deterministic}")
        return SimpleNamespace(selection=selection, launch=launch)

    for name, function in {"plan_backward": plan, "attention": attended}.items():
        monkeypatch.setattr(backward, name, function)
    for module in (backends, backward):
        monkeypatch.setattr(module, "as_cupy", lambda _, tensor: tensor)
    torch = SimpleNamespace(full_like=lambda x, value: np.full(x.shape, value).view(Tensor))
    for deterministic in (True, False):
        backend = backward.OurGradients(torch, kernel, deterministic=deterministic)
        inputs = inputs_of(cell)
        run = backend.bind(cell, inputs)
        assert backend.note() == f"bwd_sm80: bits {deterministic}"
        assert_gradients(run(), cell, inputs)
