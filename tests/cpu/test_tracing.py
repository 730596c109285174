"""Arrays that are traced, differentiated or not just memory: refused by name; torch.compile.

The stand-ins have what the checks look at, and nothing else; torch and JAX where installed.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import flashcore_cupy
from flashcore_cupy.attention import plan
from flashcore_cupy.problem import interop, tracing

attention, explain = flashcore_cupy.attention, flashcore_cupy.explain
B, H, SQ, SKV, D = 1, 2, 5, 7, 8
OPERANDS = {"q": (B, H, SQ, D), "k": (B, H, SKV, D), "v": (B, H, SKV, D)}
#: Every argument that may be an array of floats, and a shape that it may have.
FLOATS = OPERANDS | {
    "bias": (SQ, SKV),
    "alibi_slopes": (H,),
    "sink": (H,),
    "softmax_scale": (),
    "softcap": (),
    "mod_args['x']": (3,),
    "out": (B, H, SQ, D),
}


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.5, 1.5, shape).astype(np.float32)


def arguments(convert: Callable[[np.ndarray], Any], name: str = "", odd: Any = None) -> Any:
    """q, k, v as ``convert`` makes them, and one argument of another kind."""
    given = {key: convert(numbers(*shape)) for key, shape in OPERANDS.items()}
    if name.startswith("mod_args"):
        given |= {"mod_args": {"x": odd}, "score_mod": lambda score, *at, x: score}
    elif name:
        given[name] = odd
    return given


def refusal(error: type[Exception], call: Callable[[], Any]) -> str:
    with pytest.raises(error) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def everywhere(name: str, error: type[Exception], given: Any) -> str:
    """What attention and explain say alike of an argument."""
    said = {refusal(error, lambda call=call: call(**given)) for call in (attention, explain)}
    assert len(said) == 1
    (message,) = said
    assert message.startswith(f"{name}: ")
    return message


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
        ({"requires_grad": True}, ValueError, "k: requires a gradient"),
        ({"tangent": 1}, ValueError, "k: has a tangent"),
        ({"wrapped": True}, TypeError, "k: got a tensor inside torch.func or torch.vmap"),
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
        message = refusal(TypeError, lambda name=name: interop.gpu_of(name, tracer()))
        assert message.startswith(f"{name}: got a tracer of JAX (JVPTracer)")
        assert "jax.pure_callback" in message and f"jax.lax.stop_gradient({name})" in message
        assert "CuPy" not in message
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
    assert told == ["flashcore_cupy"]


# --- torch ----------------------------------------------------------------------------------------


def tensor(x: np.ndarray) -> Any:
    return pytest.importorskip("torch").from_numpy(x)


class TestTorch:
    """Tensors on the CPU."""

    @pytest.mark.parametrize("name", FLOATS)
    def test_what_requires_a_gradient_is_refused(self, name: str) -> None:
        torch = pytest.importorskip("torch")
        odd = tensor(numbers(*FLOATS[name])).requires_grad_()
        message = everywhere(name, ValueError, arguments(tensor, name, odd))
        assert f"pass {name}.detach()" in message and "torch.no_grad()" in message
        plain = attention(**arguments(tensor, name, odd.detach()))
        for without in (torch.no_grad, torch.inference_mode):
            with without():
                got = attention(**arguments(tensor, name, odd))
            assert not got.requires_grad or got is odd
            assert torch.equal(got, plain)

    def test_what_comes_of_a_parameter_is_refused(self) -> None:
        torch = pytest.importorskip("torch")
        layer = torch.nn.Linear(D, D)
        q = layer(tensor(numbers(*OPERANDS["q"])))
        assert "pass q.detach()" in everywhere("q", ValueError, arguments(tensor, "q", q))

    @pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "jacrev"])
    def test_transforms_of_torch_func(self, transform: str) -> None:
        torch = pytest.importorskip("torch")
        given = arguments(tensor)
        q = given.pop("q")

        def call(x: Any) -> Any:
            return attention(x, **given).sum()

        run = {
            "grad": lambda: torch.func.grad(call)(q),
            "vmap": lambda: torch.func.vmap(call)(q[None]),
            "jvp": lambda: torch.func.jvp(call, (q,), (q,)),
            "jacrev": lambda: torch.func.jacrev(call)(q),
        }[transform]
        assert refusal(TypeError, run).startswith("q: got a tensor inside torch.func or torch.vmap")

    def test_tangents(self) -> None:
        forward_ad = pytest.importorskip("torch").autograd.forward_ad
        x = tensor(numbers(SQ, SKV))
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, x)
            message = everywhere("bias", ValueError, arguments(tensor, "bias", dual))
            assert "has a tangent" in message
            attention(**arguments(tensor, "bias", forward_ad.unpack_dual(dual).primal))

    def test_tensors_that_are_not_just_memory(self) -> None:
        torch = pytest.importorskip("torch")
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
        torch = pytest.importorskip("torch")
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
        torch = pytest.importorskip("torch")
        out = torch.ones(OPERANDS["q"])
        weight = torch.ones((), requires_grad=True)
        product = (weight * out).sum()  # saves out for its backward pass
        attention(**arguments(tensor, "out", out))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()

    def test_hints_are_in_words_of_torch(self) -> None:
        torch = pytest.importorskip("torch")
        x = torch.zeros(OPERANDS["k"])
        for dtype, hint in ((torch.float64, "k.to(torch.float32)"), (torch.int8, "torch.float16)")):
            given = arguments(tensor, "k", x.to(dtype))
            assert everywhere("k", TypeError, given).endswith(hint)


class TestTorchCompile:
    """A call breaks the graph, and runs as it does without a compiler."""

    @pytest.fixture(autouse=True)
    def fresh(self) -> Iterator[None]:
        torch = pytest.importorskip("torch")
        torch.compiler.reset()
        yield
        torch.compiler.reset()

    @pytest.mark.parametrize("backend", ["eager", "inductor"])
    def test_the_same_result(self, backend: str) -> None:
        torch = pytest.importorskip("torch")
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
        torch = pytest.importorskip("torch")
        compiled = torch.compile(lambda q, k, v: attention(q, k, v) * 2, backend="eager")
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            for n in range(1, 20):
                q, k, v = (tensor(numbers(1, n, 4 + n, D)) for _ in range(3))
                assert torch.equal(compiled(q, k, v), attention(q, k, v) * 2)
        assert not [x for x in caplog.records if x.levelno >= logging.WARNING]

    def test_attention_itself_and_other_arrays(self) -> None:
        torch = pytest.importorskip("torch")
        for convert in (tensor, np.asarray):
            given = arguments(convert)
            wanted = attention(**given)
            got = torch.compile(attention, backend="eager")(**given)
            np.testing.assert_array_equal(np.asarray(got), np.asarray(wanted))
            got = torch.compile(lambda given=given: attention(**given), backend="eager")()
            np.testing.assert_array_equal(np.asarray(got), np.asarray(wanted))

    def test_errors_reach_the_caller(self) -> None:
        torch = pytest.importorskip("torch")
        compiled = torch.compile(lambda **given: attention(**given), backend="eager")
        q = tensor(numbers(*OPERANDS["q"])).requires_grad_()
        given = arguments(tensor, "q", q)
        assert refusal(ValueError, lambda: compiled(**given)).startswith("q: requires a gradient")
        with torch.no_grad():
            assert torch.equal(compiled(**given), attention(**given))

    def test_a_whole_graph_is_an_error_of_torch(self) -> None:
        torch = pytest.importorskip("torch")
        compiled = torch.compile(attention, backend="eager", fullgraph=True)
        with pytest.raises(Exception, match=r"flashcore_cupy|torch\.compiler\.disable|graph break"):
            compiled(**arguments(tensor))

    @pytest.mark.parametrize("first", ["torch", "flashcore_cupy"])
    def test_whichever_is_imported_first(self, first: str) -> None:
        """And the first call of all is compiled."""
        pytest.importorskip("torch")
        imports = ["import torch", "import flashcore_cupy"]
        lines = (
            "import sys, warnings",
            "warnings.simplefilter('error')" if first != "torch" else "",
            *(imports if first == "torch" else imports[::-1]),
            "x = torch.ones(1, 2, 5, 8)",
            "f = lambda x: flashcore_cupy.attention(x * 2, x, x, causal=True, sink=[1.0, 2.0]) + 1",
            "with warnings.catch_warnings():",
            "    warnings.simplefilter('error')",
            "    got = torch.compile(f, backend='eager')(x)",
            "assert torch.equal(got, f(x))",
        )
        done = subprocess.run(
            [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr


# --- JAX ------------------------------------------------------------------------------------------


def jax_array(x: np.ndarray) -> Any:
    return pytest.importorskip("jax").numpy.asarray(x)


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


class TestJax:
    """Arrays on the CPU."""

    @pytest.mark.parametrize("name", [name for name in FLOATS if name != "out"])
    @pytest.mark.parametrize("transform", TRANSFORMS)
    def test_tracers_are_refused(self, transform: str, name: str) -> None:
        jax = pytest.importorskip("jax")
        others = {key: x for key, x in arguments(jax_array).items() if key != name}
        for call in (attention, explain):

            def traced(x: Any, call: Any = call) -> Any:
                return call(**arguments(np.asarray, name, x) | others).sum()

            message = refusal(
                TypeError,
                lambda traced=traced: TRANSFORMS[transform](
                    jax, traced, jax_array(numbers(*FLOATS[name]))
                ),
            )
            assert message.startswith(f"{name}: got a tracer of JAX (")
            assert "jax.pure_callback" in message and "jax.lax.stop_gradient" in message
            assert "CuPy" not in message and "cupy" not in message

    def test_tracers_among_numpy_arrays(self) -> None:
        jax = pytest.importorskip("jax")
        run = jax.jit(lambda x: attention(**arguments(np.asarray, "v", x)))
        message = refusal(TypeError, lambda: run(numbers(*OPERANDS["v"])))
        assert message.startswith("v: got a tracer of JAX (")

    @pytest.mark.parametrize("name", ["causal", "window", "return_lse"])
    def test_tracers_as_plain_arguments(self, name: str) -> None:
        jax = pytest.importorskip("jax")
        run = jax.jit(lambda x: attention(**arguments(np.asarray, name, x)))
        with pytest.raises((TypeError, ValueError), match=f"^{name}: got "):
            run(True)

    @pytest.mark.parametrize("transform", ["jit", "vmap", "grad of jit"])
    def test_what_the_message_says_works(self, transform: str) -> None:
        jax = pytest.importorskip("jax")
        q, k, v = (jax_array(numbers(2, *shape, seed=3)) for shape in OPERANDS.values())

        def on_host(q: Any, k: Any, v: Any) -> Any:
            return attention(*map(np.asarray, (q, k, v)), causal=True)

        def call(q: Any, k: Any, v: Any) -> Any:
            shape = jax.ShapeDtypeStruct(q.shape, q.dtype)
            return jax.pure_callback(on_host, shape, q, k, v, vmap_method="sequential")

        wanted = [on_host(*one) for one in zip(q, k, v, strict=True)]
        if transform == "vmap":
            got = jax.vmap(call)(q, k, v)
        elif transform == "jit":
            got = [jax.jit(call)(*one) for one in zip(q, k, v, strict=True)]
        else:

            def loss(scale: Any, q: Any, k: Any, v: Any) -> Any:
                return (scale * call(*map(jax.lax.stop_gradient, (q, k, v)))).sum()

            ones = zip(q, k, v, strict=True)
            got = [jax.jit(jax.grad(loss))(2.0, *one) for one in ones]
            wanted = [o.sum() for o in wanted]
        np.testing.assert_allclose(np.asarray(got), np.asarray(wanted), rtol=1e-5)

    def test_arrays_that_are_gone(self) -> None:
        x = jax_array(numbers(*OPERANDS["k"]))
        x.delete()
        assert "deleted" in everywhere("k", ValueError, arguments(jax_array, "k", x))

    def test_hints_are_in_words_of_jax(self) -> None:
        jax = pytest.importorskip("jax")
        for dtype, hint in (("float64", "float32)"), ("int32", "float16)")):
            with getattr(jax, "enable_x64", lambda _: nullcontext())(True):
                x = jax.numpy.zeros(OPERANDS["k"], dtype)
            message = everywhere("k", TypeError, arguments(jax_array, "k", x))
            assert message.endswith(f"k.astype(jax.numpy.{hint}")
