"""Known calls on tensors that require a gradient: when they are launched again, and what comes out.

Tensors of the host stand for a GPU's, and NumPy for the kernels: a launch reads and writes the
addresses that its parameters hold.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flashcore_cupy import attention, attention_backward, backward
from flashcore_cupy.integrations import engine
from flashcore_cupy.launch import backward_cache, launch_cache, tensors
from flashcore_cupy.launch.backward import GpuBackward
from flashcore_cupy.launch.parameter_block import ParameterBlock
from flashcore_cupy.launch.plan import Step
from flashcore_cupy.problem.attention_problem import contiguous_problem
from flashcore_cupy.problem.gradients import contiguous_gradients
from flashcore_cupy.select.backward import (
    backward_params,
    pointer_of,
    select_backward,
)
from flashcore_cupy.select.params import ATTENTION_PARAMS

torch = pytest.importorskip("torch")
from flashcore_cupy.integrations import torch_again, torch_attention  # noqa: E402

GPU = -1  # what a tensor of the host says
KNOWN_BY = {"causal", "window", "softcap", "softmax_scale", "kernel", "layout", "batch_invariant"}
SHAPE = (1, 2, 9, 16)
KEYS = (1, 2, 13, 16)


def memory(address: int, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """An array of float32 where a launch finds it, or leaves it."""
    return np.ctypeslib.as_array((ctypes.c_float * math.prod(shape)).from_address(address)).reshape(
        shape
    )


def like_cupy(x: Any) -> Any:
    """The array of CuPy's that the long way makes of a tensor."""
    dtype = np.dtype(str(x.dtype).removeprefix("torch."))
    return SimpleNamespace(
        shape=tuple(x.shape),
        strides=tuple(n * dtype.itemsize for n in x.stride()),
        dtype=dtype,
        data=SimpleNamespace(ptr=x.data_ptr(), device_id=GPU),
        _c_contiguous=x.is_contiguous(),
    )


