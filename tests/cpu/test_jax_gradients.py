"""attention() in JAX's programs: what grad gets is what attention_backward gives."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from cases_gradients import asked, extras, operands, random, run

from flashcore_cupy import attention
from flashcore_cupy.integrations import engine

if importlib.util.find_spec("jax") is None:
    pytest.skip("jax is not installed", allow_module_level=True)

B, H, HKV, SQ, SKV, D, DV = 2, 4, 2, 9, 13, 8, 12
EXTRAS = extras(B, H, SQ, SKV)


def three(dtype: str = "float32") -> dict[str, Any]:
    import ml_dtypes

    element = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    return dict(zip("qkv", operands(H, HKV, SQ, SKV, D, DV, B, element), strict=True))


def on_device(arrays: dict[str, Any]) -> dict[str, Any]:
    import jax

    return {name: jax.numpy.asarray(x) for name, x in arrays.items()}


def pulled(call: Any, arrays: dict[str, Any], *starts: Any) -> Any:
    """Results of a jitted call, and its gradients, jitted as well."""
    import jax

    def both(arrays: dict[str, Any]) -> Any:
        ends, pull = jax.vjp(call, arrays)
        return ends, pull(starts if len(starts) > 1 else starts[0])[0]

    return jax.jit(both)(on_device(arrays))


def equal(got: Any, wanted: Any) -> None:
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    np.testing.assert_array_equal(np.asarray(got), wanted)


class TestValues:
    @pytest.mark.parametrize("name", EXTRAS)
    def test_every_rule(self, name: str) -> None:
        rules, given = EXTRAS[name], three()
        do, dlse = random(B, H, SQ, DV, seed=5), random(B, H, SQ, seed=6)
        of = asked(rules)
        rest = {key: x for key, x in rules.items() if key not in of}
        (o, lse), got = pulled(
            lambda x: attention(**x, **rest, return_lse=True),
            {key: (given | rules)[key] for key in of},
            do,
            dlse,
        )
        wanted_o, wanted_lse = attention(**given, **rules, return_lse=True)
        equal(o, wanted_o)
        equal(lse, wanted_lse)
        wanted = run(**given, do=do, dlse=dlse, **rules)
        for key, gradient in got.items():
            equal(gradient, getattr(wanted, f"d{key}"))

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    @pytest.mark.parametrize("layout", ["bhsd", "bshd"])
    def test_dtypes_and_layouts(self, dtype: str, layout: str) -> None:
        given = three(dtype)
        do = random(B, H, SQ, DV, dtype=given["q"].dtype, seed=5)
        if layout == "bshd":
            given, do = {n: x.swapaxes(1, 2) for n, x in given.items()}, do.swapaxes(1, 2)
        rules: dict[str, Any] = {"layout": layout, "causal": True}
        o, got = pulled(lambda x: attention(**x, **rules), given, do)
        equal(o, attention(**given, **rules))
        wanted = run(**given, do=do, **rules)
        for name, gradient in got.items():
            equal(gradient, getattr(wanted, f"d{name}"))

    @pytest.mark.parametrize("kind", ["uint32", "int32", "numpy", "numpy, negative", "traced"])
    def test_a_draw_from_an_array(self, kind: str) -> None:
        import jax

        draw, given = (2**40 + 5, 7), three()
        if kind == "numpy, negative":
            draw = (2**64 - 3, 7)
        words = np.array(draw, np.uint64).view(np.uint32)
        rng: Any = jax.numpy.asarray(words.view(np.int32) if kind == "int32" else words)
        if kind.startswith("numpy"):
            rng = np.array(draw, np.uint64).view(np.int64)
        rules: dict[str, Any] = {"causal": True, "dropout_p": 0.3}
        do = random(B, H, SQ, DV, seed=5)

        def call(x: dict[str, Any]) -> Any:
            return attention(**x, **rules, rng=rng)

        if kind == "traced":

            def drawn(rng: Any) -> Any:
                return jax.vjp(lambda x: attention(**x, **rules, rng=rng), on_device(given))[1](do)

            (got,) = jax.jit(drawn)(rng)
        else:
            o, got = pulled(call, given, do)
            equal(o, attention(**given, **rules, rng=draw))
        wanted = run(**given, do=do, **rules, rng=draw)
        for name, gradient in got.items():
            equal(gradient, getattr(wanted, f"d{name}"))

    def test_packed(self) -> None:
        import jax

        bounds = np.array([0, 4, 4, 9], np.int32), np.array([0, 3, 8, 13], np.int32)
        q, k, v = (random(n, 4, 8, seed=n) for n in (9, 13, 13))
        do = random(9, 4, 8, seed=5)
        names = ("cu_seqlens_q", "cu_seqlens_k")
        wanted = run(q, k, v, do=do, **dict(zip(names, bounds, strict=True)))

        def loss(q: Any, k: Any, v: Any, *bounds: Any) -> Any:
            o = attention(q, k, v, **dict(zip(names, bounds, strict=True)))
            return (o * do).sum()

        for call in (jax.grad(loss, (0, 1, 2)), jax.jit(jax.grad(loss, (0, 1, 2)))):
            for got, x in zip(call(q, k, v, *bounds), wanted, strict=False):
                equal(got, x)

    def test_mod_args(self) -> None:
        """As attention_backward has them; and where they are mapped over, one by one."""
        import jax

        given, table = three(), random(3, 2, H, seed=7)

        def score_mod(s: Any, b: Any, h: Any, i: Any, j: Any, x: Any) -> Any:
            return s * x[0, h] + x[1, h] * (j - i)

        def call(x: Any) -> Any:
            table = x["table"]
            mods = {"score_mod": score_mod, "mod_args": {"x": table}}
            return attention(**{n: x[n] for n in "qkv"}, **mods)

        do = random(B, H, SQ, DV, seed=5)
        _, found = pulled(call, given | {"table": table[0]}, do)
        mods: dict[str, Any] = {"score_mod": score_mod, "mod_args": {"x": table[0]}}
        wanted = run(**given, do=do, wrt=("q", "mod_args.x"), **mods)
        equal(found["q"], wanted.dq)
        equal(found["table"], wanted.dmod_args["x"])
        of_table = jax.grad(lambda x: (call(on_device(given) | {"table": x}) * do).sum())
        every = jax.vmap(of_table)(jax.numpy.asarray(table))
        np.testing.assert_allclose(every[0], wanted.dmod_args["x"], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(every[2], of_table(table[2]), rtol=1e-5)

    def test_check_grads(self) -> None:
        from jax.test_util import check_grads

        given = on_device(three() | {"bias": random(H, SQ, SKV), "sink": random(H)})
        check_grads(
            lambda x: attention(**x, causal=True, softcap=2.0, return_lse=True),
            (given,), order=1, modes=("rev",), eps=1e-2, atol=2e-2, rtol=2e-2,
        )  # fmt: skip

    def test_jaxs_own_attention_agrees(self) -> None:
        import jax

        q, k, v = (random(2, 17, 3, 16, seed=n) for n in range(3))

        def loss(function: Any, **more: Any) -> Any:
            return jax.jit(
                jax.grad(lambda *x: (function(*x, **more) ** 2).sum(), argnums=(0, 1, 2))
            )

        wanted = loss(jax.nn.dot_product_attention, is_causal=True)(q, k, v)
        got = loss(attention, layout="bshd", causal=True)(q, k, v)
        for x, y in zip(got, wanted, strict=True):
            np.testing.assert_allclose(x, y, atol=2e-5)

    def test_only_what_is_wanted_is_computed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import jax

        backward, calls = engine._functions["attention_backward"], []

        def spy(*args: Any, **arguments: Any) -> Any:
            calls.append((sorted(arguments["wrt"]), "dlse" in arguments))
            return backward(*args, **arguments)

        monkeypatch.setitem(engine._functions, "attention_backward", spy)
        given = on_device(three() | {"bias": random(H, SQ, SKV)})

        def loss(of: dict[str, Any], *, use_lse: bool) -> Any:
            o, lse = attention(**given | of, return_lse=True)
            return lse.sum() if use_lse else o.sum()

        for names in (("q",), ("bias", "v")):
            for use_lse in (False, True):
                of = {name: given[name] for name in names}
                jax.block_until_ready(
                    jax.jit(jax.grad(lambda x, y=use_lse: loss(x, use_lse=y)))(of)
                )
                assert calls.pop() == (sorted(names), use_lse)


class TestTransforms:
    def test_eval_shape_and_lowering(self) -> None:
        import jax

        shapes = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in three("bfloat16").items()}
        o, lse = jax.eval_shape(lambda x: attention(**x, return_lse=True), shapes)
        assert (o.shape, o.dtype) == ((B, H, SQ, DV), jax.numpy.bfloat16)
        assert (lse.shape, lse.dtype) == ((B, H, SQ), np.float32)
        text = jax.jit(lambda x: attention(**x, causal=True)).lower(shapes).as_text()
        assert "flashcore_attention" in text and "{\\22causal\\22: true}" in text

    @pytest.mark.parametrize(
        ("rules", "dims"),
        [
            ({"causal": True}, {}),
            ({"layout": "bshd"}, {}),
            ({"mask": (SQ, SKV)}, {}),
            ({"bias": (3, 1, H, SQ, SKV)}, {"bias": 0}),
            ({"bias": (H, SQ, SKV, 3)}, {"bias": 3}),
            ({"alibi_slopes": (H,), "sink": (3, H)}, {"sink": 0}),
            ({"dropout_p": 0.3, "rng": (5, 2)}, {}),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("of_batch", [1, 2])
    def test_vmap(self, rules: dict[str, Any], dims: dict[str, int], of_batch: int) -> None:
        import jax

        rules = dict(rules)
        arrays: dict[str, Any] = {}
        for name in ("mask", "bias", "alibi_slopes", "sink"):
            if name in rules:
                x = random(*rules.pop(name), seed=len(name))
                arrays[name] = x > 0 if name == "mask" else x
        turn = (0, 2, 1, 3) if rules.get("layout") == "bshd" else (0, 1, 2, 3)
        arrays["q"] = random(3, of_batch, H, SQ, D, seed=1).transpose(0, *(n + 1 for n in turn))
        arrays["k"] = random(of_batch, H, SKV, D, seed=2).transpose(turn)
        arrays["v"] = random(3, of_batch, H, SKV, D, seed=3).transpose(0, *(n + 1 for n in turn))
        arrays = on_device(arrays)
        where = {name: dims.get(name) for name in arrays} | {"q": 0, "v": 0}

        def loss(of: dict[str, Any], mask: Any) -> Any:
            o, lse = attention(**of, **rules, mask=mask, return_lse=True)
            return (o**2).sum() + lse.sum()

        def gradients(x: dict[str, Any]) -> Any:
            x = dict(x)
            return jax.value_and_grad(loss)(x, x.pop("mask", None))

        got = jax.jit(jax.vmap(gradients, in_axes=(where,)))(arrays)
        for n in range(3):
            one = {
                name: x if where[name] is None else jax.numpy.take(x, n, where[name])
                for name, x in arrays.items()
            }
            value, wanted = gradients(one)
            np.testing.assert_allclose(got[0][n], value, rtol=1e-5)
            for name, x in wanted.items():
                np.testing.assert_allclose(got[1][name][n], x, atol=1e-5, err_msg=name)

    def test_vmap_of_vmap_of_packed_batches(self) -> None:
        import jax

        q, k, v = (random(2, 3, 9, 4, 8, seed=n) for n in range(3))
        bounds = np.array([0, 4, 9], np.int32)

        def call(q: Any, k: Any, v: Any) -> Any:
            return attention(q, k, v, cu_seqlens_q=bounds, cu_seqlens_k=bounds, return_lse=True)

        o, lse = jax.vmap(jax.vmap(call))(q, k, v)
        assert o.shape == (2, 3, 9, 4, 8) and lse.shape == (2, 3, 4, 9)
        for i, j in np.ndindex(2, 3):
            one = call(q[i, j], k[i, j], v[i, j])
            equal(o[i, j], one[0])
            equal(lse[i, j], one[1])

    def test_scan_checkpoint_and_remat(self) -> None:
        import jax

        q, k, v = on_device(three() | {"v": random(B, HKV, SKV, D)}).values()

        def layers(q: Any) -> Any:
            def layer(x: Any, _: Any) -> Any:
                return jax.checkpoint(lambda x: attention(x, k, v, causal=True))(x) + x, None

            return (jax.lax.scan(layer, q, None, 3)[0] ** 2).sum()

        def unrolled(q: Any) -> Any:
            for _ in range(3):
                q = attention(q, k, v, causal=True) + q
            return (q**2).sum()

        got, wanted = jax.jit(jax.grad(layers))(q), jax.grad(unrolled)(q)
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)

    def test_shard_map(self) -> None:
        """Over batches and heads; a bias that all share gets the sum of its gradients."""
        lines = (
            "import jax, numpy as np, flashcore_cupy",
            "from jax.sharding import PartitionSpec as P",
            "devices = np.array(jax.devices()).reshape(2, 2)",
            "mesh = jax.sharding.Mesh(devices, ('b', 'h'))",
            "rng = np.random.default_rng(0)",
            "q, k, v = (rng.standard_normal((2, 4, 7, 8)).astype('f4') for _ in range(3))",
            "bias = rng.standard_normal((7, 7)).astype('f4')",
            "call = lambda q, k, v, b: flashcore_cupy.attention(q, k, v, bias=b, causal=True)",
            "specs = (P('b', 'h'),) * 3 + (P(),)",
            "split = jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=P('b', 'h'))",
            "of = lambda f: jax.jit(jax.value_and_grad(lambda *x: (f(*x)**2).sum(), (0, 1, 2, 3)))",
            "got, wanted = (of(f)(q, k, v, bias) for f in (split, call))",
            "np.testing.assert_allclose(got[0], wanted[0], rtol=1e-5)",
            "for x, y in zip(got[1], wanted[1]):",
            "    np.testing.assert_allclose(x, y, atol=1e-5)",
        )
        env = os.environ | {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
            "JAX_PLATFORMS": "cpu",
        }
        done = subprocess.run(
            [sys.executable, "-c", "\n".join(lines)],
            env=env, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


class TestErrors:
    def test_before_anything_is_compiled(self) -> None:
        import jax

        given = on_device(three())

        def refused(error: type[Exception], message: str, **more: Any) -> None:
            with pytest.raises(error, match=message):
                jax.jit(lambda x: attention(**(x | more)))(given)

        refused(ValueError, "^causal: got 'bottom'", causal="bottom")
        refused(ValueError, "^bias: got shape", bias=np.zeros((7, 7), np.float32))
        refused(TypeError, "^mask: ", mask=np.zeros((SQ, SKV), np.float32))
        refused(TypeError, r"^q: .*astype\(jax.numpy.float16\)", q=np.zeros((2, 4, 9, 8), np.int8))
        refused(ValueError, "^k: got 5 dimensions", k=given["k"][None])
        refused(ValueError, "^out: ", out=np.zeros((B, H, SQ, DV), np.float32))
        refused(ValueError, "^gate: ", gate="qk")
        refused(ValueError, "^stream: ", stream=object())
        refused(TypeError, "no argument 'scale'", scale=1.0)

    def test_while_a_program_runs(self) -> None:
        """What only values tell: the handler's exception reaches the caller, as XLA's."""
        import jax

        q, k, v = (random(9, 4, 8, seed=n) for n in range(3))
        run = jax.jit(lambda b: attention(q, k, v, cu_seqlens_q=b, cu_seqlens_k=b))
        bad = np.array([0, 7, 4, 9], np.int32)
        with pytest.raises(Exception, match=r"ValueError: cu_seqlens_q: got \[0, 7, 4, 9\]"):
            jax.block_until_ready(run(bad))
        good = np.array([0, 4, 9], np.int32)
        equal(run(good), attention(q, k, v, cu_seqlens_q=good, cu_seqlens_k=good))

    def test_derivatives_that_there_are_not(self) -> None:
        import jax

        given = on_device(three())

        def loss(q: Any) -> Any:
            return attention(**(given | {"q": q})).sum()

        with pytest.raises(Exception, match="flashcore_attention_backward"):
            jax.grad(lambda q: jax.grad(loss)(q).sum())(given["q"])
        with pytest.raises(TypeError, match="forward-mode"):
            jax.jvp(loss, (given["q"],), (given["q"],))
        table = jax.numpy.ones(3)

        def of_table(x: Any, **mods: Any) -> Any:
            return attention(**given, **mods, mod_args={"x": x}).sum()

        mods: dict[str, Any] = {"mask_mod": lambda b, h, i, j, x: x[0] + j > i}
        jax.jit(lambda x: of_table(x, **mods))(table)
        with pytest.raises(ValueError, match=r"^mod_args\['x'\]: has no gradient without"):
            jax.grad(lambda x: of_table(x, **mods))(table)
        mods = {"score_mod": "score + x[kv_idx % 3]", "kernel": "mma_sm80"}
        with pytest.raises(ValueError, match=r"^mod_args\['x'\]: score_mod reads x\[kv_idx % 3\]"):
            jax.grad(lambda x: of_table(x, **mods))(table)


def test_many_calls_in_many_threads() -> None:
    import threading

    import jax

    given = on_device(three())
    call = jax.jit(lambda x: attention(**x, causal=True))
    wanted, faults = np.asarray(call(given)), []

    def work() -> None:
        for _ in range(20):
            if not np.array_equal(np.asarray(call(given)), wanted):
                faults.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


class TestHandlerOnCuda:
    """As XLA calls it there: a struct in memory, with a stream to be asked for."""

    class Buffer:
        """A CuPy array, as far as it matters."""

        class device:
            id = 3

    def call(self, monkeypatch: pytest.MonkeyPatch, compute: Any) -> tuple[Any, list[Any]]:
        import contextlib
        import ctypes as c

        from flashcore_cupy.integrations import jax_ffi as ffi

        noted: list[Any] = []

        def entered(gpu: int, stream: Any) -> Any:
            noted.append((gpu, stream.__cuda_stream__()))
            return contextlib.nullcontext()

        monkeypatch.setattr(ffi, "entered", entered)
        monkeypatch.setattr(ffi, "_on_gpu", lambda buffer: self.Buffer())

        @ffi._CREATE_ERROR
        def create_error(arguments: Any) -> int:
            noted.append(arguments.contents.message.decode())
            return 77

        @ffi._GET_STREAM
        def get_stream(arguments: Any) -> None:
            assert arguments.contents.context == 99
            arguments.contents.stream = 1234

        span = ffi._Span(c.cast(c.c_char_p(b"names"), c.c_void_p), 5)
        spans = (c.POINTER(ffi._Span) * 1)(c.pointer(span))
        buffers = (c.POINTER(ffi._Buffer) * 1)(c.pointer(ffi._Buffer()))
        one = ffi._Buffers(0, None, 1, None, buffers)
        api = ffi._Api(create_error=create_error, get_stream=get_stream)
        attributes = ffi._Attributes(0, None, 1, None, spans, spans)
        frame = ffi._Frame(0, None, c.pointer(api), 99, 3, one, one, attributes)
        return ffi._handler(compute, ffi._on_cuda)(c.pointer(frame)), noted

    def test_on_xlas_stream_and_the_arrays_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[Any] = []
        result, noted = self.call(monkeypatch, lambda *x: calls.append(x))
        assert result is None and noted == [(3, (0, 1234))]
        ((attributes, arguments, results),) = calls
        assert attributes == {"names": "names"} and len(arguments) == len(results) == 1

    def test_an_exception_becomes_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def compute(*_: Any) -> None:
            raise ValueError("k: no good")

        result, noted = self.call(monkeypatch, compute)
        assert result == 77 and noted[-1] == "ValueError: k: no good"
