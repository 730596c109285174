"""Arrays that are traced, differentiated or not just memory: told apart by name.

The stand-ins have what the checks look at, and nothing else.
"""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cases_tracing import (
    FLOATS,
    OPERANDS,
    SKV,
    SQ,
    D,
    H,
    arguments,
    attention,
    everywhere,
    explain,
    numbers,
    refusal,
)

from flashcore_cupy.attention import plan
from flashcore_cupy.problem import interop, tracing

# --- masked arrays --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FLOATS)
def test_masked_arrays_are_refused(name: str) -> None:
    odd = np.ma.masked_array(numbers(*FLOATS[name]), False)
    if name not in ("softmax_scale", "softcap"):
        message = everywhere(name, TypeError, arguments(np.asarray, name, odd))
        assert "got a masked array" in message and f"{name}.filled(...)" in message


def test_masked_masks_and_boundaries_are_refused() -> None:
    masked = np.ma.masked_array(np.ones((SQ, SKV), bool), False)
    assert "masked" in everywhere("mask", TypeError, arguments(np.asarray, "mask", masked))
    packed = {name: numbers(shape[2], H, D) for name, shape in OPERANDS.items()}
    masked = np.ma.masked_array([0, SQ], False)
    bounds = {"cu_seqlens_q": masked, "cu_seqlens_k": [0, SKV]}
    assert "masked" in everywhere("cu_seqlens_q", TypeError, packed | bounds)


# --- what the checks look at, without torch or JAX ------------------------------------------------


class Tensor:
    """A tensor of torch on the host, as far as the checks look."""

    __module__ = "torch"
    __torch_dispatch__ = None
    dtype, layout, requires_grad, is_nested, is_meta = "float32", "strided", False, False, False
    tangent = None
    negative = False
    wrapped = False

    def __init__(self, **state: Any) -> None:
        self.__dict__.update(state)

    def is_neg(self) -> bool:
        return self.negative

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self, **_: Any) -> Any: ...


@pytest.fixture
def torch_stand_in(monkeypatch: pytest.MonkeyPatch) -> Any:
    fake = SimpleNamespace(
        Tensor=Tensor,
        strided="strided",
        is_grad_enabled=lambda: True,
        jit=SimpleNamespace(is_tracing=lambda: False),
        _C=SimpleNamespace(
            _functorch=SimpleNamespace(is_functorch_wrapped_tensor=lambda x: x.wrapped)
        ),
        autograd=SimpleNamespace(
            forward_ad=SimpleNamespace(_current_level=0, unpack_dual=lambda x: x)
        ),
    )
    monkeypatch.setitem(sys.modules, "torch", fake)
    return fake


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ({"requires_grad": True}, tracing.Traced, "k: requires a gradient"),
        ({"tangent": 1}, ValueError, "k: has a tangent"),
        ({"wrapped": True}, tracing.Traced, "k: got a tensor inside torch.func or torch.vmap"),
        ({"is_nested": True}, TypeError, "k: got a nested tensor"),
        ({"layout": "sparse"}, TypeError, "k: got a tensor of layout sparse; use .to_dense()"),
        ({"is_meta": True}, TypeError, "k: got a tensor on the meta device"),
        ({"negative": True}, TypeError, "use .resolve_neg()"),
    ],
)
def test_what_is_looked_at_of_a_tensor(
    torch_stand_in: Any, state: Any, error: type[Exception], message: str
) -> None:
    assert interop.gpu_of("k", Tensor()) is None
    for call in (interop.gpu_of, interop.taken):
        assert message in refusal(error, lambda call=call: call("k", Tensor(**state)))


def test_tensors_in_a_trace_and_without_gradients(torch_stand_in: Any) -> None:
    torch_stand_in.is_grad_enabled = lambda: False
    assert interop.gpu_of("k", Tensor(requires_grad=True)) is None
    torch_stand_in.jit.is_tracing = lambda: True
    assert "torch.jit.trace" in refusal(TypeError, lambda: interop.gpu_of("k", Tensor()))


def test_tracers_and_proxies_go_by_their_classes() -> None:
    tracer = type("JVPTracer", (type("Tracer", (), {"__module__": "jax._src.core"}),), {})
    for name in ("k", "mask"):
        message = refusal(tracing.Traced, lambda name=name: interop.gpu_of(name, tracer()))
        assert message.startswith(f"{name}: got a tracer of JAX (JVPTracer)")
        assert "only attention() takes tracers" in message and "CuPy" not in message
    proxy = type("Proxy", (), {"__module__": "torch.fx.proxy"})
    assert "k: got a proxy of torch.fx" in refusal(TypeError, lambda: interop.taken("k", proxy()))


def test_public_functions_are_marked_for_dynamo_and_not_wrapped() -> None:
    for function in (attention, explain, plan, tracing.leave_dynamo):
        assert vars(function)["_torchdynamo_disable"] is True
        assert "__wrapped__" not in vars(function) and "torch" not in function.__code__.co_filename


def test_dynamo_is_told_once_and_never_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_told", [])
    monkeypatch.delitem(sys.modules, "torch._dynamo.trace_rules", raising=False)
    tracing.leave_dynamo()
    assert "torch._dynamo.trace_rules" not in sys.modules
    told: list[str] = []
    monkeypatch.setitem(
        sys.modules,
        "torch._dynamo.trace_rules",
        SimpleNamespace(add=told.append),  # type: ignore[arg-type]
    )
    tracing.leave_dynamo()
    tracing.leave_dynamo()
    assert {"flashcore_cupy.attention", "flashcore_cupy.problem"} <= set(told)
    assert len(set(told)) == len(told) and "flashcore_cupy.integrations" not in told
    assert all(importlib.util.find_spec(name) for name in told)
