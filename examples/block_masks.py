"""Block masks for patterns that others have published: what is computed, and that it is right."""

import numpy as np

from flashcore_cupy import BlockMask, attention, block_mask
from flashcore_cupy.cpu import reference

try:
    import cupy as xp

    xp.cuda.runtime.getDeviceCount()
except Exception as reason:
    print(f"no GPU ({type(reason).__name__}): NumPy arrays")
    xp = np

S = 640
rng = np.random.default_rng(0)
host = [rng.standard_normal((1, 4, S, 64)).astype(np.float16) for _ in range(3)]
q, k, v = (xp.asarray(x) for x in host)

document = np.repeat(np.arange(5), [200, 17, 123, 250, 50]).astype(np.int32)
image = np.repeat([-1, 0, -1, 1, -1], [100, 128, 60, 256, 96]).astype(np.int32)
parent = [0, 0, 0, 1, 1, 2, 2]  # of each branch of a tree of seven, with the root its own
ancestor = np.eye(7, dtype=np.int32)
for branch in range(1, 7):
    ancestor[branch] |= ancestor[parent[branch]]
branch_of = (np.arange(S) * 7 // S).astype(np.int32)

# Each rule twice: as a kernel takes it, and as NumPy does.
PATTERNS = {
    "causal": ("q_idx >= kv_idx", lambda i, j: i >= j),
    "documents, causal": (
        "document[q_idx] == document[kv_idx] && q_idx >= kv_idx",
        lambda i, j: (document[i] == document[j]) & (i >= j),
    ),
    "documents of any length": (
        "document[q_idx] == document[kv_idx]",
        lambda i, j: document[i] == document[j],
    ),
    "prefix LM": ("kv_idx < 150 || q_idx >= kv_idx", lambda i, j: (j < 150) | (i >= j)),
    "sliding window, sinks": (
        "q_idx >= kv_idx && (q_idx - kv_idx < 128 || kv_idx < 4)",
        lambda i, j: (i >= j) & ((i - j < 128) | (j < 4)),
    ),
    "dilated": (
        "q_idx >= kv_idx && q_idx - kv_idx < 256 && (q_idx - kv_idx) % 2 == 0",
        lambda i, j: (i >= j) & (i - j < 256) & ((i - j) % 2 == 0),
    ),
    "text and images (Transfusion)": (
        "q_idx >= kv_idx || (image[q_idx] >= 0 && image[q_idx] == image[kv_idx])",
        lambda i, j: (i >= j) | ((image[i] >= 0) & (image[i] == image[j])),
    ),
    "tree": (
        "ancestor[branch_of[q_idx] * 7 + branch_of[kv_idx]] && q_idx >= kv_idx",
        lambda i, j: (ancestor[branch_of[i], branch_of[j]] != 0) & (i >= j),
    ),
}
ARRAYS = {"document": document, "image": image, "ancestor": ancestor, "branch_of": branch_of}


def check(name, made, dense):
    """Compare a call with the same attention in float64."""
    o = attention(q, k, v, block_mask=made)
    got = o if xp is np else o.get()
    expected, _ = reference.oracle(*host, mask=dense)
    outcome = reference.compare(got, expected, reference.naive(*host, mask=dense))
    print(f"{name:30} {made.density:4.0%} computed, max error {outcome.max_error:.1e}")
    assert outcome.ok, outcome.reason


i, j = np.ogrid[:S, :S]
for name, (cuda, rule) in PATTERNS.items():
    used = {key: xp.asarray(x) for key, x in ARRAYS.items() if key in cuda}

    def on_blocks(b, h, q_idx, kv_idx, rule=rule, **_):
        """Ask the rule, as NumPy's way takes it."""
        return rule(q_idx, kv_idx)

    made = block_mask(
        on_blocks if xp is np else cuda, seqlen_q=S, seqlen_kv=S, block=(64, 64), mod_args=used
    )
    check(name, made, np.broadcast_to(rule(i, j), (S, S)))
print(made)

# Blocks that a model has chosen: every listed one is full.
grid = rng.random((1, 4, S // 64, S // 64)) < 0.3
made = BlockMask.from_grid(xp.asarray(grid), seqlen_q=S, seqlen_kv=S, block=(64, 64))
check("random blocks", made, np.kron(grid, np.ones((64, 64), bool)))
