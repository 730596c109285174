"""Attention on random arrays: CuPy's where there is a GPU, else NumPy's; the same call."""

import numpy as np

import flashcore_cupy

try:
    import cupy as xp

    xp.cuda.runtime.getDeviceCount()
except Exception as reason:
    print(f"no GPU ({type(reason).__name__}): NumPy arrays")
    xp = np

rng = np.random.default_rng(0)
shape = (2, 8, 1024, 64)  # batch, heads, sequence, head dim
q, k, v = (xp.asarray(rng.standard_normal(shape), dtype=np.float16) for _ in range(3))

print(flashcore_cupy.explain(q, k, v, causal=True))
o, lse = flashcore_cupy.attention(q, k, v, causal=True, return_lse=True)
print("o  ", o.shape, o.dtype)
print("lse", lse.shape, lse.dtype)

# The first query of a causal problem sees one key, so its output is that key's value.
assert xp.allclose(o[:, :, 0], v[:, :, 0])
