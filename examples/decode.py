"""Decoding: one query per sequence, grouped heads, many keys behind it.

On a GPU the query heads that share a head of K and V become the rows of one tile, so K and V are
read once, and several thread blocks share out the keys: `explain` says pack_gqa and split_kv.
"""

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
batch, heads, heads_kv, capacity, dim = 4, 32, 8, 4096, 128
cache = xp.asarray(rng.standard_normal((2, batch, heads_kv, capacity, dim)), dtype=np.float16)

for length in (3000, 3001):  # each step has one key more; a kernel serves every length
    q = xp.asarray(rng.standard_normal((batch, heads, 1, dim)), dtype=np.float16)
    k, v = cache[:, :, :, :length]  # views: nothing is copied
    if length == 3000:
        print(flashcore_cupy.explain(q, k, v))
    o, lse = flashcore_cupy.attention(q, k, v, return_lse=True)

    host = [x if xp is np else x.get() for x in (q, k, v, o, lse)]
    expected, expected_lse = reference.oracle(*host[:3])
    outcome = reference.compare(host[3], expected, reference.naive(*host[:3]))
    print(f"{length} keys: max error {outcome.max_error:.1e}, {outcome.reason or 'ok'}")
    assert outcome.ok and np.allclose(host[4], expected_lse, atol=1e-3)
