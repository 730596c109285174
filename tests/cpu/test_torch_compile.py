"""attention() in graphs of torch: torch.compile, torch.export, what records operators."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from cases_gradients import asked, extras, operands

from flashcore_cupy import attention

if importlib.util.find_spec("torch") is None:
    pytest.skip("torch is not installed", allow_module_level=True)

B, H, HKV, SQ, SKV, D, DV = 2, 4, 2, 9, 13, 8, 12
EXTRAS = {
    name: rules
    for name, rules in extras(B, H, SQ, SKV).items()
    if not any("mod" in key for key in rules)
}
SOME = ("none", "causal at the top left", "window and causal", "bias, sink, mask")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    import torch

    torch.compiler.reset()
    yield
    torch.compiler.reset()


def given(rules: dict[str, Any], *, grad: bool = True) -> dict[str, Any]:
    """q, k, v and rules as tensors, with gradients where they have some."""
    import torch

    arrays = dict(zip("qkv", operands(H, HKV, SQ, SKV, D, DV, B), strict=True)) | rules
    found = {n: torch.as_tensor(x) if isinstance(x, np.ndarray) else x for n, x in arrays.items()}
    for name in asked(rules) if grad else ():
        found[name].requires_grad_()
    return found


def block(q: Any, **more: Any) -> Any:
    o = attention(q * 2, **more)
    return (o[0] + 1, o[1] * 2) if isinstance(o, tuple) else o + 1


def results(function: Any, arguments: dict[str, Any]) -> list[Any]:
    """What it returns, and the gradients of all that requires one."""
    import torch

    ends = function(**arguments)
    ends = ends if isinstance(ends, tuple) else (ends,)
    wrt = [x for x in arguments.values() if getattr(x, "requires_grad", False)]
    if not wrt or not torch.is_grad_enabled():
        return list(ends)
    return [*ends, *torch.autograd.grad(sum(x.square().sum() for x in ends), wrt)]


def same(got: list[Any], wanted: list[Any]) -> None:
    import torch

    assert len(got) == len(wanted) > 0
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


class TestWholeGraphs:
    @pytest.mark.parametrize("name", EXTRAS)
    def test_every_rule(self, name: str) -> None:
        import torch

        arguments = given(EXTRAS[name])
        compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
        same(results(compiled, arguments), results(block, arguments))

    @pytest.mark.parametrize("name", SOME)
    def test_inductor(self, name: str) -> None:
        import torch

        arguments = given(EXTRAS[name]) | {"return_lse": True}
        compiled = torch.compile(block, fullgraph=True)
        wanted = results(block, arguments)
        for _ in range(2):
            same(results(compiled, arguments), wanted)

    @pytest.mark.parametrize("how", ["no tensor requires one", "no_grad", "inference_mode"])
    def test_without_gradients(self, how: str) -> None:
        import contextlib

        import torch

        arguments = given(EXTRAS["bias, sink, mask"], grad=how != "no tensor requires one")
        compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
        with getattr(torch, how, contextlib.nullcontext)():
            same(results(compiled, arguments), results(block, arguments))

    def test_mod_args(self) -> None:
        import torch

        from flashcore_cupy.cpu.emulator.build import why_not

        if why_not():
            pytest.skip(f"needs a C++ compiler: {why_not()}")
        arguments = given({"causal": True}) | {"gain": torch.rand(H, requires_grad=True)}

        def call(gain: Any, **x: Any) -> Any:
            mods: Any = {"score_mod": "score * gain[h]", "mod_args": {"gain": gain}}
            return block(**x, kernel="mma_sm80", **mods)

        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        same(results(compiled, arguments), results(call, arguments))

    def test_attention_itself(self) -> None:
        import torch

        arguments = given({"causal": True})
        compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
        same(results(compiled, arguments), results(attention, arguments))

    def test_packed(self) -> None:
        import torch

        q, k, v = (torch.randn(9, 4, 8, requires_grad=True) for _ in range(3))
        bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
        arguments = {"q": q, "k": k, "v": v, "cu_seqlens_q": bounds, "cu_seqlens_k": [0, 3, 9]}
        compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
        same(results(compiled, arguments), results(block, arguments))

    def test_autocast(self) -> None:
        import torch

        arguments = given({})

        def low(**more: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return block(**more).float()

        compiled = torch.compile(low, backend="aot_eager", fullgraph=True)
        same(results(compiled, arguments), results(low, arguments))

    def test_sizes_that_change(self, caplog: pytest.LogCaptureFixture) -> None:
        """Two graphs: one for the first sizes, one for all others."""
        import torch

        graphs = []

        def backend(graph: Any, inputs: Any) -> Any:
            graphs.append(graph)
            return graph

        compiled = torch.compile(block, backend=backend, fullgraph=True)
        for n in range(2, 12):
            q, k, v = (torch.randn(n, 2, 3 + n, 8) for _ in range(3))
            assert torch.equal(compiled(q=q, k=k, v=v), block(q=q, k=k, v=v))
        assert len(graphs) == 2
        assert not [x for x in caplog.records if x.levelno >= logging.WARNING]
        assert "torch.ops.flashcore.attention" in graphs[0].code

    def test_numbers_that_change_or_come_of_sizes(self) -> None:
        import torch

        def call(q: Any, scale: float, side: int) -> Any:
            rules: dict[str, Any] = {"softmax_scale": scale * q.shape[-1] ** -0.5}
            return attention(q, q, q, window=(side, q.shape[2] // 4), **rules)

        compiled = torch.compile(call, backend="eager", fullgraph=True, dynamic=True)
        q = torch.randn(2, 2, 9, 8, requires_grad=True)
        for scale, side in ((0.5, 1), (0.7, 2), (0.9, 2)):
            assert torch.equal(compiled(q, scale, side), call(q, scale, side))

    def test_a_model_with_checkpoints_learns_the_same(self) -> None:
        import torch
        from torch.utils.checkpoint import checkpoint

        class Model(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.project = torch.nn.Linear(16, 48)
                self.sink = torch.nn.Parameter(torch.zeros(2))

            def attend(self, x: Any) -> Any:
                q, k, v = self.project(x).view(3, 6, 3, 2, 8).unbind(2)
                return attention(q, k, v, layout="bshd", causal=True, sink=self.sink).flatten(2)

            def forward(self, x: Any) -> Any:
                return checkpoint(self.attend, x, use_reentrant=False).sin()

        torch.manual_seed(0)
        model, x = Model(), torch.randn(3, 6, 16)
        parameters = list(model.parameters())
        wanted = torch.autograd.grad(model(x).square().sum(), parameters)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        got = torch.autograd.grad(compiled(x).square().sum(), parameters)
        same(list(got), list(wanted))

    def test_second_derivatives_raise(self) -> None:
        import torch

        arguments = given({})
        compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
        (dq,) = torch.autograd.grad(compiled(**arguments).sum(), arguments["q"], create_graph=True)
        with pytest.raises(RuntimeError, match=r"double backward|does not require grad"):
            dq.square().sum().backward()

    @pytest.mark.parametrize("what", ["out", "score_mod"])
    def test_what_a_graph_cannot_hold(self, what: str) -> None:
        import torch

        more = {"out": torch.empty(B, H, SQ, DV), "score_mod": lambda s, b, h, i, j: s * 0.5}
        arguments = given({}, grad=what != "out")
        compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
        with pytest.raises(Exception, match=r"attention|flashcore_cupy"):
            compiled(**arguments, **{what: more[what]})
        broken = torch.compile(block, backend="aot_eager")
        arguments |= {what: more[what]}
        same(results(broken, arguments), results(block, arguments))


class TestOperators:
    """Seen by everything that looks at operators."""

    @pytest.mark.parametrize("packed", [False, True])
    def test_torchs_own_check(self, packed: bool) -> None:
        import torch

        shapes = [(9, 4, 8)] * 3 if packed else [(2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 6)]
        q, k, v = map(torch.randn, shapes)
        names, options = "q k v", '{"layout": "bshd", "causal": true}'
        more = {}
        if packed:
            more = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), torch.tensor([0, 4, 9]))
            names, options = f"{names} {' '.join(more)}", '{"softcap": Infinity}'
        arrays = [q, k, v, *more.values()]
        ops = torch.ops.flashcore
        torch.library.opcheck(ops.attention, (arrays, names, options))
        o, lse = ops.attention(arrays, names, options)
        arrays += [o, lse, torch.randn_like(o)]
        names += " o lse do"
        torch.library.opcheck(ops.attention_backward, (arrays, names, options, "q v"))

    def test_export(self) -> None:
        import torch

        class Model(torch.nn.Module):
            def forward(self, q: Any, k: Any, v: Any) -> Any:
                return attention(q, k, v, causal=True)

        q, k, v = (torch.randn(2, 2, 5, 8) for _ in range(3))
        size = torch.export.Dim("size", min=2, max=64)
        program = torch.export.export(
            Model(), (q, k, v), dynamic_shapes=[{2: size}, {2: size}, {2: size}]
        )
        assert "torch.ops.flashcore.attention" in program.graph_module.code
        q, k, v = (torch.randn(2, 2, 11, 8) for _ in range(3))
        assert torch.equal(program.module()(q, k, v), attention(q, k, v, causal=True))

    def test_modes_that_record(self) -> None:
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.proxy_tensor import make_fx
        from torch.utils._python_dispatch import TorchDispatchMode

        arguments = {n: x for n, x in given({}, grad=False).items()}
        with FakeTensorMode() as mode:
            fakes = {n: mode.from_tensor(x) for n, x in arguments.items()}
            o, lse = attention(**fakes, return_lse=True)
            assert o.shape == (B, H, SQ, DV) and lse.shape == (B, H, SQ)
        q, k, v = arguments.values()
        graph = make_fx(lambda q: attention(q, k, v))(q)
        assert "torch.ops.flashcore.attention" in graph.code
        assert torch.equal(graph(2 * q), attention(2 * q, k, v))

        class Names(TorchDispatchMode):
            def __torch_dispatch__(self, function: Any, *rest: Any) -> Any:
                seen.append(str(function))
                _, args, kwargs = rest
                return function(*args, **(kwargs or {}))

        seen: list[str] = []
        with Names():
            attention(q.requires_grad_(), k, v).sum().backward()
        assert {"flashcore.attention.default", "flashcore.attention_backward.default"} <= set(seen)
