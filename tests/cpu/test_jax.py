"""JAX's arrays on the CPU: their memory, and what is traced."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
from cases_tracing import (
    FLOATS,
    OPERANDS,
    arguments,
    attention,
    everywhere,
    explain,
    numbers,
    refusal,
)
from drawn_blocks import operands, with_its_rule
from helpers import three_arrays

import flashcore_cupy
from flashcore_cupy.problem import interop
from flashcore_cupy.problem.attention_problem import DTYPES

if importlib.util.find_spec("jax") is None:
    pytest.skip("jax is not installed", allow_module_level=True)


def jax_array(x: np.ndarray) -> Any:
    import jax

    return jax.numpy.asarray(x)


TRANSFORMS: dict[str, Callable[[Any, Callable[[Any], Any], Any], Any]] = {
    "jit": lambda jax, f, x: jax.jit(f)(x),
    "grad": lambda jax, f, x: jax.grad(f)(x),
    "value_and_grad": lambda jax, f, x: jax.jit(jax.value_and_grad(f))(x),
    "vmap": lambda jax, f, x: jax.vmap(f)(x[None]),
    "eval_shape": lambda jax, f, x: jax.eval_shape(f, x),
    "linearize": lambda jax, f, x: jax.linearize(f, x),
    "jvp": lambda jax, f, x: jax.jvp(f, (x,), (x,)),
    "make_jaxpr": lambda jax, f, x: jax.make_jaxpr(f)(x),
    "checkpoint": lambda jax, f, x: jax.checkpoint(f)(x),
    "scan": lambda jax, f, x: jax.lax.scan(lambda c, y: (c + f(y), None), 0.0, x[None]),
}


class TestTraces:
    """What is traced, only attention() takes, and not everywhere."""

    @pytest.mark.parametrize("name", [name for name in FLOATS if name != "out"])
    @pytest.mark.parametrize("transform", TRANSFORMS)
    def test_explain_takes_no_tracers(self, transform: str, name: str) -> None:
        import jax

        others = {key: x for key, x in arguments(jax_array).items() if key != name}
        calls = [explain] if name not in ("softmax_scale", "softcap") else [attention, explain]
        for call in calls:

            def traced(x: Any, call: Any = call) -> Any:
                return call(**arguments(np.asarray, name, x) | others).sum()

            message = refusal(
                TypeError,
                lambda traced=traced: TRANSFORMS[transform](
                    jax, traced, jax_array(numbers(*FLOATS[name]))
                ),
            )
            assert message.startswith(f"{name}: got a tracer of JAX (")
            assert "which has no value yet; only attention() takes tracers" in message
            assert "CuPy" not in message and "cupy" not in message

    @pytest.mark.parametrize("name", ["causal", "window", "return_lse"])
    def test_tracers_as_plain_arguments(self, name: str) -> None:
        import jax

        run = jax.jit(lambda x: attention(**arguments(np.asarray, name, x)))
        with pytest.raises((TypeError, ValueError), match=f"^{name}: got "):
            run(True)

    def test_arrays_that_are_gone(self) -> None:
        x = jax_array(numbers(*OPERANDS["k"]))
        x.delete()
        assert "deleted" in everywhere("k", ValueError, arguments(jax_array, "k", x))

    def test_hints_are_in_words_of_jax(self) -> None:
        import jax

        for dtype, hint in (("float64", "float32)"), ("int32", "float16)")):
            with getattr(jax, "enable_x64", lambda _: nullcontext())(True):
                x = jax.numpy.zeros(OPERANDS["k"], dtype)
            message = everywhere("k", TypeError, arguments(jax_array, "k", x))
            assert message.endswith(f"k.astype(jax.numpy.{hint}")


class TestMemory:
    """Arrays are taken and returned without a copy."""

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_taken_and_returned(self, dtype: str) -> None:
        import jax

        cpu = jax.local_devices(backend="cpu")[0]
        x = jax.device_put(three_arrays(dtype)[0], cpu)
        got, kind = interop.taken("q", x)
        assert kind == "jax" and got.dtype.name == dtype
        assert got.ctypes.data == x.unsafe_buffer_pointer()
        back = interop.returned(got, kind)
        assert isinstance(back, jax.Array) and back.dtype == x.dtype and back.devices() == {cpu}
        assert (back == x).all()
        o = flashcore_cupy.attention(x, x, x)
        assert isinstance(o, jax.Array) and o.dtype == x.dtype
        np.testing.assert_array_equal(np.asarray(o), flashcore_cupy.attention(got, got, got))

    def test_immutable_as_out(self) -> None:
        import jax

        x = jax.device_put(three_arrays()[0], jax.local_devices(backend="cpu")[0])
        with pytest.raises(TypeError, match="out: got a JAX array, which is immutable"):
            interop.taken_out(x)


def test_gradients_and_programs_of_a_block_mask() -> None:
    import jax

    made, dense = with_its_rule()
    given = [jax.numpy.asarray(x.astype("f4")) for x in operands()]

    def loss(q: Any, k: Any, v: Any, **rules: Any) -> Any:
        return (flashcore_cupy.attention(q, k, v, **rules) ** 2).sum()

    every = (0, 1, 2)
    got = jax.jit(jax.grad(lambda *x: loss(*x, block_mask=made), every))(*given)
    want = jax.grad(lambda *x: loss(*x, mask=dense), every)(*given)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)
