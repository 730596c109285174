"""Gradients of torch's tensors: what autograd gets is what attention_backward gives."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cases_gradients import asked, extras, operands, random, run

from flashcore_cupy import attention
from flashcore_cupy.integrations import engine
from flashcore_cupy.problem import interop

if importlib.util.find_spec("torch") is None:
    pytest.skip("torch is not installed", allow_module_level=True)

B, H, HKV, SQ, SKV, D, DV = 2, 4, 2, 9, 13, 8, 12
EXTRAS = extras(B, H, SQ, SKV)
DTYPES = ["float16", "bfloat16", "float32"]


def numbers(dtype: str = "float32") -> dict[str, np.ndarray]:
    """q, k, v and the gradients of the output and of the log-sum-exp, on the host."""
    import ml_dtypes

    element = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    q, k, v = operands(H, HKV, SQ, SKV, D, DV, B, element)
    do = random(B, H, SQ, DV, dtype=element, seed=5)
    return {"q": q, "k": k, "v": v, "do": do, "dlse": random(B, H, SQ, seed=6)}


def tensor(x: np.ndarray, *, leaf: bool = True) -> Any:
    import torch

    made = interop.returned(x.copy(), "torch")
    assert isinstance(made, torch.Tensor)
    return made.requires_grad_() if leaf else made


def leaves(*names: str) -> list[Any]:
    return [tensor(numbers()[name]) for name in names or "qkv"]


def equal(got: Any, wanted: np.ndarray) -> None:
    assert tuple(got.shape) == wanted.shape
    np.testing.assert_array_equal(interop.taken("x", got.detach())[0], wanted)


def gradients(call: Callable[..., Any], given: dict[str, Any], do: Any, dlse: Any = None) -> Any:
    """By autograd, of all that is given; ``call`` returns o, or o and lse."""
    import torch

    ends = call(**given)
    starts = (
        [tensor(do, leaf=False)] if dlse is None else [tensor(x, leaf=False) for x in (do, dlse)]
    )
    found = torch.autograd.grad(ends, list(given.values()), starts)
    return dict(zip(given, found, strict=True))


class TestValues:
    @pytest.mark.parametrize("name", EXTRAS)
    def test_every_rule(self, name: str) -> None:
        rules, given = EXTRAS[name], numbers()
        do, dlse = given.pop("do"), given.pop("dlse")
        wanted = run(**given, do=do, dlse=dlse, **rules)
        of = asked(rules)
        rest = {key: x for key, x in rules.items() if key not in of}
        ours = {key: tensor((given | rules)[key]) for key in of}
        got = gradients(lambda **x: attention(**x, **rest, return_lse=True), ours, do, dlse)
        for key, gradient in got.items():
            equal(gradient, getattr(wanted, f"d{key}"))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("layout", ["bhsd", "bshd"])
    def test_dtypes_and_layouts(self, dtype: str, layout: str) -> None:
        given = numbers(dtype)
        dlse = given.pop("dlse")
        if layout == "bshd":
            given = {name: x.swapaxes(1, 2) for name, x in given.items()}
        wanted = run(**given, dlse=dlse, layout=layout, causal=True)
        do = given.pop("do")
        ours = {name: tensor(x) for name, x in given.items()}

        def call(**x: Any) -> Any:
            return attention(**x, layout=layout, causal=True, return_lse=True)

        for name, gradient in gradients(call, ours, do, dlse).items():
            assert gradient.dtype == ours[name].dtype and not gradient.requires_grad
            equal(gradient, getattr(wanted, f"d{name}"))

    @pytest.mark.parametrize("kind", ["lists", "tensors"])
    def test_packed(self, kind: str) -> None:
        import torch

        bounds = {"cu_seqlens_q": [0, 4, 4, 9], "cu_seqlens_k": [0, 3, 8, 13]}
        q, k, v = (random(n, 4, 8, seed=n) for n in (9, 13, 13))
        wanted = run(q, k, v, do=random(9, 4, 8, seed=5), **bounds)
        if kind == "tensors":
            bounds = {n: torch.tensor(x, dtype=torch.int32) for n, x in bounds.items()}
        ours = dict(zip("qkv", map(tensor, (q, k, v)), strict=True))
        got = gradients(lambda **x: attention(**x, **bounds), ours, random(9, 4, 8, seed=5))
        for name, gradient in got.items():
            equal(gradient, getattr(wanted, f"d{name}"))

    def test_numbers_per_head_of_any_dtype(self) -> None:
        import torch

        q, k, v = leaves()
        sink = torch.linspace(0, 1, H, dtype=torch.float64, requires_grad=True)
        attention(q, k, v, sink=sink, alibi_slopes=[0.5] * H).sum().backward()
        assert sink.grad.dtype == torch.float64 and sink.grad.abs().min() > 0

    def test_views_and_broadcasts(self) -> None:
        """As they come of a projection, and of a sum."""
        import torch

        qkv = torch.randn(2, 9, 3, 4, 8, requires_grad=True)
        plain = [x.detach().clone().requires_grad_() for x in qkv.unbind(2)]
        (whole,) = torch.autograd.grad(attention(*qkv.unbind(2), layout="bshd").sum(), qkv)
        parts = torch.autograd.grad(attention(*plain, layout="bshd").sum(), plain)
        assert torch.equal(whole, torch.stack(parts, 2))

    def test_kernels_by_name_are_emulated_both_ways(self) -> None:
        from flashcore_cupy.cpu.emulator.build import why_not

        if why_not():
            pytest.skip(f"needs a C++ compiler: {why_not()}")
        do = random(1, 1, 5, 8, seed=5)
        ours = {n: tensor(random(1, 1, 5, 8, seed=s)) for s, n in enumerate("qkv")}
        wanted = gradients(attention, ours, do)
        asked_for: dict[str, Any] = {"kernel": "mma_sm80", "score_mod": "score * 1.0f"}
        got = gradients(lambda **x: attention(**x, **asked_for), ours, do)
        for name in "qkv":
            np.testing.assert_allclose(got[name], wanted[name], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("rules", ["causal", "softcap, slopes, causal", "bias, sink, mask"])
    def test_finite_differences(self, rules: str) -> None:
        """gradcheck's inputs are float64; attention takes float32, so steps are wide."""
        import torch

        given = {n: x for n, x in numbers().items() if n in "qkv"} | EXTRAS[rules]
        names = asked(EXTRAS[rules])
        rest = {name: x for name, x in given.items() if name not in names}

        def call(*inputs: Any) -> Any:
            found = attention(
                **dict(zip(names, (x.float() for x in inputs), strict=True)), **rest,
                return_lse=True,
            )  # fmt: skip
            return tuple(x.double() for x in found)

        inputs = [torch.tensor(given[name].astype("f8"), requires_grad=True) for name in names]
        assert torch.autograd.gradcheck(call, inputs, eps=4e-3, atol=5e-3, fast_mode=True)

    def test_mod_args(self) -> None:
        """Of some elements by heads, of one by all; written by torch's own operations."""
        import torch

        given = {n: tensor(x) for n, x in numbers().items() if n in "qkv"}
        given |= {"slope": tensor(random(H, seed=7)), "gain": tensor(1 + random(2, seed=8))}
        do = numbers()["do"]
        places = torch.arange(SKV) - torch.arange(SQ)[:, None]

        def formula(q: Any, k: Any, v: Any, slope: Any, gain: Any) -> Any:
            keys, values = (x.repeat_interleave(H // HKV, 1) for x in (k, v))
            scores = q @ keys.mT * D**-0.5
            scores = scores * gain[1] + slope[:, None, None] * places
            return scores.softmax(-1) @ values

        def ours(q: Any, k: Any, v: Any, **mod_args: Any) -> Any:
            def score_mod(s: Any, b: Any, h: Any, i: Any, j: Any, slope: Any, gain: Any) -> Any:
                return s * gain[1] + slope[h] * (j - i)

            return attention(q, k, v, score_mod=score_mod, mod_args=mod_args)

        wanted, got = (gradients(call, given, do) for call in (formula, ours))
        for name, x in wanted.items():
            torch.testing.assert_close(got[name], x, rtol=1e-4, atol=1e-4, msg=name)
        assert got["gain"][0] == 0

    def test_mod_args_in_kernels(self) -> None:
        from flashcore_cupy.cpu.emulator.build import why_not

        if why_not():
            pytest.skip(f"needs a C++ compiler: {why_not()}")
        do = random(1, 1, 5, 8, seed=5)
        given = {n: tensor(random(1, 1, 5, 8, seed=s)) for s, n in enumerate("qkv")}
        given["gain"] = tensor(random(2, seed=8))
        mods: list[dict[str, Any]] = [
            {"kernel": "mma_sm80", "score_mod": "score * gain[h + 1] + gain[0] * kv_idx"},
            {"score_mod": lambda s, b, h, i, j, gain: s * gain[h + 1] + gain[0] * j},
        ]
        got, wanted = (
            gradients(lambda gain, mod=mod, **x: attention(**x, **mod, mod_args={"gain": gain}),
                      given, do)
            for mod in mods
        )  # fmt: skip
        for name in given:
            np.testing.assert_allclose(got[name], wanted[name], rtol=1e-4, atol=1e-5)

    def test_torchs_own_attention_agrees(self) -> None:
        import torch

        q, k, v = (torch.randn(2, 3, 17, 16, requires_grad=True) for _ in range(3))
        function = torch.nn.functional.scaled_dot_product_attention
        exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
        wanted = torch.autograd.grad(function(*exact, is_causal=True).square().sum(), exact)
        got = torch.autograd.grad(attention(q, k, v, causal=True).square().sum(), (q, k, v))
        assert all((x - y).abs().max() < 1e-5 for x, y in zip(got, wanted, strict=True))


class TestAutograd:
    """What is computed, kept and refused."""

    @pytest.fixture
    def asked_for(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        """What backward passes were asked for."""
        backward, calls = engine._functions["attention_backward"], []

        def spy(*args: Any, **arguments: Any) -> Any:
            calls.append((arguments["wrt"], "dlse" in arguments, arguments.get("deterministic")))
            return backward(*args, **arguments)

        monkeypatch.setitem(engine._functions, "attention_backward", spy)
        return calls

    @pytest.mark.parametrize("wrt", ["q", "k v", "bias", "v sink", "q k v bias sink alibi_slopes"])
    def test_only_what_is_wanted_is_computed(self, asked_for: list[Any], wrt: str) -> None:
        given = {n: x for n, x in numbers().items() if n in "qkv"}
        given |= {"bias": random(H, SQ, SKV), "sink": random(H), "alibi_slopes": random(H)}
        ours = {name: tensor(x, leaf=name in wrt.split()) for name, x in given.items()}
        attention(**ours).sum().backward()
        ((names, has_dlse, deterministic),) = asked_for
        assert sorted(names) == sorted(wrt.split()) and not has_dlse and deterministic is None
        assert {n for n, x in ours.items() if x.grad is not None} == set(wrt.split())

    def test_either_result_or_both(self, asked_for: list[Any]) -> None:
        import torch

        q, k, v = leaves()
        o, lse = attention(q, k, v, return_lse=True)
        of_o, of_lse, both = (
            torch.autograd.grad(x, (q, k, v), retain_graph=True, allow_unused=True)
            for x in (o.sum(), lse.sum(), o.sum() + lse.sum())
        )
        assert [has_dlse for _, has_dlse, _ in asked_for] == [False, True, True]
        assert (of_lse[2] == 0).all()
        for x, y, z in zip(of_o, of_lse, both, strict=True):
            torch.testing.assert_close(x + y, z)

    def test_without_gradients_there_is_no_trace_of_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import torch

        from flashcore_cupy.integrations import torch_attention

        monkeypatch.setattr(torch_attention, "eager_attend", None)
        q, k, v = leaves()
        assert attention(*(x.detach() for x in (q, k, v))).grad_fn is None
        for without in (torch.no_grad, torch.inference_mode):
            with without():
                assert not attention(q, k, v).requires_grad

    def test_second_derivatives_raise(self) -> None:
        import torch

        q, k, v = leaves()
        (dq,) = torch.autograd.grad(attention(q, k, v).sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match="attention\\(\\) has no second derivative"):
            (dq.square().sum() + q.sum()).backward()

        def loss(x: Any) -> Any:
            return attention(x, k, v).sum()

        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.func.grad(lambda x: torch.func.grad(loss)(x).sum())(q)

    def test_forward_mode_raises(self) -> None:
        import torch

        q, k, v = leaves()
        with pytest.raises(RuntimeError, match="jvp"):
            torch.func.jvp(lambda x: attention(x, k, v), (q,), (q,))

    def test_inputs_that_change_before_backward(self) -> None:
        import torch

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

    @pytest.mark.parametrize("kind", ["int64", "uint64", "numpy", "compiled", "compiled, integers"])
    def test_a_draw_from_an_array(self, kind: str) -> None:
        import torch

        draw = (2**63 + 5, 7) if kind == "uint64" else (5, 7)
        rng: Any = np.array(draw, np.uint64)
        if kind in ("int64", "compiled"):
            rng = torch.tensor(draw)
        elif kind == "uint64":
            rng = torch.tensor(draw, dtype=torch.uint64)
        elif kind == "compiled, integers":
            rng = draw

        def call(q: Any, k: Any, v: Any) -> Any:
            return attention(q, k, v, causal=True, dropout_p=0.3, rng=rng)

        if "compiled" in kind:
            call = torch.compile(call, backend="aot_eager", fullgraph=True)
        given = numbers()
        del given["dlse"]
        wanted = run(**given, causal=True, dropout_p=0.3, rng=draw)
        do = given.pop("do")
        got = gradients(call, {name: tensor(x) for name, x in given.items()}, do)
        for name, gradient in got.items():
            equal(gradient, getattr(wanted, f"d{name}"))
        torch.compiler.reset()

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_checkpoint(self, use_reentrant: bool) -> None:
        import torch
        from torch.utils.checkpoint import checkpoint

        q, k, v = leaves()

        def block(q: Any, k: Any, v: Any) -> Any:
            return attention(q * 2, k, v, causal=True).square()

        wanted = torch.autograd.grad(block(q, k, v).sum(), (q, k, v))
        checkpoint(block, q, k, v, use_reentrant=use_reentrant).sum().backward()
        assert all(torch.equal(x.grad, y) for x, y in zip((q, k, v), wanted, strict=True))

    def test_checkpoint_may_keep_the_operator(self) -> None:
        """A selective one sees it by name, and does not compute it again."""
        import functools

        import torch
        from torch.utils import checkpoint as c

        seen = []

        def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
            ours = op is torch.ops.flashcore.attention.default
            seen.append((ours, ctx.is_recompute))
            return c.CheckpointPolicy.MUST_SAVE if ours else c.CheckpointPolicy.PREFER_RECOMPUTE

        q, k, v = leaves()
        contexts = functools.partial(c.create_selective_checkpoint_contexts, policy)
        o = c.checkpoint(
            lambda *x: attention(*x).sin(), q, k, v, use_reentrant=False, context_fn=contexts
        )
        o.sum().backward()
        assert (True, False) in seen
        wanted = torch.autograd.grad(attention(q, k, v).sin().sum(), (q, k, v))
        assert all(torch.equal(x.grad, y) for x, y in zip((q, k, v), wanted, strict=True))

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_autocast(self, dtype: str) -> None:
        """As in torch's own attention q, k and v get its dtype, with a gradient or without."""
        import torch

        q, k, v = leaves()
        low = getattr(torch, dtype)
        cast = [x.detach().to(low).requires_grad_() for x in (q, k, v)]
        with torch.autocast("cpu", low):
            o = attention(q, k, v.to(low))
            with torch.no_grad():
                again = attention(q, k, v)
                assert torch.equal(attention(q.to(low), k, v.to(low)), again)
                out = torch.empty_like(again)
                assert attention(q, k, v, out=out) is out and torch.equal(out, again)
        o.sum().backward()
        wanted = attention(*cast)
        wanted.sum().backward()
        assert o.dtype == low and torch.equal(o, wanted) and torch.equal(again, wanted)
        for x, y in zip((q, k, v), cast, strict=True):
            assert x.grad.dtype == torch.float32 and torch.equal(x.grad, y.grad.float())

    def test_a_module_learns(self) -> None:
        import torch

        class Block(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.project = torch.nn.Linear(16, 48)
                self.bias = torch.nn.Parameter(torch.zeros(2, 6, 6))
                self.sink = torch.nn.Parameter(torch.zeros(2))
                self.slopes = torch.nn.Parameter(torch.full((2,), 0.1))

            def forward(self, x: Any) -> Any:
                q, k, v = self.project(x).view(3, 6, 3, 2, 8).unbind(2)
                rules = {"bias": self.bias, "sink": self.sink, "alibi_slopes": self.slopes}
                return attention(q, k, v, layout="bshd", causal=True, **rules).flatten(2)

        torch.manual_seed(0)
        block, x, y = Block(), torch.randn(3, 6, 16), torch.randn(3, 6, 16)
        before = {name: p.clone() for name, p in block.state_dict().items()}
        optimizer = torch.optim.Adam(block.parameters(), 0.05)
        losses = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = (block(x) - y).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0]
        assert all(not torch.equal(p, before[n]) for n, p in block.state_dict().items())


class TestFunc:
    """torch.func: the same as one after the other."""

    def test_grad(self) -> None:
        import torch

        q, k, v = leaves()
        wanted = torch.autograd.grad(attention(q, k, v).square().sum(), (q, k, v))
        plain = [x.detach() for x in (q, k, v)]
        got = torch.func.grad(lambda *x: attention(*x).square().sum(), (0, 1, 2))(*plain)
        assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))

    @pytest.mark.parametrize("of_batch", [1, 2])
    @pytest.mark.parametrize(
        ("rules", "dims"),
        [
            ({"causal": True}, {}),
            ({"layout": "bshd"}, {}),
            ({"mask": (SQ, SKV)}, {}),
            ({"bias": (3, 1, H, SQ, SKV)}, {"bias": 0}),
            ({"bias": (H, SQ, SKV, 3)}, {"bias": 3}),
            ({"bias": (3, 2, 1, 1, SKV)}, {"bias": 0}),
            ({"alibi_slopes": (H,), "sink": (3, H)}, {"sink": 0}),
            ({"dropout_p": 0.3, "rng": (5, 2)}, {}),
            ({"score_mod": "by batch"}, {}),
            ({"score_mod": "table", "table": (3, 4)}, {"table": 0}),
        ],
        ids=str,
    )
    def test_vmap(self, rules: dict[str, Any], dims: dict[str, int], of_batch: int) -> None:
        import torch

        rules, arrays = dict(rules), {}
        if rules.get("bias", ())[1:2] == (2,) and of_batch == 1:
            rules["bias"] = (3, 1, 1, 1, SKV)
        mods = {
            "by batch": lambda score, b, h, i, j: score + b + 1,
            "table": lambda score, b, h, i, j, table: score * table[h],
        }
        for name in ("mask", "bias", "alibi_slopes", "sink", "table"):
            if name in rules:
                x = torch.as_tensor(random(*rules.pop(name), seed=len(name)))
                arrays[name] = x > 0 if name == "mask" else x
        if "score_mod" in rules:
            rules["score_mod"] = mods[rules["score_mod"]]
        shape = (of_batch, SQ, H, D) if rules.get("layout") == "bshd" else (of_batch, H, SQ, D)
        keys = (of_batch, SKV, H, D) if rules.get("layout") == "bshd" else (of_batch, H, SKV, D)
        arrays |= {
            "q": torch.as_tensor(random(3, *shape, seed=1)),
            "k": torch.as_tensor(random(*keys, 3, seed=2)),
            "v": torch.as_tensor(random(*keys, seed=3)),
        }
        where = {name: dims.get(name) for name in arrays} | {"q": 0, "k": 4}

        def loss(given: dict[str, Any]) -> Any:
            given = dict(given)
            mod_args = {"table": given.pop("table")} if "table" in given else None
            o, lse = attention(**given, **rules, mod_args=mod_args, return_lse=True)
            return o.square().sum() + lse.sum(), o

        def results(given: dict[str, Any]) -> Any:
            of = {n: x for n, x in given.items() if n != "mask"}
            rest = {n: x for n, x in given.items() if n not in of}
            return torch.func.grad(lambda x: loss(x | rest), has_aux=True)(of)

        got = torch.func.vmap(results, in_dims=(where,))(arrays)
        for n in range(3):
            one = {
                name: x if where[name] is None else x.select(where[name], n)
                for name, x in arrays.items()
            }
            gradients, o = results(one)
            torch.testing.assert_close(got[1][n], o)
            for name, x in gradients.items():
                torch.testing.assert_close(got[0][name][n], x, msg=name)

    def test_vmap_of_packed_batches_and_of_vmap(self) -> None:
        import torch

        q, k, v = (torch.as_tensor(random(2, 3, 9, 4, 8, seed=n)) for n in range(3))
        bounds = torch.tensor([0, 4, 9], dtype=torch.int32)

        def call(q: Any, k: Any, v: Any) -> Any:
            return attention(q, k, v, cu_seqlens_q=bounds, cu_seqlens_k=bounds, return_lse=True)

        o, lse = torch.vmap(torch.vmap(call))(q, k, v)
        assert o.shape == (2, 3, 9, 4, 8) and lse.shape == (2, 3, 4, 9)
        for i, j in np.ndindex(2, 3):
            one = call(q[i, j], k[i, j], v[i, j])
            assert torch.equal(o[i, j], one[0]) and torch.equal(lse[i, j], one[1])

    def test_jacobians(self) -> None:
        """Which map the backward pass alone."""
        import torch

        q, k, v = (torch.as_tensor(random(1, 2, 3, 8, seed=n)) for n in range(3))
        got = torch.func.jacrev(attention)(q, k, v).flatten(0, 3)
        x = q.clone().requires_grad_()
        o = attention(x, k, v).flatten()
        for n in range(0, len(o), 5):
            (wanted,) = torch.autograd.grad(o[n], x, retain_graph=True)
            torch.testing.assert_close(got[n], wanted)


class TestErrors:
    def refused(self, error: type[Exception], message: str, *more: Any, **arguments: Any) -> None:
        q, k, v = leaves()
        with pytest.raises(error, match=message):
            attention(*(more or (q, k, v)), **arguments)

    def test_what_has_no_gradient(self) -> None:
        import torch

        number, table = torch.ones((), requires_grad=True), torch.ones(3, requires_grad=True)
        self.refused(TypeError, "^softmax_scale: requires a gradient", softmax_scale=number)
        self.refused(TypeError, "^softcap: requires a gradient", softcap=number)
        mods: dict[str, Any] = {"score_mod": "score + x[kv_idx]", "mod_args": {"x": table}}
        message = r"^mod_args\['x'\]: score_mod reads x\[kv_idx\], whose gradient is not known"
        self.refused(ValueError, message, kernel="mma_sm80", **mods)
        mods = {"mask_mod": lambda b, h, i, j, x: i > j, "mod_args": {"x": table}}
        self.refused(ValueError, r"^mod_args\['x'\]: has no gradient without a score_mod", **mods)
        mods = {"score_mod": lambda s, b, h, i, j, x: s + x[j % 3], "mod_args": {"x": table}}
        end = attention(*leaves(), **mods).sum()  # a function tells when it is called
        with pytest.raises(ValueError, match=r"^mod_args\['x'\]: score_mod reads it at an array"):
            end.backward()

    def test_what_a_gradient_leaves_no_room_for(self) -> None:
        import torch

        out = torch.empty(B, H, SQ, DV)
        self.refused(ValueError, "^out: it is written in place", out=out)
        self.refused(ValueError, "^gate: ", gate="qk")
        self.refused(ValueError, "^stream: ", stream=object())

    def test_arguments_are_checked_as_ever(self) -> None:
        import torch

        q, k, v = leaves()
        self.refused(ValueError, "^k: got 5 dimensions", q, k[None], v)
        self.refused(ValueError, "^q: got 3 dimensions", q[0], k, v)
        self.refused(TypeError, "float64", q.double(), k, v)
        self.refused(TypeError, "^q: got ndarray beside", q.detach().numpy(), k, v)
        self.refused(TypeError, "no argument 'scale': use softmax_scale", scale=1.0)
        self.refused(ValueError, "^causal: ", causal="bottom")
        self.refused(ValueError, "^window: ", window=(1, 2, 3))
        self.refused(ValueError, "^bias: got shape", bias=torch.zeros(7, 7))
        self.refused(TypeError, "^mod_args: got list", mod_args=[1])
        self.refused(ValueError, "^causal: got <object", causal=object())

    def test_arrays_of_several_kinds(self) -> None:
        """Those beside a tensor that requires a gradient become tensors."""
        import torch

        q, k, v = leaves()
        mask = np.arange(SKV) % 3 > 0
        got = torch.autograd.grad(attention(q, k.detach().numpy(), v, mask=mask).sum(), q)
        wanted = torch.autograd.grad(attention(q, k, v, mask=torch.as_tensor(mask)).sum(), q)
        assert torch.equal(got[0], wanted[0])


def test_nothing_is_imported_before_it_is_needed() -> None:
    lines = (
        "import sys, numpy, flashcore_cupy",
        "x = numpy.ones((1, 1, 4, 8), 'f4')",
        "flashcore_cupy.attention(x, x, x)",
        "assert 'torch' not in sys.modules and 'jax' not in sys.modules",
        "import torch",
        "y = torch.as_tensor(x)",
        "flashcore_cupy.attention(y, y, y)",
        "assert 'flashcore_cupy.integrations.torch_attention' not in sys.modules",
        "assert 'torch._dynamo' not in sys.modules",
        "assert not hasattr(torch.ops.flashcore, 'attention')",
        "z = y.clone().requires_grad_()",
        "flashcore_cupy.attention(z, y, y).sum().backward()",
        "assert z.grad is not None and hasattr(torch.ops.flashcore, 'attention')",
        "assert 'jax' not in sys.modules",
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", "\n".join(lines)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_no_warning_of_torchs() -> None:
    q, k, v = leaves()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(q, k, v, sink=[0.5] * H).sum().backward()
