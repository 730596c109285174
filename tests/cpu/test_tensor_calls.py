"""Repeated calls on tensors of torch: which come by their addresses, and what the driver gets."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flashcore_cupy.launch import launch_cache, tensors

torch = pytest.importorskip("torch")
from noted_tensors import GPU, STREAM, Tensor, answers, tensor  # noqa: E402


def like_cupy(x: Any) -> Any:
    """The array of CuPy's that the long way makes of a tensor."""
    array = np.empty(tuple(x.shape), str(x.dtype).removeprefix("torch."))
    return SimpleNamespace(
        shape=array.shape,
        strides=tuple(n * array.itemsize for n in x.stride()),
        dtype=array.dtype,
        data=SimpleNamespace(ptr=x.data_ptr(), device_id=GPU),
        _c_contiguous=x.is_contiguous(),
    )


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    own = answers()
    monkeypatch.setattr(tensors, "_asked", own)
    return own


def test_plain_tensors_have_a_place(asked: SimpleNamespace) -> None:
    given = (tensor(2, 3), None, tensor(4))
    assert tensors.place(given) == (GPU, STREAM)
    asked.current_stream = lambda: SimpleNamespace(ptr=STREAM)
    assert tensors.place(given) == (GPU, STREAM)
    leaf = tensor(2).requires_grad_()
    with torch.no_grad():
        assert tensors.place((leaf,)) == (GPU, STREAM)
    x = given[0]
    assert tensors.place((x, leaf)) is None
    assert tensors.place((x, leaf), gradients=True) == (GPU, STREAM)
    assert not tensors.differentiates(x, x, x)
    for three in ((leaf, x, x), (x, leaf, x), (x, x, leaf)):
        assert tensors.differentiates(*three)
        with torch.no_grad():
            assert not tensors.differentiates(*three)
    assert not tensors.differentiates(leaf, x, np.zeros(2))


SPECIAL = {
    "a stream of CuPy's": {"current_stream": lambda: SimpleNamespace(ptr=9)},
    "captured": {"is_captured": lambda stream: True},
    "a mode": {"count_modes": lambda: 1},
    "torch.func": {"are_transforms_active": lambda: True},
    "traced": {"is_tracing": lambda: True},
    "forward mode": {"forward_ad": SimpleNamespace(_current_level=0)},
    "another GPU": {"current_device": lambda: 1},
}


@pytest.mark.parametrize("name", SPECIAL)
def test_where_something_is_special_the_long_way_is_taken(
    asked: SimpleNamespace, name: str
) -> None:
    assert tensors.place((tensor(2),)) is not None
    vars(asked).update(SPECIAL[name])
    assert tensors.place((tensor(2),)) is None


def test_tensors_that_are_more_than_their_memory(asked: SimpleNamespace) -> None:
    class Other(Tensor):
        pass

    elsewhere = tensor(2)
    elsewhere.gpu = 1
    special = {
        "gradient": tensor(2).requires_grad_(),
        "class": tensor(2).as_subclass(Other),
        "negative": torch._neg_view(tensor(2)),
        "elsewhere": elsewhere,
        "array": np.zeros(2),
    }
    assert special["negative"].is_neg()
    for name, x in special.items():
        assert tensors.place((tensor(2), x)) is None, name


