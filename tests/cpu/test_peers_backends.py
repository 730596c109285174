"""What the benchmark asks of torch and FlashAttention-4, with stand-ins that are as strict."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from side_by_side import backends, cells
from side_by_side.backends import FlashAttention4, Inputs, Ours, TorchVarlen
from side_by_side.cells import Cell
from side_by_side.results import BACKENDS, FA4, FLASH2, VARLEN

from flashcore_cupy.cpu import reference

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
    shapes = cell.q_shape, cell.kv_shape, cell.kv_shape
    q, k, v = (as_tensor(rng.standard_normal(shape, dtype=np.float32)) for shape in shapes)
    starts = np.cumsum([0, *cell.lengths]).astype(np.int32) if cell.lengths else None
    return Inputs(q, k, v, starts)


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
    for group in cells.GROUPS:
        for cell in cells.cells(group):
            names = [backend.name for backend in found if backend.takes(cell)]
            absent = ("torch-cudnn", "torch-efficient") if cell.lengths else (VARLEN,)
            assert names == [name for name in BACKENDS if name not in absent]


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
    assert backends.random_inputs(torch, DENSE[0]).cu_seqlens is None
