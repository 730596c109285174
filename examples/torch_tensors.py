"""torch tensors in, a torch tensor out: no copy, no flash-attn, on a GPU and on the CPU."""

import sys

import ml_dtypes

import flashcore_cupy
from flashcore_cupy.cpu import reference

try:
    import torch
except ImportError:
    print("torch is not installed: nothing to show")
    sys.exit()

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
# (B, S, H, D), as models have them; 8 query heads share 2 heads of k and v.
q = torch.randn(2, 512, 8, 64, dtype=torch.bfloat16, device=device)
k, v = torch.randn(2, 2, 512, 2, 64, dtype=torch.bfloat16, device=device)

o = flashcore_cupy.attention(q, k, v, layout="bshd", causal=True, window=(127, 0))
print(f"o: {type(o).__name__} {tuple(o.shape)} {o.dtype} on {o.device}")

# Into a tensor that is there already: its memory is written, and it is what comes back.
again = torch.empty_like(q)
rules = {"causal": True, "window": (127, 0)}
assert flashcore_cupy.attention(q, k, v, layout="bshd", **rules, out=again) is again
assert torch.equal(o, again)


def on_host(x):
    """The same values for the reference: NumPy, (B, H, S, D)."""
    return x.float().cpu().numpy().astype(ml_dtypes.bfloat16).swapaxes(1, 2)


host = [on_host(x) for x in (q, k, v)]
expected, _ = reference.oracle(*host, **rules)
outcome = reference.compare(on_host(o), expected, reference.naive(*host, **rules))
print(f"max error {outcome.max_error:.1e}, {outcome.reason or 'ok'}")
assert outcome.ok