def test_what_torch_no_longer_has_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cupy")
    monkeypatch.setattr(tensors, "_asked", None)
    assert not tensors.connect([np.zeros(2)]) and not tensors.connect([])
    with monkeypatch.context() as changed:
        changed.delattr(torch._C, "_is_tracing")
        assert not tensors.connect([torch.zeros(2)]) and tensors._asked is None


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, asked: SimpleNamespace) -> list[Any]:
    """What repeated calls hand to the driver."""
    calls: list[Any] = []
    fakes = {
        "_known": {},
        "_ndarray": SimpleNamespace,
        "_float32": np.dtype("f4"),
        "_set_device": lambda device: None,
        "_current_stream": lambda: SimpleNamespace(ptr=STREAM),
        "_launch_kernel": lambda *arguments: calls.append(arguments),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(launch_cache, name, fake)
    monkeypatch.setattr(tensors, "connect", lambda given: True)
    for variable in ("FLASHCORE_KERNELS_DIR", "FLASHCORE_ARCH"):
        monkeypatch.delenv(variable, raising=False)
    return calls


class _Known:
    """What ``remember`` makes of a plan: how results look, and which addresses were launched."""

    def __init__(self, plan: Any) -> None:
        self.output_shape, self.lse_shape = plan.problem.output_shape, plan.problem.lse_shape
        self.params = SimpleNamespace(copy=lambda: SimpleNamespace(address=0, words=None))
        self.geometry, self.overlapping, self.maps = (1,), None, None
        self.workspace_bytes: Any = None
        self.blocks: list[Any] = []
        self.patterns: list[Any] = []


@contextlib.contextmanager
def moved(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    places: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(launch_cache, "_KnownCall", _Known)
        patch.setattr(
            launch_cache._BoundBlock, "move", lambda self, at, maps: places.append(list(at))
        )
        yield places


def plan_of(given: tuple[Any, ...], arrays: tuple[Any, ...], *, lse: bool) -> Any:
    named = dict(zip("qkvo", (*arrays, arrays[0]), strict=True)) | ({"lse": None} if lse else {})
    shape = tuple(given[0].shape)
    return SimpleNamespace(
        steps=(None,),
        problem=SimpleNamespace(gate=None, output_shape=shape, lse_shape=shape[:-1]),
        arrays=named,
    )


CHOICES = (launch_cache.NO_WINDOW, "bhsd", "auto", True, bool)


@pytest.mark.parametrize("lse", [False, True])
def test_a_repeated_call_launches_with_addresses_and_makes_tensors(
    launched: list[Any], monkeypatch: pytest.MonkeyPatch, asked: SimpleNamespace, lse: bool
) -> None:
    given = tuple(tensor(1, 2, 5, 8) for _ in range(3))
    assert launch_cache.launch_again(*given, None, lse, CHOICES) is None
    with moved(monkeypatch) as places:
        arrays = tuple(map(like_cupy, given))
        plan = plan_of(given, arrays, lse=lse)
        launch_cache.remember(plan, CHOICES, out_given=False, given=given)
        assert len(launch_cache._known) == 2, "as arrays of CuPy's, and as tensors"
        made = launch_cache.launch_again(*given, None, lse, CHOICES)
        o, l = made if lse else (made, None)  # noqa: E741
        assert o.shape == (1, 2, 5, 8) and o.dtype == torch.float16
        assert places[-1] == [x.data_ptr() for x in (*given, o)] + [l.data_ptr() if lse else 0]
        assert (l.shape, l.dtype) == ((1, 2, 5), torch.float32) if lse else l is None
        assert launched == [(1, STREAM, 0, 0)]
        other = tensor(1, 2, 5, 8)
        assert launch_cache.launch_again(other, *given[1:], None, lse, CHOICES) is not None
        assert places[-1][0] == other.data_ptr()
        # What is another call.
        turned = tensor(1, 5, 2, 8).transpose(1, 2)
        assert turned.shape == other.shape and turned.stride() != other.stride()
        for x in (turned, tensor(1, 2, 5, 8, dtype=torch.bfloat16), tensor(1, 2, 6, 8)):
            assert launch_cache.launch_again(x, *given[1:], None, lse, CHOICES) is None
        assert launch_cache.launch_again(*given, None, not lse, CHOICES) is None
        assert launch_cache.launch_again(*given, other, lse, CHOICES) is None
        asked.is_autocast_enabled = lambda where: True
        assert launch_cache.launch_again(*given, None, lse, CHOICES) is None
        asked.autocast_dtype = lambda where: torch.float16
        assert launch_cache.launch_again(*given, None, lse, CHOICES) is not None
        assert len(launched) == 3


def test_copies_are_not_remembered_as_tensors(
    launched: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = tuple(tensor(1, 2, 5, 8) for _ in range(3))
    arrays = tuple(map(like_cupy, (given[0], given[1], tensor(1, 2, 5, 8))))
    with moved(monkeypatch):
        launch_cache.remember(
            plan_of(given, arrays, lse=False), CHOICES, out_given=False, given=given
        )
        assert len(launch_cache._known) == 1
