"""Functions with the signatures of torch and flash-attn, against torch's own."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
from cases_gradients import random

torch = pytest.importorskip("torch")


def tensors(*shapes: tuple[int, ...], dtype: str = "float32") -> list[Any]:
    made = (torch.as_tensor(random(*shape, seed=n)) for n, shape in enumerate(shapes))
    return [x.to(getattr(torch, dtype)).requires_grad_() for x in made]


def agree(ours: Any, theirs: Any, inputs: list[Any], tolerance: float = 1e-5) -> None:
    """The output and the gradients of two calls."""
    start = torch.as_tensor(random(*ours.shape, seed=9)).to(ours.dtype)
    got = [ours, *torch.autograd.grad(ours, inputs, start)]
    wanted = [theirs, *torch.autograd.grad(theirs, inputs, start)]
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


class TestScaledDotProductAttention:
    @pytest.mark.parametrize(
        ("lead", "mask"),
        [
            ((2, 4), None),
            ((2, 4), (5, 7)),
            ((2, 4), (2, 1, 5, 7)),
            ((4,), (4, 5, 7)),
            ((), (5, 7)),
            ((2, 3, 4), (3, 4, 5, 7)),
            ((2, 3, 4), (2, 1, 1, 5, 7)),
            ((2, 3, 4), (7,)),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("kind", ["bool", "float"])
    def test_torchs_own_agrees(self, lead: Any, mask: Any, kind: str) -> None:
        from flashcore_cupy.torch import scaled_dot_product_attention as ours

        theirs = torch.nn.functional.scaled_dot_product_attention
        inputs = tensors((*lead, 5, 8), (*lead, 7, 8), (*lead, 7, 6))
        more: dict[str, Any] = {"scale": 0.3, "is_causal": mask is None}
        if mask is not None:
            (more["attn_mask"],) = tensors(mask)
            if kind == "bool":
                more["attn_mask"] = (more["attn_mask"] > -1) | (torch.arange(7) == 0)
            else:
                inputs.append(more["attn_mask"])
        agree(ours(*inputs[:3], **more), theirs(*inputs[:3], **more), inputs)

    def test_grouped_heads(self) -> None:
        from flashcore_cupy.torch import scaled_dot_product_attention as ours

        theirs = torch.nn.functional.scaled_dot_product_attention
        inputs = tensors((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8))
        agree(ours(*inputs, enable_gqa=True), theirs(*inputs, enable_gqa=True), inputs)
        with pytest.raises(ValueError, match=r"^key: got 2 heads, and query has 4"):
            ours(*inputs)

    def test_in_a_transformer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from flashcore_cupy.torch import scaled_dot_product_attention

        torch.manual_seed(0)
        layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        x, parameters = torch.randn(3, 6, 16), list(layer.parameters())
        results = []
        for patched in (False, True):
            if patched:
                name = "scaled_dot_product_attention"
                monkeypatch.setattr(torch.nn.functional, name, scaled_dot_product_attention)
            y = layer(x)
            results.append([y, *torch.autograd.grad(y.square().sum(), parameters)])
        for got, wanted in zip(*results, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)

    def test_signature(self) -> None:
        from flashcore_cupy import torch as ours

        for function, names in (
            (
                ours.scaled_dot_product_attention,
                "query key value attn_mask dropout_p is_causal scale enable_gqa",
            ),
            (
                ours.flash_attn_func,
                "q k v dropout_p softmax_scale causal window_size softcap alibi_slopes "
                "deterministic return_attn_probs",
            ),
            (
                ours.flash_attn_varlen_func,
                "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p "
                "softmax_scale causal window_size softcap alibi_slopes deterministic "
                "return_attn_probs block_table",
            ),
        ):
            assert list(inspect.signature(function).parameters) == names.split()


class TestDropout:
    """The three functions of tensors (B, S, H, D)."""

    BOUNDS = (0, 6, 16)

    def each(self) -> dict[str, Any]:
        from flashcore_cupy import torch as ours

        bounds = torch.tensor(self.BOUNDS, dtype=torch.int32)

        def sdpa(q: Any, k: Any, v: Any, p: float) -> Any:
            turned = (x.transpose(1, 2) for x in (q, k, v))
            return ours.scaled_dot_product_attention(*turned, dropout_p=p).transpose(1, 2)

        def packed(q: Any, k: Any, v: Any, p: float) -> Any:
            o = ours.flash_attn_varlen_func(q[0], k[0], v[0], bounds, bounds, 10, 10, p)
            return o[None]

        def any_order(q: Any, k: Any, v: Any, p: float) -> Any:
            return ours.flash_attn_func(q, k, v, p)

        def ordered(q: Any, k: Any, v: Any, p: float) -> Any:
            return ours.flash_attn_func(q, k, v, p, deterministic=True)

        return {"sdpa": sdpa, "packed": packed, "any order": any_order, "ordered": ordered}

    def expected(self, name: str, inputs: list[Any], p: float) -> Any:
        """The formula, with the mask of what torch's generator gives now."""
        from flashcore_cupy import dropout_mask

        rng = torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64)
        bounds = self.BOUNDS if name == "packed" else (0, 16)
        parts = []
        for n, (first, end) in enumerate(itertools.pairwise(bounds)):
            q, k, v = (x[:, first:end].transpose(1, 2) for x in inputs)
            softmax = torch.softmax(q @ k.mT / 8**0.5, -1)
            kept = dropout_mask((n + softmax.shape[0], 4, end - first, end - first), p, rng)[n:]
            rounded = round(p * 2**16) / 2**16
            parts.append(softmax * kept / (1 - rounded) @ v)
        return torch.cat(parts, 2).transpose(1, 2)

    @pytest.mark.parametrize("name", ["sdpa", "packed", "any order", "ordered"])
    @pytest.mark.parametrize("p", [0.3, 0.8])
    def test_a_mask_for_both_directions(self, name: str, p: float) -> None:
        batch = 1 if name == "packed" else 2
        inputs = tensors(*[(batch, 16, 4, 8)] * 3)
        torch.manual_seed(5)
        o = self.each()[name](*inputs, p)
        torch.manual_seed(5)
        agree(o, self.expected(name, inputs, p), inputs)
        assert not torch.equal(self.each()[name](*inputs, p), o), "a draw of its own"

    @pytest.mark.parametrize("name", ["sdpa", "packed", "any order"])
    def test_nothing_is_drawn_for_nothing(self, name: str) -> None:
        inputs = tensors(*[(1, 16, 4, 8)] * 3)
        state = torch.get_rng_state()
        function = self.each()[name]
        plain = function(*inputs, 0.0)
        assert torch.equal(plain, function(*inputs, 0)) and plain.any()
        zeros = function(*inputs, 1.0)
        assert not zeros.any() and zeros.shape == plain.shape
        assert not any(x.any() for x in torch.autograd.grad(zeros.sum(), inputs))
        assert torch.equal(torch.get_rng_state(), state)
        for p in (1.5, -0.1, float("nan")):
            with pytest.raises(ValueError, match=r"^dropout_p: got "):
                function(*inputs, p)

    @pytest.mark.parametrize("name", ["sdpa", "packed", "any order"])
    def test_compiled_and_in_a_checkpoint(self, name: str) -> None:
        """What is computed again draws the same."""
        from torch.utils.checkpoint import checkpoint

        function, inputs = self.each()[name], tensors(*[(1, 16, 4, 8)] * 3)
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        for call in (compiled, lambda *x: checkpoint(function, *x, use_reentrant=False)):
            torch.manual_seed(5)
            o = call(*inputs, 0.3)
            torch.manual_seed(5)
            agree(o, function(*inputs, 0.3), inputs)
        torch.compiler.reset()


