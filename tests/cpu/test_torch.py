"""torch's tensors on the CPU: their memory, gradients and traces, torch.compile."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator
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
from drawn_blocks import operands, with_its_rule

import flashcore_cupy
from flashcore_cupy.problem import interop
from flashcore_cupy.problem.attention_problem import DTYPES

if importlib.util.find_spec("torch") is None:
    pytest.skip("torch is not installed", allow_module_level=True)


def tensor(x: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(x)


class TestTraces:
    """What only attention() takes, or nothing: a result without its gradient would belie it."""

    @pytest.mark.parametrize("name", FLOATS)
    def test_explain_takes_nothing_that_requires_a_gradient(self, name: str) -> None:
        import torch

        odd = tensor(numbers(*FLOATS[name])).requires_grad_()
        message = refusal(TypeError, lambda: explain(**arguments(tensor, name, odd)))
        assert message.startswith(f"{name}: requires a gradient, which only attention() gives; ")
        assert f"pass {name}.detach()" in message and "torch.no_grad()" in message
        plain = attention(**arguments(tensor, name, odd.detach()))
        for without in (torch.no_grad, torch.inference_mode):
            with without():
                got = attention(**arguments(tensor, name, odd))
            assert not got.requires_grad or got is odd
            assert torch.equal(got, plain)

    @pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "jacrev"])
    def test_explain_does_not_go_with_torch_func(self, transform: str) -> None:
        import torch

        given = arguments(tensor)
        q = given.pop("q")

        def call(x: Any) -> Any:
            return explain(x, **given)

        run = {
            "grad": lambda: torch.func.grad(call)(q),
            "vmap": lambda: torch.func.vmap(call)(q[None]),
            "jvp": lambda: torch.func.jvp(call, (q,), (q,)),
            "jacrev": lambda: torch.func.jacrev(call)(q),
        }[transform]
        assert refusal(TypeError, run).startswith("q: got a tensor inside torch.func or torch.vmap")

    def test_tangents(self) -> None:
        from torch.autograd import forward_ad

        x = tensor(numbers(SQ, SKV))
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, x)
            message = everywhere("bias", ValueError, arguments(tensor, "bias", dual))
            assert "has a tangent" in message
            attention(**arguments(tensor, "bias", forward_ad.unpack_dual(dual).primal))

    def test_tensors_that_are_not_just_memory(self) -> None:
        import torch

        x = torch.zeros(OPERANDS["k"])
        conjugate = torch.zeros(OPERANDS["k"], dtype=torch.complex64).conj()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            odd = {
                "meta device": x.to("meta"),
                ".to_dense()": x.to_sparse(),
                ".resolve_neg()": conjugate.imag,
                "nested": torch.nested.nested_tensor([x[0, 0], x[0, 1, :2]]),
                "MaskedTensor": torch.masked.masked_tensor(x, x == 0),
            }
        for message, one in odd.items():
            assert message in everywhere("k", TypeError, arguments(tensor, "k", one))

    def test_a_trace_would_keep_the_result(self) -> None:
        import torch

        given = arguments(tensor)
        q = given.pop("q")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            message = refusal(
                TypeError, lambda: torch.jit.trace(lambda x: attention(x, **given), (q,))
            )
            assert message.startswith("q: got a tensor inside torch.jit.trace")
            message = refusal(
                TypeError, lambda: torch.fx.symbolic_trace(lambda x: attention(x, **given))
            )
            assert message.startswith("q: got a proxy of torch.fx")

    def test_autograd_knows_what_was_written(self) -> None:
        import torch

        out = torch.ones(OPERANDS["q"])
        weight = torch.ones((), requires_grad=True)
        product = (weight * out).sum()  # saves out for its backward pass
        attention(**arguments(tensor, "out", out))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()

    def test_hints_are_in_words_of_torch(self) -> None:
        import torch

        x = torch.zeros(OPERANDS["k"])
        for dtype, hint in ((torch.float64, "k.to(torch.float32)"), (torch.int8, "torch.float16)")):
            given = arguments(tensor, "k", x.to(dtype))
            assert everywhere("k", TypeError, given).endswith(hint)


class TestCompile:
    """What breaks the graph, and what does not, runs as it does without a compiler."""

    @pytest.fixture(autouse=True)
    def fresh(self) -> Iterator[None]:
        import torch

        torch.compiler.reset()
        yield
        torch.compiler.reset()

    @pytest.mark.parametrize("backend", ["eager", "inductor"])
    def test_the_same_result(self, backend: str) -> None:
        import torch

        given = arguments(tensor)
        rules: list[dict[str, Any]] = [
            {},
            {"mask": torch.rand(SQ, SKV) < 0.7},
            {"return_lse": True},
            {"sink": [0.5] * H, "softmax_scale": torch.tensor(0.3)},
            {
                "score_mod": lambda score, b, h, i, j, x: score + x.mean(),
                "mod_args": {"x": given["v"]},
            },
            {"out": torch.empty(OPERANDS["q"])},
        ]

        def block(q: Any, k: Any, v: Any, **more: Any) -> Any:
            o = attention(q * 2, k, v, causal=True, **more)
            return (o[0] + 1, o[1] * 2) if isinstance(o, tuple) else o + 1

        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # torch has deprecations of its own
            for more in rules:
                wanted = block(**given, **more)
                compiled = torch.compile(block, backend=backend)
                for _ in range(2):
                    got = compiled(**given, **more)
                    pairs = (
                        zip(got, wanted, strict=True) if "return_lse" in more else [(got, wanted)]
                    )
                    assert all(torch.equal(x, y) for x, y in pairs)

    def test_many_shapes(self, caplog: pytest.LogCaptureFixture) -> None:
        """Nothing of ours is compiled anew for each, which torch would warn of in its log."""
        import torch

        compiled = torch.compile(lambda q, k, v: attention(q, k, v) * 2, backend="eager")
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            for n in range(1, 20):
                q, k, v = (tensor(numbers(1, n, 4 + n, D)) for _ in range(3))
                assert torch.equal(compiled(q, k, v), attention(q, k, v) * 2)
        assert not [x for x in caplog.records if x.levelno >= logging.WARNING]

    def test_attention_itself_and_other_arrays(self) -> None:
        import torch

        for convert in (tensor, np.asarray):
            given = arguments(convert)
            wanted = attention(**given)
            got = torch.compile(attention, backend="eager")(**given)
            np.testing.assert_array_equal(np.asarray(got), np.asarray(wanted))
            got = torch.compile(lambda given=given: attention(**given), backend="eager")()
            np.testing.assert_array_equal(np.asarray(got), np.asarray(wanted))

    def test_errors_reach_the_caller(self) -> None:
        import torch

        compiled = torch.compile(lambda **given: attention(**given), backend="eager")
        for requires_grad in (False, True):
            given = arguments(tensor) | {"causal": "bottom"}
            given["q"].requires_grad_(requires_grad)
            with pytest.raises(ValueError, match=r"^causal: got 'bottom'"):
                compiled(**given)

    @pytest.mark.parametrize("first", ["torch", "flashcore_cupy"])
    def test_whichever_is_imported_first(self, first: str) -> None:
        """And the first call of all is compiled."""
        imports = ["import torch", "import flashcore_cupy"]
        lines = (
            "import sys, warnings",
            "warnings.simplefilter('error')" if first != "torch" else "",
            *(imports if first == "torch" else imports[::-1]),
            "x = torch.ones(1, 2, 5, 8)",
            "f = lambda x: flashcore_cupy.attention(x * 2, x, x, causal=True, sink=[1.0, 2.0]) + 1",
            "with warnings.catch_warnings():",
            "    warnings.simplefilter('error')",
            "    got = torch.compile(f, backend='eager', fullgraph=True)(x)",
            "assert torch.equal(got, f(x))",
        )
        done = subprocess.run(
            [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr


class TestMemory:
    """Tensors are taken and returned without a copy."""

    @pytest.mark.parametrize("dtype", [*DTYPES, "int32", "bool"])
    def test_memory_is_shared_both_ways(self, dtype: str) -> None:
        import torch

        base = (torch.randn(2, 4, 6, 8) * 4).to(getattr(torch, dtype))
        for x in (base, base.transpose(1, 2), base[:, ::2, 1:, 3:5], base[:, :0]):
            got, kind = interop.taken("q", x)
            assert kind == "torch" and got.dtype.name == dtype and got.shape == tuple(x.shape)
            assert x.numel() == 0 or got.ctypes.data == x.data_ptr()
            np.testing.assert_array_equal(got.astype("f4"), x.float().numpy())
            back = interop.returned(got, kind)
            assert isinstance(back, torch.Tensor) and back.dtype == x.dtype
            assert torch.equal(back, x)
            assert x.numel() == 0 or back.data_ptr() == x.data_ptr()
            assert interop.returned(got, kind, x) is x

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_attention(self, dtype: str) -> None:
        import torch

        torch.manual_seed(0)
        q, k, v = (torch.randn(1, 8, 2, 16).to(getattr(torch, dtype)) for _ in range(3))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        o, lse = flashcore_cupy.attention(q, k, v, return_lse=True)
        assert o.dtype == q.dtype and lse.dtype == torch.float32
        host = [interop.taken(name, x)[0] for name, x in zip("qkv", (q, k, v), strict=True)]
        wanted = flashcore_cupy.attention(*host)
        np.testing.assert_array_equal(interop.taken("o", o)[0], wanted)
        truth = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in (q, k, v)))
        assert (o - truth).abs().max() < {"float16": 2e-3, "bfloat16": 2e-2, "float32": 1e-5}[dtype]
        out = torch.empty_like(o)
        assert flashcore_cupy.attention(q, k, v, out=out) is out
        assert torch.equal(out, o)


# --- block masks, dropout -------------------------------------------------------------------------


def test_a_block_mask_of_torch_itself() -> None:
    import torch
    from torch.nn.attention import flex_attention as flex

    def causal(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return q_idx >= kv_idx

    made = flex.create_block_mask(causal, None, None, 300, 300, device="cpu")
    q, k, v = (torch.randn(1, 2, 300, 32) for _ in range(3))
    got = flashcore_cupy.attention(q, k, v, block_mask=made, mask_mod=causal)
    expected = flashcore_cupy.attention(q, k, v, causal=True)
    torch.testing.assert_close(got, expected)


def test_gradients_and_transforms_of_a_block_mask() -> None:
    import torch

    made, dense = with_its_rule()
    q, k, v = (torch.from_numpy(x.astype("f4")).requires_grad_() for x in operands())
    o = flashcore_cupy.attention(q, k, v, block_mask=made)
    o.square().sum().backward()
    again = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    flashcore_cupy.attention(*again, mask=torch.from_numpy(dense)).square().sum().backward()
    for x, y in zip((q, k, v), again, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)
    given = [x.detach() for x in (q, k, v)]
    call = torch.vmap(lambda *x: flashcore_cupy.attention(*x, block_mask=made))
    mapped = call(*(x[None] for x in given))
    torch.testing.assert_close(mapped[0], o.detach())


def test_a_dropout_mask_is_of_the_kind_of_like() -> None:
    import torch

    mask = flashcore_cupy.dropout_mask
    found = mask((1, 1, 20, 20), 0.3, (5, 6), like=torch.zeros(3))
    assert isinstance(found, torch.Tensor) and found.dtype is torch.bool
    assert isinstance(mask((1, 1, 2, 2), 0.3, torch.tensor([1, 2])), torch.Tensor)
    assert isinstance(mask((1, 1, 2, 2), 0.3, np.array([1, 2])), np.ndarray)
