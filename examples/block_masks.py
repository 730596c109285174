"""Patterns that FlexAttention's examples have: as rules, and as block masks, each checked."""

import re

import numpy as np

from flashcore_cupy import BlockMask, attention, block_mask
from flashcore_cupy.cpu import reference

try:
    import cupy as xp

    xp.cuda.runtime.getDeviceCount()
except Exception as reason:
    print(f"no GPU ({type(reason).__name__}): NumPy arrays")
    xp = np

B, H, S = 2, 4, 384
rng = np.random.default_rng(0)
host = [rng.standard_normal((B, H, S, 64)).astype(np.float16) for _ in range(3)]
q, k, v = (xp.asarray(x) for x in host)

document = np.repeat(np.arange(5), [120, 17, 70, 147, 30])
# Jagged: each batch has documents of its own, and padding behind them, which is document -1.
jagged = np.repeat([0, 1, -1, 0, 1, 2, -1], [180, 90, 114, 50, 200, 120, 14])
in_prefix = np.repeat([1, 0, 1, 0, 1, 0], [20, 117, 30, 100, 40, 77])  # the first of some documents
image = np.repeat([-1, 0, -1, 1, -1], [60, 80, 40, 150, 54])  # -1 is text
parent = [0, 0, 0, 1, 1, 2, 2]  # of each branch of a tree of seven, with the root its own
ancestor = np.eye(7, dtype=np.int32)
for branch in range(1, 7):
    ancestor[branch] |= ancestor[parent[branch]]
branch_of = np.arange(S) * 7 // S
prefix = np.array([90, 240])  # of each batch
width = np.array([16, 32, 64, 128])  # of each head

# Each rule twice: as a kernel takes it, and as NumPy does. What asks for b or h has a list for each
# batch, or each head; all others share theirs.
PATTERNS = {
    "causal": ("q_idx >= kv_idx", lambda b, h, i, j: i >= j),
    "documents": (
        "document[q_idx] == document[kv_idx]",
        lambda b, h, i, j: document[i] == document[j],
    ),
    "documents, causal": (
        "document[q_idx] == document[kv_idx] && q_idx >= kv_idx",
        lambda b, h, i, j: (document[i] == document[j]) & (i >= j),
    ),
    "jagged documents": (
        "jagged[b * 384 + q_idx] == jagged[b * 384 + kv_idx] && jagged[b * 384 + q_idx] >= 0",
        lambda b, h, i, j: (jagged[b * S + i] == jagged[b * S + j]) & (jagged[b * S + i] >= 0),
    ),
    "prefix LM": (
        "kv_idx < prefix[b] || q_idx >= kv_idx",
        lambda b, h, i, j: (j < prefix[b]) | (i >= j),
    ),
    "prefix LM of each document": (
        "document[q_idx] == document[kv_idx] && (q_idx >= kv_idx || in_prefix[kv_idx])",
        lambda b, h, i, j: (document[i] == document[j]) & ((i >= j) | (in_prefix[j] != 0)),
    ),
    "sliding window": (
        "q_idx >= kv_idx && q_idx - kv_idx < 128",
        lambda b, h, i, j: (i >= j) & (i - j < 128),
    ),
    "sliding window, sink tokens": (
        "q_idx >= kv_idx && (q_idx - kv_idx < 128 || kv_idx < 4)",
        lambda b, h, i, j: (i >= j) & ((i - j < 128) | (j < 4)),
    ),
    "a window for each head": (
        "q_idx >= kv_idx && q_idx - kv_idx < width[h]",
        lambda b, h, i, j: (i >= j) & (i - j < width[h]),
    ),
    "global tokens, window": (
        "q_idx < 16 || kv_idx < 16 || abs(q_idx - kv_idx) < 32",
        lambda b, h, i, j: (i < 16) | (j < 16) | (abs(i - j) < 32),
    ),
    "dilated window": (
        "q_idx >= kv_idx && q_idx - kv_idx < 128 && (q_idx - kv_idx) % 2 == 0",
        lambda b, h, i, j: (i >= j) & (i - j < 128) & ((i - j) % 2 == 0),
    ),
    "neighbours on a grid of 16 x 24": (  # NATTEN, but for windows that move inwards at the rim
        "abs(q_idx / 24 - kv_idx / 24) <= 3 && abs(q_idx % 24 - kv_idx % 24) <= 3",
        lambda b, h, i, j: (abs(i // 24 - j // 24) <= 3) & (abs(i % 24 - j % 24) <= 3),
    ),
    "text and images (Transfusion)": (
        "q_idx >= kv_idx || (image[q_idx] >= 0 && image[q_idx] == image[kv_idx])",
        lambda b, h, i, j: (i >= j) | ((image[i] >= 0) & (image[i] == image[j])),
    ),
    "tree": (
        "ancestor[branch_of[q_idx] * 7 + branch_of[kv_idx]] && q_idx >= kv_idx",
        lambda b, h, i, j: (ancestor[branch_of[i], branch_of[j]] != 0) & (i >= j),
    ),
}
ARRAYS = {
    **{"document": document, "jagged": jagged, "image": image, "ancestor": ancestor},
    **{"branch_of": branch_of, "prefix": prefix, "width": width, "in_prefix": in_prefix},
}


def check(name, dense, *calls):
    """Compare calls with the same attention in float64; return the largest error."""
    expected, _ = reference.oracle(*host, mask=dense)
    naive = reference.naive(*host, mask=dense)
    errors = []
    for rules in calls:
        o = attention(q, k, v, **rules)
        outcome = reference.compare(o if xp is np else o.get(), expected, naive)
        assert outcome.ok, f"{name}: {outcome.reason}"
        errors.append(outcome.max_error)
    return max(errors)


b, h, i, j = np.ogrid[:B, :H, :S, :S]
for name, (cuda, rule) in PATTERNS.items():
    used = {key: xp.asarray(x, dtype=xp.int32) for key, x in ARRAYS.items() if key in cuda}

    def on_blocks(b, h, q_idx, kv_idx, rule=rule, **_):
        """Ask the rule, as NumPy's way takes it."""
        return rule(b, h, q_idx, kv_idx)

    dense = np.broadcast_to(rule(b, h, i, j), (B, H, S, S))
    sizes = {"seqlen_q": S, "seqlen_kv": S, "block": (64, 64)}
    sizes["batch"] = B if re.search(r"\bb\b", cuda) else 1
    sizes["heads"] = H if re.search(r"\bh\b", cuda) else 1
    mask_mod = on_blocks if xp is np else cuda
    made = block_mask(mask_mod, mod_args=used, **sizes)
    error = check(name, dense, {"mask_mod": mask_mod, "mod_args": used}, {"block_mask": made})
    print(f"{name:31} {made.density:4.0%} computed, max error {error:.1e}")
print(made)

# Blocks that a model has chosen, of each batch and head: every listed one is full.
grid = rng.random((B, H, S // 64, S // 64)) < 0.3
made = BlockMask.from_grid(xp.asarray(grid), seqlen_q=S, seqlen_kv=S, block=(64, 64))
error = check("random blocks", np.kron(grid, np.ones((64, 64), bool)), {"block_mask": made})
print(f"{'random blocks':31} {made.density:4.0%} computed, max error {error:.1e}")
