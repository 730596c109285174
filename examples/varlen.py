"""Sequences of different lengths in one call: packed end to end, nothing padded."""

from itertools import pairwise

import numpy as np

import flashcore_cupy
from flashcore_cupy.cpu import reference

try:
    import cupy as xp

    xp.cuda.runtime.getDeviceCount()
except Exception as reason:
    print(f"no GPU ({type(reason).__name__}): NumPy arrays")
    xp = np

rng = np.random.default_rng(0)
lengths = [700, 5, 1, 294]
total = sum(lengths)
host = [rng.standard_normal((total, heads, 64)).astype(np.float16) for heads in (8, 2, 2)]
q, k, v = (xp.asarray(x) for x in host)  # (total, Hq, D), (total, Hkv, D), (total, Hkv, Dv)

# Sequence n is rows cu_seqlens[n] to cu_seqlens[n + 1]. On the host they are checked, on the GPU
# they are clamped; either way no sequence sees another.
cu_seqlens = np.cumsum([0, *lengths], dtype=np.int32)
o, lse = flashcore_cupy.attention(
    q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, causal=True, return_lse=True
)
print("o  ", o.shape, o.dtype)  # (total, Hq, Dv)
print("lse", lse.shape, lse.dtype)  # (Hq, total)

got = o if xp is np else o.get()
expected, _ = reference.oracle_varlen(*host, cu_seqlens, cu_seqlens, causal=True)
naive = reference.naive_varlen(*host, cu_seqlens, cu_seqlens, causal=True)
for first, end in pairwise(cu_seqlens.tolist()):
    one = slice(first, end)
    outcome = reference.compare(got[one], expected[one], naive[one])
    print(f"{end - first:4} queries: max error {outcome.max_error:.1e}, {outcome.reason or 'ok'}")
    assert outcome.ok