class TestFlashAttn:
    @pytest.mark.parametrize("deterministic", [False, True])
    @pytest.mark.parametrize("packed", [False, True])
    def test_every_argument(
        self, packed: bool, deterministic: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from flashcore_cupy import attention
        from flashcore_cupy import torch as ours
        from flashcore_cupy.integrations import engine

        asked: list[Any] = []
        backward = engine._functions["attention_backward"]
        monkeypatch.setitem(
            engine._functions,
            "attention_backward",
            lambda **x: asked.append(x.get("deterministic", True)) or backward(**x),
        )
        lead = () if packed else (2,)
        inputs = tensors((*lead, 9, 4, 8), (*lead, 9, 2, 8), (*lead, 9, 2, 8), (4,))
        *qkv, slopes = inputs
        bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
        shared: dict[str, Any] = dict(
            softmax_scale=0.3, causal=True, softcap=2.0, alibi_slopes=slopes
        )
        theirs: dict[str, Any] = {"deterministic": deterministic, "window_size": (3, 0)}
        if packed:
            function, where = ours.flash_attn_varlen_func, (bounds, bounds, 5, 5)
            own: dict[str, Any] = dict(cu_seqlens_q=bounds, cu_seqlens_k=bounds)
        else:
            function, where, own = ours.flash_attn_func, (), {"layout": "bshd"}
        o = function(*qkv, *where, **shared, **theirs)
        wanted, wanted_lse = attention(*qkv, **shared, **own, window=(3, 0), return_lse=True)
        agree(o, wanted, inputs)
        assert asked == [deterministic, True]
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                o, lse, probabilities = function(
                    *qkv, *where, **shared, **theirs, return_attn_probs=True
                )
            assert torch.equal(o, wanted) and torch.equal(lse, wanted_lse)
            assert probabilities is None and o.requires_grad == grad

    def test_compiled(self) -> None:
        from flashcore_cupy.torch import flash_attn_func

        inputs = tensors((2, 9, 4, 8), (2, 9, 4, 8), (2, 9, 4, 8))
        compiled = torch.compile(flash_attn_func, backend="aot_eager", fullgraph=True)
        agree(compiled(*inputs, causal=True), flash_attn_func(*inputs, causal=True), inputs)
        torch.compiler.reset()

    def test_there_is_no_paged_cache(self) -> None:
        from flashcore_cupy.torch import flash_attn_varlen_func

        (q,) = tensors((9, 4, 8))
        with pytest.raises(ValueError, match=r"^block_table: "):
            flash_attn_varlen_func(q, q, q, [0, 9], [0, 9], 9, 9, block_table=q)
