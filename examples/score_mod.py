"""Rules of one's own on every score: CUDA expressions on the GPU, callables on the CPU.

The scores decay with the distance's logarithm, at a rate per head, and no document of a row of
concatenated ones sees another.
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


def decayed(score, b, h, q_idx, kv_idx, rate, document):
    """A block of scores (M, N), the positions of its queries (M, 1) and of its keys (1, N)."""
    return score - rate[h] * np.log1p(abs(q_idx - kv_idx))


def same_document(b, h, q_idx, kv_idx, rate, document):
    """Where a query may see a key, (M, N)."""
    return document[q_idx] == document[kv_idx]


rng = np.random.default_rng(0)
shape = (2, 4, 512, 64)  # batch, heads, sequence, head dim
host = [rng.standard_normal(shape).astype(np.float16) for _ in range(3)]
rate = np.array([0.25, 0.5, 1.0, 2.0], np.float32)  # of each head
document = np.repeat(np.arange(3, dtype=np.int32), [100, 300, 112])  # of each position

q, k, v = (xp.asarray(x) for x in host)
if xp is np:
    score_mod, mask_mod = decayed, same_document
else:  # the same, compiled into the kernel
    score_mod = "score - rate[h] * log1pf(abs(q_idx - kv_idx))"
    mask_mod = "document[q_idx] == document[kv_idx]"

mod_args = {"rate": xp.asarray(rate), "document": xp.asarray(document)}
o = flashcore_cupy.attention(q, k, v, score_mod=score_mod, mask_mod=mask_mod, mod_args=mod_args)

rules = {"score_mod": decayed, "mask_mod": same_document}
rules["mod_args"] = {"rate": rate, "document": document}
got = o if xp is np else o.get()
expected, _ = reference.oracle(*host, **rules)
outcome = reference.compare(got, expected, reference.naive(*host, **rules))
print(f"o {o.shape} {o.dtype}: max error {outcome.max_error:.1e}, {outcome.reason or 'ok'}")
assert outcome.ok
plain, _ = reference.oracle(*host)
print(f"without the rules it would be up to {abs(plain - expected).max():.2f} off")
