"""A function with the signature of JAX's attention, against JAX's own."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
from cases_gradients import random

jax = pytest.importorskip("jax")


class TestDotProductAttention:
    def test_signature(self) -> None:
        import jax

        from flashcore_cupy.jax import dot_product_attention as ours

        names = list(inspect.signature(ours).parameters)
        theirs = list(inspect.signature(jax.nn.dot_product_attention).parameters)
        assert names[: len(theirs)] == theirs or set(theirs) <= set(names)

    @pytest.mark.parametrize(
        "rules",
        [
            {},
            {"is_causal": True, "scale": 0.3},
            {"bias": (2, 1, 7, 9), "mask": (1, 4, 7, 9)},
            {"bias": (1, 4, 1, 9), "is_causal": True},
            {"key_value_seq_lengths": [9, 3], "query_seq_lengths": [7, 7]},
            {"local_window_size": 2, "is_causal": True},
            {"local_window_size": (1, 3)},
            {"local_window_size": (2, 0), "key_value_seq_lengths": [6, 7], "mask": (1, 1, 7, 9)},
        ],
        ids=str,
    )
    def test_jaxs_own_agrees(self, rules: dict[str, Any]) -> None:
        import jax

        from flashcore_cupy.jax import dot_product_attention as ours

        q, k, v = (random(2, n, h, 8, seed=h + n) for n, h in ((7, 4), (9, 2), (9, 2)))
        rules, inputs = dict(rules), {"query": q, "key": k, "value": v}
        if "bias" in rules:
            inputs["bias"] = random(*rules.pop("bias"), seed=4)
        if "mask" in rules:
            # Where a query sees no key, JAX has the mean of all values.
            rules["mask"] = (random(*rules["mask"], seed=5) > 0) | (np.arange(9) % 2 == 0)
        for name in ("query_seq_lengths", "key_value_seq_lengths"):
            if name in rules:
                rules[name] = np.array(rules[name], np.int32)

        def gradients(function: Any) -> Any:
            def loss(x: dict[str, Any]) -> Any:
                o = function(**x, **rules)
                return (o**2).sum(), o

            return jax.jit(jax.grad(loss, has_aux=True))(inputs)

        got, wanted = gradients(ours), gradients(jax.nn.dot_product_attention)
        np.testing.assert_allclose(got[1], wanted[1], atol=1e-5)
        for name, x in wanted[0].items():
            np.testing.assert_allclose(got[0][name], x, atol=2e-5, err_msg=name)

    def test_without_a_batch_and_with_the_log_sum_exp(self) -> None:
        import jax

        from flashcore_cupy.jax import dot_product_attention as ours

        q, k, v = (random(7, 4, 8, seed=n) for n in range(3))
        for call in (ours, jax.jit(ours, static_argnames="return_residual")):
            o, lse = call(q, k, v, return_residual=True)
            wanted = jax.nn.dot_product_attention(q, k, v)
            np.testing.assert_allclose(o, wanted, atol=1e-5)
            scores = np.einsum("ind,jnd->inj", q, k) / 8**0.5
            np.testing.assert_allclose(lse, np.log(np.exp(scores).sum(-1)), rtol=1e-5)
        assert isinstance(ours(q, k, v), jax.Array)