class _Gpu:
    """A driver that has NumPy compute; and the long way, which has calls remembered."""

    def __init__(self) -> None:
        self.blocks: dict[int, ParameterBlock] = {}
        self.work: list[Callable[[Any], None]] = []
        self.launched: list[str] = []
        self.long: list[str] = []
        self.streams: list[int] = []

    def launch(self, *arguments: Any) -> None:
        function, *_, stream, address, _ = arguments
        self.streams.append(stream)
        if function:  # of a backward pass the last launch does all
            self.work[function - 1](self.blocks[address].words)

    def forward(self, given: Any, names: str, options: dict[str, Any]) -> Any:
        """The long way of ``Attention``, and what a GPU's remembers."""
        self.long.append("forward")
        results = _long_forward(given, names, options)
        if names != "q k v" or not options.keys() <= KNOWN_BY:
            return results
        named = dict(zip([*"qkv", "o", "lse"], map(like_cupy, (*given, *results)), strict=True))
        rules = dict(options)

        def work(words: Any) -> None:
            self.launched.append("forward")
            q, k, v = (memory(words[n], x.shape) for n, x in enumerate(given))
            o, lse = attention(q, k, v, **rules, return_lse=True)
            memory(words[3], o.shape)[...] = o
            memory(words[4], lse.shape)[...] = lse

        self.work.append(work)
        block = ParameterBlock(np.zeros((), ATTENTION_PARAMS))
        plan: Any = SimpleNamespace(
            problem=SimpleNamespace(
                gate=None, output_shape=named["o"].shape, lse_shape=named["lse"].shape
            ),
            steps=(Step(len(self.work), 1, 1, 0, block),),
            arrays=named, views=(), workspace_bytes=(0, 0),
        )  # fmt: skip
        launch_cache.remember(plan, choices_of(rules), out_given=False, given=given)
        return results

    def backward(self, given: Any, names: str, options: dict[str, Any], wrt: str) -> Any:
        """The long way of its gradients."""
        self.long.append("backward")
        results = _long_backward(given, names, options, wrt)
        operands = dict.fromkeys(["do", *"qkv", "o", "lse", "dlse"])
        operands |= dict(zip(names.split(), given, strict=True))
        if any(x is not None and not x.is_contiguous() for x in operands.values()):
            return results  # copied, or of a problem that is none of contiguous arrays
        if names != "q k v o lse do" or not options.keys() <= KNOWN_BY:
            return results
        rules = {name: x for name, x in options.items() if name != "kernel"}
        given_arrays = {n: x if x is None else like_cupy(x) for n, x in operands.items()}
        arguments = (attention_backward.__kwdefaults__ or {}) | rules | {"wrt": (*wrt.split(),)}
        bound = self.bound(given_arrays, arguments, results)
        known_by = backward._choices(arguments)
        assert known_by is not None and not known_by[1]
        backward_cache.remember(bound, operands, *known_by)
        return results

    def bound(self, given: dict[str, Any], arguments: dict[str, Any], results: Any) -> GpuBackward:
        b, h, s, d = given["q"].shape
        problem = contiguous_problem(
            b, h, s, d, seqlen_kv=given["k"].shape[2], dtype="float32", causal=arguments["causal"]
        )
        gradients = contiguous_gradients(problem, arguments["wrt"])
        selection = select_backward(gradients, "sm_80")
        arrays = {pointer_of(name): x for name, x in given.items() if x is not None}
        arrays |= {f"d{n}": like_cupy(x) for n, x in zip(arguments["wrt"], results, strict=True)}
        scratch = selection.scratch(problem)
        arrays |= {n: like_cupy(torch.empty(shape)) for n, shape in scratch.items()}
        params = backward_params(gradients, selection)
        bound = GpuBackward(gradients, selection, arrays, params=params)
        addresses = {name: x.data.ptr for name, x in arrays.items()}
        bound.launches = (*bound.launches_at(addresses, lambda at, view: params),)
        fields = {name: field[1] // 8 for name, field in (params.dtype.fields or {}).items()}
        rules = {n: arguments[n] for n in ("causal", "softcap", "window", "softmax_scale")}
        shapes = {name: x.shape for name, x in arrays.items()}

        def work(words: Any) -> None:
            self.launched.append("backward")
            do, q, k, v, o, lse = (
                memory(words[fields[n]], shapes[n]) for n in ("dout", *"qkv", "o", "lse")
            )
            found = attention_backward(do, q, k, v, o, lse, wrt=arguments["wrt"], **rules)
            for name in arguments["wrt"]:
                x = getattr(found, f"d{name}")
                memory(words[fields[f"d{name}"]], x.shape)[...] = x

        self.work.append(work)
        last = len(bound.launches) - 1
        bound.steps = tuple(
            Step(len(self.work) if n == last else 0, x.grid, 1, 0, ParameterBlock(x.params))
            for n, x in enumerate(bound.launches)
        )
        return bound


_long_forward = torch_attention.forward_of_tensors
_long_backward = torch_attention._backward_of_tensors


def choices_of(rules: dict[str, Any]) -> tuple[Any, ...]:
    """What ``attention`` says that a call is known by."""
    given = (attention.__kwdefaults__ or {}) | rules
    found = [given[name] for name in ("window", "layout", "kernel")]
    for name in ("causal", "softcap", "dropout_p", "softmax_scale", "batch_invariant"):
        found += [given[name], given[name].__class__]
    return tuple(found)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> _Gpu:
    gpu = _Gpu()
    runtime = SimpleNamespace(
        getDevice=lambda: GPU,
        setDevice=lambda device: None,
        streamIsCapturing=lambda stream: False,
    )
    cuda = SimpleNamespace(
        runtime=runtime,
        driver=SimpleNamespace(launchKernel=gpu.launch),
        get_current_stream=lambda: SimpleNamespace(ptr=0),
    )
    own_cupy = sys.modules.get("cupy")
    monkeypatch.setitem(
        sys.modules, "cupy", SimpleNamespace(ndarray=SimpleNamespace, cuda=cuda, dtype=np.dtype)
    )
    c = torch._C
    own = SimpleNamespace(
        classes=(torch.Tensor, torch.nn.Parameter),
        strided=torch.strided,
        float32=torch.float32,
        empty_like=torch.empty_like,
        is_grad_enabled=torch.is_grad_enabled,
        is_autocast_enabled=lambda where: torch.is_autocast_enabled("cpu"),
        autocast_dtype=lambda where: torch.get_autocast_dtype("cpu"),
        are_transforms_active=c._are_functorch_transforms_active,
        count_modes=c._len_torch_dispatch_stack,
        is_tracing=c._is_tracing,
        stream=lambda gpu: 0,
        forward_ad=torch.autograd.forward_ad,
        current_device=runtime.getDevice,
        current_stream=cuda.get_current_stream,
        is_captured=runtime.streamIsCapturing,
        cupy=own_cupy,
    )
    fakes = {
        "_known": {}, "_ndarray": SimpleNamespace, "_set_device": runtime.setDevice,
        "_current_stream": cuda.get_current_stream, "_launch_kernel": gpu.launch,
        "_differentiate": torch_again.attend_again,
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(launch_cache, name, fake)
    monkeypatch.setattr(backward_cache, "_known", {})
    monkeypatch.setattr(tensors, "_asked", own)
    monkeypatch.setattr(torch_attention, "forward_of_tensors", gpu.forward)
    monkeypatch.setattr(torch_attention, "_backward_of_tensors", gpu.backward)
    for variable in ("FLASHCORE_KERNELS_DIR", "FLASHCORE_ARCH"):
        monkeypatch.delenv(variable, raising=False)
    init = ParameterBlock.__init__

    def noted(self: ParameterBlock, params: Any) -> None:
        init(self, params)
        gpu.blocks[self.address] = self

    monkeypatch.setattr(ParameterBlock, "__init__", noted)
    return gpu


def leaves(which: str = "qkv", seed: int = 0) -> list[Any]:
    torch.manual_seed(seed)
    made = [torch.randn(SHAPE), torch.randn(KEYS), torch.randn(KEYS)]
    return [x.requires_grad_(name in which) for name, x in zip("qkv", made, strict=True)]


def gradients(given: list[Any], do: Any = None, **arguments: Any) -> list[Any]:
    """Of those that require one, after the output."""
    o = attention(*given, **arguments)
    wanted = [x for x in given if x.requires_grad]
    do = torch.linspace(-1, 1, o.numel()).reshape(o.shape) if do is None else do
    return [o.detach(), *torch.autograd.grad(o, wanted, do)]


def know(gpu: _Gpu, which: str = "qkv", **arguments: Any) -> None:
    """Have a call made once."""
    gradients(leaves(which, seed=9), **arguments)
    assert gpu.long == ["forward", "backward"] and not gpu.launched
    gpu.long.clear()


def same(found: list[Any], wanted: list[Any]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


def by_hand(given: list[Any], **arguments: Any) -> list[Any]:
    """The long way's results, whatever is known."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch_cache, "_differentiate", None)
        patch.setattr(torch_attention, "forward_of_tensors", _long_forward)
        patch.setattr(torch_attention, "_backward_of_tensors", _long_backward)
        return gradients(given, **arguments)


BOTH = ["forward", "backward"]


@pytest.mark.parametrize("which", ["q", "k", "v", "qk", "qv", "kv", "qkv"])
@pytest.mark.parametrize("arguments", [{}, {"causal": True, "window": (3, -1)}], ids=str)
def test_a_known_call_is_launched_and_gives_the_same(
    gpu: _Gpu, which: str, arguments: dict[str, Any]
) -> None:
    know(gpu, which, **arguments)
    for seed in range(3):
        given = leaves(which, seed)
        found = gradients(given, **arguments)
        assert same(found, by_hand(given, **arguments))
    assert gpu.launched == BOTH * 3 and not gpu.long


def test_choices_are_those_of_the_call(gpu: _Gpu) -> None:
    know(gpu, causal=True)
    for other in ({}, {"causal": "top-left"}, {"causal": True, "softmax_scale": 0.5}):
        gpu.long.clear()
        gradients(leaves(), **other)
        assert gpu.long == BOTH and not gpu.launched, other
    # A softcap of 0 and one of 0.0 are equal, but not the same argument.
    gpu.long.clear()
    gradients(leaves(), causal=True, softcap=0)
    assert gpu.long == BOTH and not gpu.launched
    gradients(leaves(), causal=True, softcap=0)
    assert gpu.launched == BOTH


def test_the_log_sum_exp_is_a_result_too(gpu: _Gpu) -> None:
    know(gpu)
    given = leaves()
    o, lse = attention(*given, return_lse=True)
    assert gpu.launched == ["forward"] and lse.requires_grad and lse.dtype == torch.float32
    of_o = torch.autograd.grad(o, given, torch.ones(SHAPE), retain_graph=True)
    assert gpu.launched == BOTH and not gpu.long
    of_lse = torch.autograd.grad(lse.sum(), given, retain_graph=True, allow_unused=True)
    both = torch.autograd.grad((o, lse), given, (torch.ones(SHAPE), torch.ones(SHAPE[:3])))
    assert gpu.launched == BOTH and gpu.long == ["backward", "backward"]
    for x, y, z in zip(of_o, of_lse, both, strict=True):
        torch.testing.assert_close(x + (0 if y is None else y), z)


def test_a_graph_may_be_kept_or_is_gone(gpu: _Gpu) -> None:
    know(gpu)
    given = leaves()
    o = attention(*given)
    do = torch.randn(SHAPE)
    first = torch.autograd.grad(o, given, do, retain_graph=True)
    assert same(first, torch.autograd.grad(o, given, do))
    with pytest.raises(RuntimeError, match="second time"):
        o.sum().backward()
    assert gpu.launched == ["forward", "backward", "backward"]


def test_what_changes_before_backward_is_noticed(gpu: _Gpu) -> None:
    know(gpu)
    q, k, v = leaves()
    o = attention(q * 1, x := k * 1, v)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()
    o = attention(q, k, v)
    with torch.no_grad():
        o.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()
    assert gpu.launched == ["forward"] * 2


def test_second_derivatives_raise(gpu: _Gpu) -> None:
    know(gpu)
    q, k, v = leaves()
    o = attention(q, k, v)
    (dq,) = torch.autograd.grad(o, q, torch.ones(SHAPE), create_graph=True)
    assert gpu.launched == ["forward"]
    with pytest.raises(RuntimeError, match="attention\\(\\) has no second derivative"):
        (dq.square().sum() + q.sum()).backward()


@pytest.mark.parametrize("how", ["expanded", "turned"])
def test_gradients_of_the_output_in_other_strides(gpu: _Gpu, how: str) -> None:
    know(gpu)
    gradients(leaves())
    assert gpu.launched == BOTH
    gpu.launched.clear()
    given = leaves()
    do = torch.randn(1, 1, 1, 1).expand(SHAPE)
    if how == "turned":
        do = torch.randn(SHAPE).transpose(1, 2).contiguous().transpose(1, 2)
    found = gradients(given, do)
    assert gpu.launched == ["forward"] and gpu.long == ["backward"]
    assert same(found, by_hand(given, do=do))


def test_an_output_without_a_gradient(gpu: _Gpu) -> None:
    """The long way takes it as one of zeros."""
    know(gpu)
    given = leaves()
    _, lse = attention(*given, return_lse=True)
    found = torch.autograd.grad(lse, given, torch.ones(SHAPE[:3]))
    assert gpu.launched == ["forward"] and gpu.long == ["backward"]
    assert found[0].abs().max() > 0 and (found[2] == 0).all()


def test_gradients_that_torch_batches_are_refused_by_torch_as_ever(gpu: _Gpu) -> None:
    """They have no memory of their own."""
    know(gpu)
    given = leaves()
    do = torch.randn(3, *SHAPE)
    for long_way in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if long_way:
                patch.setattr(launch_cache, "_differentiate", None)
            o = attention(*given)
        with pytest.raises(RuntimeError):
            torch.autograd.grad(o, given, do, is_grads_batched=True)
    assert gpu.launched == ["forward"]


def test_hooks_of_results_and_leaves(gpu: _Gpu) -> None:
    know(gpu)
    given = leaves()
    seen: list[str] = []
    o = attention(*given)

    def doubled(gradient: Any) -> Any:
        seen.append("o")
        return gradient * 2

    o.register_hook(doubled)
    given[0].register_hook(lambda gradient: seen.append("q"))
    o.backward(torch.ones_like(o))
    assert seen == ["o", "q"] and gpu.launched == BOTH
    wanted = by_hand(given, do=torch.full(SHAPE, 2.0))
    assert same([x.grad for x in given], wanted[1:])


def test_leaves_that_get_other_data_take_the_long_way(gpu: _Gpu) -> None:
    """Autograd keeps a leaf itself, and does not count this as a change."""
    know(gpu)
    given = leaves()
    for other in (torch.randn(SHAPE), torch.randn(1, 9, 2, 16).transpose(1, 2)):
        gpu.launched.clear()
        gpu.long.clear()
        o = attention(*given)
        given[0].data = other
        o.backward(torch.ones(SHAPE))
        assert gpu.launched == ["forward"] and gpu.long == ["backward"]
        given[0].data = torch.randn(SHAPE)


def test_kernels_of_the_environment_between_the_passes(
    gpu: _Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    know(gpu)
    given = leaves()
    gradients(given)
    o = attention(*given)
    monkeypatch.setenv("FLASHCORE_ARCH", "sm_80")
    o.backward(torch.ones(SHAPE))
    assert gpu.launched == [*BOTH, "forward"] and gpu.long == ["backward"]


def test_hooks_put_on_what_was_saved_later(gpu: _Gpu) -> None:
    know(gpu)
    given = leaves()
    o = attention(*[x * 1 for x in given])
    for saved in o.grad_fn._raw_saved_tensors:
        saved.register_hooks(lambda x: x.clone(), lambda x: x)
    found = torch.autograd.grad(o, given, torch.ones(SHAPE))
    assert gpu.launched == ["forward"] and gpu.long == ["backward"]
    assert same(list(found), by_hand(given, do=torch.ones(SHAPE))[1:])


def test_memory_that_is_less_aligned_is_known_by_itself(gpu: _Gpu) -> None:
    know(gpu)
    flat = torch.randn(math.prod(SHAPE) + 1)
    q = flat[1:].view(SHAPE).requires_grad_()
    _, k, v = leaves()
    found = gradients([q, k, v])
    assert gpu.long == BOTH and not gpu.launched
    assert same(gradients([q, k, v]), found)
    assert gpu.launched == BOTH, "the backward cache knows it, each address by itself"


def test_kinds_of_gradients_are_forgotten_when_there_are_many(
    gpu: _Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_again, "_MOST_KINDS", 1)
    for which in ("q", "k"):
        gradients(leaves(which))
        gradients(leaves(which))
    gradients(leaves("q"))
    (known, *_) = [x for x in launch_cache._known.values() if x.gradients]
    assert len(known.gradients) == 1


def in_a_mode(call: Callable[..., Any], given: list[Any]) -> Any:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Mode(TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return function(*args, **(kwargs or {}))

    with Mode():
        call(*given)


def under_autocast(call: Callable[..., Any], given: list[Any]) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        call(*given)


def with_hooks(call: Callable[..., Any], given: list[Any]) -> Any:
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
        call(*given).sum().backward()


def in_a_checkpoint(call: Callable[..., Any], given: list[Any]) -> Any:
    from torch.utils.checkpoint import checkpoint

    checkpoint(call, *given, use_reentrant=False).sum().backward()


def by_torch_func(call: Callable[..., Any], given: list[Any]) -> Any:
    torch.func.grad(lambda *x: call(*x).sum())(*given)


def mapped(call: Callable[..., Any], given: list[Any]) -> Any:
    torch.vmap(call)(*(x[None] for x in given))


def of_a_subclass(call: Callable[..., Any], given: list[Any]) -> Any:
    class Other(torch.Tensor):  # type: ignore[misc,name-defined]
        pass

    call(given[0].as_subclass(Other), *given[1:])


def compiled(call: Callable[..., Any], given: list[Any]) -> Any:
    own = tensors._asked.cupy
    with pytest.MonkeyPatch.context() as patch:  # the compiler may import it, and look into it
        patch.delitem(sys.modules, "cupy")
        if own is not None:
            patch.setitem(sys.modules, "cupy", own)
        torch.compile(call, backend="aot_eager", fullgraph=True)(*given)
    torch.compiler.reset()


def in_forward_mode(call: Callable[..., Any], given: list[Any]) -> Any:
    with torch.autograd.forward_ad.dual_level():
        call(*given)


def on_a_stream_of_cupys(call: Callable[..., Any], given: list[Any]) -> Any:
    tensors._asked.current_stream = lambda: SimpleNamespace(ptr=9)
    call(*given)


def captured(call: Callable[..., Any], given: list[Any]) -> Any:
    tensors._asked.stream = lambda gpu: 7
    tensors._asked.is_captured = lambda stream: True
    call(*given)


def on_another_gpu(call: Callable[..., Any], given: list[Any]) -> Any:
    tensors._asked.current_device = lambda: 1
    call(*given)


def with_kernels_of_the_environment(call: Callable[..., Any], given: list[Any]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASHCORE_ARCH", "sm_80")
        call(*given)


CONDITIONS = [
    in_a_mode, under_autocast, with_hooks, in_a_checkpoint, by_torch_func, mapped, of_a_subclass,
    compiled, in_forward_mode, on_a_stream_of_cupys, captured, on_another_gpu,
    with_kernels_of_the_environment,
]  # fmt: skip


@pytest.mark.parametrize("condition", CONDITIONS, ids=lambda x: x.__name__)
def test_where_something_is_special_the_long_way_is_taken(
    gpu: _Gpu, condition: Callable[..., Any]
) -> None:
    know(gpu)
    gradients(leaves())
    assert gpu.launched == BOTH
    condition(attention, leaves())
    assert gpu.launched == BOTH


@pytest.mark.parametrize(
    "arguments",
    [{"bias": torch.zeros(9, 13)}, {"sink": [0.0, 0.0]}, {"dropout_p": 0.5, "rng": (1, 2)},
     {"score_mod": lambda s, *at: s}, {"mask": torch.ones(9, 13, dtype=torch.bool)}],
    ids=lambda x: next(iter(x)),
)  # fmt: skip
def test_calls_with_more_than_tensors_are_not_known(gpu: _Gpu, arguments: dict[str, Any]) -> None:
    know(gpu)
    for _ in range(2):
        gradients(leaves(), **arguments)
    assert not gpu.launched and gpu.long == BOTH * 2


def test_wrong_arguments_are_refused_as_ever(gpu: _Gpu) -> None:
    know(gpu)
    q, k, v = leaves()
    for error, message, arguments in (
        (ValueError, "^out: it is written in place", {"out": torch.empty(SHAPE)}),
        (ValueError, "^causal: ", {"causal": "bottom"}),
        (ValueError, "^window: ", {"window": (1, 2, 3)}),
    ):
        with pytest.raises(error, match=message):
            attention(q, k, v, **arguments)
    with pytest.raises(TypeError, match="float64"):
        attention(q.double(), k, v)
    assert not gpu.launched


def test_a_reentrant_checkpoint_launches_again_and_again(gpu: _Gpu) -> None:
    from torch.utils.checkpoint import checkpoint

    know(gpu)
    given = leaves()
    checkpoint(attention, *given, use_reentrant=True).backward(torch.ones(SHAPE))
    assert gpu.launched == BOTH, "its first pass has no gradients"
    assert same([x.grad for x in given], by_hand(given, do=torch.ones(SHAPE))[1:])


def test_a_launch_goes_to_torchs_stream_both_ways(gpu: _Gpu) -> None:
    know(gpu)
    gpu.streams.clear()
    tensors._asked.stream = lambda gpu: 7
    gradients(leaves())
    assert set(gpu.streams) == {7}


def test_it_is_connected_by_the_first_call_that_requires_a_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch_cache, "_differentiate", None)
    attention(*leaves()).sum().backward()
    assert launch_cache._differentiate is torch_again.attend_again
    monkeypatch.setattr(launch_cache, "_differentiate", None)
    with monkeypatch.context() as patch:
        patch.delattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
        torch_again.connect()
        assert launch_cache._differentiate is None


def test_results_are_what_engines_calls_have(gpu: _Gpu) -> None:
    """The arguments that a known call hands to the long way are those that it was made with."""
    choices = choices_of({"causal": True, "window": (3, -1), "softcap": 2.0, "kernel": "mma_sm80"})
    options = torch_again._options(choices)
    assert choices_of(options) == choices
    assert engine.plain(options) == options
    text = engine.encode(options)
    assert isinstance(text, str) and choices_of(engine._decoded(text)) == choices
    arguments = (attention_backward.__kwdefaults__ or {}) | options | {"wrt": ("q", "v")}
    arguments["kernel"] = "auto"
    known_by = backward._choices(arguments)
    assert known_by == (torch_again._backward_choices(choices, (True, False, True)), {})
