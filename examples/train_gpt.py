"""A tiny GPT, trained three ways: attention() in torch, torch's own attention, attention() in JAX.

Two layers, bytes as tokens, and for a text the sources of Python's standard library. All ways start
from the same parameters and see the same batches, so their losses lie on each other.

    python examples/train_gpt.py --steps 300 --width 256 --sequence 256 --batch 16 --plot losses.png
"""

import argparse
import importlib.util
import json
import os
from pathlib import Path

import numpy as np

from flashcore_cupy import attention

LAYERS, HEAD_DIM = 2, 32
RATE, MOMENTS, TINY = 2e-3, (0.9, 0.99), 1e-8  # of Adam


def corpus():
    """The text, as bytes."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    return np.frombuffer(b"\n".join(path.read_bytes() for path in files), np.uint8)


def batches(options):
    """(batch, sequence + 1) tokens for each step."""
    text, rng = corpus(), np.random.default_rng(0)
    for _ in range(options.steps):
        starts = rng.integers(0, len(text) - options.sequence, options.batch)
        yield text[starts[:, None] + np.arange(options.sequence + 1)].astype(np.int32)


def parameters(options):
    """By name, of N(0, 1 / inputs)."""
    rng, width = np.random.default_rng(1), options.width
    shapes = {"token": (256, width), "place": (options.sequence, width)}
    for n in range(LAYERS):
        shapes |= {f"qkv{n}": (width, 3 * width), f"out{n}": (width, width)}
        shapes |= {f"up{n}": (width, 4 * width), f"down{n}": (4 * width, width)}
    shapes["logits"] = (width, 256)
    scales = {"token": 0.02, "place": 0.02}
    return {
        name: np.float32(scales.get(name, shape[0] ** -0.5))
        * rng.standard_normal(shape, np.float32)
        for name, shape in shapes.items()
    }


def normalized(x):
    """Each row over its root mean square."""
    return x / ((x * x).mean(-1, keepdims=True) + 1e-5) ** 0.5


def loss_of(p, tokens, attend, logsumexp):
    """Mean of -log of the next byte's probability; with torch's tensors as with JAX's arrays."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    x = p["token"][inputs] + p["place"]
    batch, sequence, width = x.shape
    for n in range(LAYERS):
        qkv = (normalized(x) @ p[f"qkv{n}"]).reshape(batch, sequence, 3, -1, HEAD_DIM)
        o = attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])  # (B, S, H, D)
        x = x + o.reshape(batch, sequence, width) @ p[f"out{n}"]
        up = normalized(x) @ p[f"up{n}"]
        x = x + (up * (up > 0)) @ p[f"down{n}"]
    logits = normalized(x) @ p["logits"]
    hit = targets[..., None] == p["bytes"]
    return (logsumexp(logits, -1) - (logits * hit).sum(-1)).mean()


def ours(q, k, v):
    """(B, S, H, D) in and out, causal."""
    return attention(q, k, v, layout="bshd", causal=True)


def torchs(q, k, v):
    """The same by torch."""
    import torch.nn.functional as F

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def train_torch(options, attend):
    """The loss of each step."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    p = {
        name: torch.tensor(x, device=device, requires_grad=True)
        for name, x in parameters(options).items()
    }
    adam = torch.optim.Adam(p.values(), RATE, MOMENTS, TINY)
    places = {"bytes": torch.arange(256, device=device)}
    for tokens in batches(options):
        tokens = torch.as_tensor(tokens, device=device)
        loss = loss_of(p | places, tokens, attend, torch.logsumexp)
        adam.zero_grad()
        loss.backward()
        adam.step()
        yield loss.item()


def train_jax(options):
    """The loss of each step."""
    import jax

    def loss(p, tokens):
        places = {"bytes": jax.numpy.arange(256)}
        with jax.default_matmul_precision("float32"):  # as torch has it by default
            return loss_of(p | places, tokens, ours, jax.nn.logsumexp)

    @jax.jit
    def step(p, first, second, tokens, n):
        (a, b), (value, g) = MOMENTS, jax.value_and_grad(loss)(p, tokens)
        first = jax.tree.map(lambda m, x: a * m + (1 - a) * x, first, g)
        second = jax.tree.map(lambda m, x: b * m + (1 - b) * x * x, second, g)

        def moved(x, m, s):
            return x - RATE * m / (1 - a**n) / ((s / (1 - b**n)) ** 0.5 + TINY)

        return jax.tree.map(moved, p, first, second), first, second, value

    p = jax.tree.map(jax.numpy.asarray, parameters(options))
    first = second = jax.tree.map(jax.numpy.zeros_like, p)
    for n, tokens in enumerate(batches(options), 1):
        p, first, second, value = step(p, first, second, tokens, float(n))
        yield float(value)


WAYS = {
    "attention() in torch": ("torch", lambda options: train_torch(options, ours)),
    "torch's own attention": ("torch", lambda options: train_torch(options, torchs)),
    "attention() in JAX": ("jax", train_jax),
}


def plot(curves, path):
    """Draw the losses, the first below the others."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for width, (way, losses) in zip((5, 2.5, 1), curves.items(), strict=False):
        axes.plot(losses, linewidth=width, label=way)
    axes.set(xlabel="step", ylabel="nats per byte")
    axes.legend()
    figure.savefig(path, dpi=120)


def main():
    """Train each way that is installed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    sizes = {"steps": 10, "width": 64, "sequence": 64, "batch": 4}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--plot", metavar="FILE", help="draw the losses")
    parser.add_argument("--json", metavar="FILE", help="write the losses")
    options = parser.parse_args()
    curves = {}
    for way, (library, train) in WAYS.items():
        if importlib.util.find_spec(library) is None:
            print(f"{way}: {library} is not installed")
            continue
        losses = curves[way] = list(train(options))
        print(f"{way}: loss {losses[0]:.4f}, after {len(losses)} steps {losses[-1]:.4f}")
    if options.json:
        Path(options.json).write_text(json.dumps(curves))
    if options.plot and curves:
        plot(curves, options.plot)
    # Rounding differs, and training makes more of it.
    start = [losses[:10] for losses in curves.values()]
    assert all(np.allclose(losses, start[0], atol=2e-3) for losses in start)


if __name__ == "__main__":
    main()
