"""Small problems on small tiles, which come to every place of the kernels that can be broken."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from cases_emulator import launched, small
from places import unchecked_boundaries

from flashcore_cupy.check.selftest import gradients, matrix
from flashcore_cupy.check.selftest.arrays import Placed, set_up
from flashcore_cupy.check.selftest.case import Case, packed
from flashcore_cupy.check.selftest.outcome import CaseResult
from flashcore_cupy.cpu.emulator import build
from flashcore_cupy.cpu.emulator.backward import EmulatedBackward
from flashcore_cupy.cpu.emulator.plan import EmulatedPlan, bind
from flashcore_cupy.cpu.emulator.run import Schedule
from flashcore_cupy.problem.blocks import Array
from flashcore_cupy.problem.request import Request


@dataclass(frozen=True)
class Trial:
    """A case on a tile of its own, on a GPU of so many multiprocessors."""

    name: str
    arch: str
    case: Case
    tile: dict[str, Any] = field(default_factory=dict, hash=False)
    multiprocessors: int = 16
    unseen: tuple[slice, ...] = ()
    """Keys that no query sees: theirs is NaN."""
    unseen_queries: tuple[slice, ...] = ()
    """Queries that see no key, of a backward pass: theirs is NaN, too."""
    has_gaps: bool = False
    """Whether some rows of a packed batch lie before its sequences, and some behind."""
    has_infinity: bool = False
    """Whether the first value is infinite."""
    is_checked: bool = True
    """Whether it runs in the checking build, too."""

    def sources(self) -> list[build.Source]:
        """What its launches are compiled from."""
        plan, _ = self._bound()
        return [build.Source.of(step.config, self.arch) for step in plan.steps]

    def libraries(self, *, checking: bool) -> list[ctypes.CDLL]:
        """What it runs, compiled."""
        return [build.library(source, checking=checking) for source in self.sources()]

    def run(self, schedule: Schedule, *, checking: bool) -> CaseResult:
        """Launch it, and judge what comes of it."""
        plan, judge = self._bound()
        plan.launch(schedule, checking=checking)
        return judge()

    def _bound(self) -> tuple[EmulatedPlan | EmulatedBackward, Callable[[], CaseResult]]:
        """Its plan, and what judges a launch of it."""
        return self._backward() if self.case.is_backward else self._forward()

    def _forward(self) -> tuple[EmulatedPlan, Callable[[], CaseResult]]:
        case, setup = self.case, set_up(self.case)
        placed = Placed.of(case, setup, on_gpu=False, in_kernel=True)
        _hide(self.unseen, *setup.host[1:], *placed.inputs[1:])
        if self.has_infinity:
            setup.host[2][0, 0, 0, 0] = placed.inputs[2][0, 0, 0, 0] = np.inf
        wanted = {"kernel": case.kernel, "config": self.tile}
        call = Request.of(placed.arguments | wanted).call(*placed.inputs, placed.out, on_gpu=False)
        want_lse = case.gate is None
        plan = bind(call, self.arch, want_lse=want_lse, multiprocessors=self.multiprocessors)
        if self.has_gaps:  # as boundaries on a GPU may be, of which nobody knows
            case = _Gapped(**vars(case))
            arrays = case.rule_arrays()
            plan.arrays["cu_seqlens_q"][...] = arrays["cu_seqlens_q"]
            plan.arrays["cu_seqlens_kv"][...] = arrays["cu_seqlens_k"]

        def judge() -> CaseResult:
            done = launched(self.case, setup, placed, plan)
            if "counters" in plan.arrays and plan.arrays["counters"].any():
                done = replace(done, faults=(*done.faults, "left a counter that is not 0"))
            return matrix.judge(case, setup.host, done)

        return plan, judge

    def _backward(self) -> tuple[EmulatedBackward, Callable[[], CaseResult]]:
        case = _Gapped(**vars(self.case)) if self.has_gaps else self.case
        with unchecked_boundaries():
            setup = gradients.lay_out(case)
            placed = gradients.PlacedGradients.of(case, setup, on_gpu=False)
            _hide(self.unseen, *(placed.arguments[name] for name in "kv"))
            _hide(self.unseen_queries, *(placed.arguments[name] for name in ("q", "do")))
            plan = gradients.bind_emulated(placed.arguments | {"config": self.tile}, self.arch)

        def judge() -> CaseResult:
            written = gradients.written(plan, case)
            return gradients.judge(case, setup, written, placed.faults(setup))

        return plan, judge


def _hide(unseen: Iterable[slice], *arrays: Array) -> None:
    for rows in unseen:
        for x in arrays:
            x[rows if x.ndim == 3 else (..., rows, slice(None))] = np.nan


class _Gapped(Case):
    def rule_arrays(self) -> dict[str, Array]:
        arrays = super().rule_arrays()
        for name, total in (("cu_seqlens_q", self.seqlen_q), ("cu_seqlens_k", self.seqlen_kv)):
            arrays[name] = np.clip(arrays[name], _GAP, total - _GAP)
        return arrays


def _trial(kernel: str, name: str, arch: str, tile: dict[str, Any], rest: dict[str, Any]) -> Trial:
    own = {key: rest.pop(key) for key in [*rest] if key in _OWN}
    lengths = rest.pop("lengths", ())
    case = small(kernel, **rest)
    title = ", ".join(filter(None, (kernel, name)))
    return Trial(title, arch, packed(case, lengths) if lengths else case, tile, **own)


def _sm80(name: str, tile: dict[str, Any], **rest: Any) -> Trial:
    return _trial("mma_sm80", name, "sm_80", tile, rest)


def _sm90(name: str, tile: dict[str, Any], **rest: Any) -> Trial:
    return _trial("wgmma_sm90", name, "sm_90a", tile, rest)


def _cluster(name: str, tile: dict[str, Any], **rest: Any) -> Trial:
    return _trial("cluster_sm90", name, "sm_90a", tile, rest)


def _bwd80(name: str, tile: dict[str, Any], **rest: Any) -> Trial:
    return _trial("bwd_sm80", name, "sm_80", tile, rest)


def _bwd90(name: str, tile: dict[str, Any], **rest: Any) -> Trial:
    return _trial("bwd_sm90", name, "sm_90a", tile, rest)


def _bwd_wide(name: str, tile: dict[str, Any], **rest: Any) -> Trial:
    return _trial("bwd_sm90_wide", name, "sm_90a", tile, rest)


def _ladder(kernel: str, name: str = "", /, **rest: Any) -> Trial:
    return _trial(kernel, name, "sm_80", {}, rest)


_OWN = [one.name for one in fields(Trial)]
_GAP = 3
_TWO_STAGES = {"block_m": 32, "block_n": 32, "warps_m": 2, "warps_n": 1, "num_stages": 2}
_ONE_STAGE = _TWO_STAGES | {"num_stages": 1}
_ALONG_KEYS = {"block_m": 32, "block_n": 64, "warps_m": 1, "warps_n": 2, "num_stages": 2}
_ALONG_COLUMNS = {"block_m": 32, "block_n": 32, "warps_m": 1, "warps_d": 2, "num_stages": 1}
_MANY_THREADS = {"block_m": 128, "block_n": 16, "warps_m": 8, "num_stages": 1}
_DECODE = {"block_n": 64, "warps_n": 4}
_ONE = {"block_m": 64, "block_n": 32, "warps_m": 4, "num_stages": 2}
_TWO = {"block_m": 128, "block_n": 32, "warps_m": 8, "num_stages": 2}
_THREE = {"block_m": 192, "block_n": 32, "warps_m": 12, "num_stages": 2}
_SPLITS = _ONE | {"pack_gqa": True, "split_kv": True, "cluster": 1}
_CLUSTER = _SPLITS | {"block_n": 64, "num_stages": 3, "cluster": 2}  # partials take K's place
_PAIR = {"block_n": 32, "warps_n": 2, "cluster": 2, "num_stages": 1, "one_tile": False}
_GROUP = _PAIR | {"cluster": 1, "num_stages": 2}
_HEAD = {"heads": 1, "heads_kv": 1}
_WIDE = {"head_dim": 128, "head_dim_v": 128}
#: Narrower than their tiles; rows of the second are whole pieces of 16 bytes, as TMA wants them.
_ODD = {"head_dim": 40, "head_dim_v": 72}
_72 = {"head_dim": 72, "head_dim_v": 72}
_LARGE = {"kind": "large", "softmax_scale": 1e3}
_FAR = _LARGE | {"causal": True, "seqlen_q": 39, "seqlen_kv": 41}
#: Four lanes store the maximum of a row that is computed again, which the main loop has stored: in
#: the checking build that is a race, with nothing broken.
_GATED = _LARGE | {"seqlen_q": 40, "seqlen_kv": 75, "is_checked": False}
_LENGTHS = ((0, 5), (33, 0), (40, 70), (1, 1), (0, 0), (20, 90))
_PACKED = {"lengths": _LENGTHS, "causal": "top-left", "alibi": "bh", "multiprocessors": 1}
_UNSEEN = {"unseen": (slice(0, 5), slice(45, 75), slice(96, 166))}
#: Boxes of the first sequence's keys reach into the second's, of which no query sees these.
_FIRST_ROWS = {
    "lengths": ((5, 3), (7, 90), (40, 33)),
    "causal": "top-left",
    "multiprocessors": 1,
    "unseen": (slice(10, 93),),
}
_PACKED_WINDOW = {
    "lengths": ((40, 130), (20, 90)),
    "window": (33, 7),
    "multiprocessors": 1,
    "unseen": (slice(57), slice(130, 167)),
}
_WINDOW = {"window": (33, 7), "seqlen_q": 40, "seqlen_kv": 130, "unseen": (slice(57),)}
_IN_TILES = {"causal": True, "seqlen_q": 128}
_NO_QUERIES = {"causal": "top-left", "seqlen_q": 40, "seqlen_kv": 200}
_NO_KEYS = {"window": (33, 7), "causal": "top-left", "seqlen_q": 150, "seqlen_kv": 64}
_MASKS = {"mask": "qk", "mask_mod": "blocks", "window": (100, -1)}
#: With blocks of 64 queries, the first keys, or the last ones, are hidden from a whole block.
_BROADCAST = {"mask": "b11k", "mask_mod": "blocks", "seqlen_q": 100, "seqlen_kv": 96}
#: Some keys are in no block that is listed, but in tiles that are.
_LISTED = {
    "block_mask": "64x64 11",
    "mask_mod": "thirds",
    "seqlen_q": 150,
    "seqlen_kv": 300,
    "seed": 19,
    "unseen": (slice(64, 128), slice(192, 256)),
}
#: Only one of two consumers has blocks, in one tile after the other; and blocks of rows follow.
_LISTED_ALONE = {
    **{"block_mask": "64x64 11", "mask_mod": "thirds", "seqlen_q": 100, "seqlen_kv": 900},
    **{"heads": 4, "heads_kv": 4, "multiprocessors": 1},
}
#: So many blocks that each lane of tile_lists.cu has several.
_LISTED_LONG = {
    **{"block_mask": "64x64 11", "mask_mod": "thirds", "seqlen_q": 20, "seqlen_kv": 1500},
    "seed": 2,
}
#: More tiles than tile_lists.cu takes at a time.
_LISTED_FAR = {
    **{"block_mask": "64x64 11", "mask_mod": "thirds", "seqlen_q": 20, "seqlen_kv": 8300},
    "seed": 2,
}
#: Of each head by itself: blocks of keys of a group walk over several lists.
_LISTED_GRADIENTS = {
    **{"block_mask": "64x64 1h", "mask_mod": "thirds", "seqlen_q": 290, "seqlen_kv": 200},
    "seed": 3,
}
#: The last block of queries is whole: behind it are the lists of the next head, or nothing.
_LISTED_WHOLE = _LISTED_GRADIENTS | {"seqlen_q": 320}
#: More tiles of queries than are listed at a time.
_LISTED_FAR_QUERIES = {
    **{"block_mask": "64x64 11", "mask_mod": "thirds", "seqlen_q": 8300, "seqlen_kv": 40},
    "seed": 2,
}
_OWN_32 = {"block_m": 32, "block_n": 32, "warps_m": 2}
_OWN_32_ONE_STAGE = {"block_m": 32, "block_n": 16, "warps_m": 2, "num_stages": 1}
_OWN_128 = {"block_m": 128, "block_n": 64, "warps_m": 8, "num_stages": 2}
_OWN_128_ONE_STAGE = _OWN_128 | {"num_stages": 1}
_TWO_STAGES_64 = {"block_m": 64, "block_n": 64, "warps_m": 12, "num_stages": 2}
_ONE_STAGE_64 = _TWO_STAGES_64 | {"num_stages": 1}
_GROUPED = {"heads": 2, "heads_kv": 1}
_FREE = {"deterministic": False}
#: A sequence without keys, and one without queries, lie between others.
_NEIGHBOURS = {
    "lengths": ((40, 130), (33, 0), (20, 90), (0, 40), (100, 150)),
    "causal": "top-left",
    "unseen": (slice(40, 130), slice(150, 260), slice(360, 410)),
    "unseen_queries": (slice(40, 73),),
}
_MORE_QUERIES = {
    "lengths": ((250, 60), (33, 0), (20, 190)),
    "causal": True,
    "unseen_queries": (slice(0, 190), slice(250, 283)),
}
#: Of 128 keys half are hidden from all 64 queries of a tile; of 128 queries, half from all keys.
_HIDDEN = {
    "mask_mod": "blocks",
    "seqlen_q": 50,
    "seqlen_kv": 250,
    "unseen": (slice(64, 128), slice(192, 250)),
}
_HIDDEN_QUERIES = {
    "mask_mod": "blocks",
    "seqlen_q": 150,
    "seqlen_kv": 50,
    "unseen_queries": (slice(64, 128),),
}
_DROPS = {"dropout_p": 0.3}
#: A number is that at which they are no longer dropped.
_DROPPED = _DROPS | {"seed": 1, "seqlen_q": 150, "seqlen_kv": 170}
_200 = {"head_dim": 200, "head_dim_v": 136}
_40 = {"head_dim": 40, "head_dim_v": 56}
_192 = {"head_dim": 192, "head_dim_v": 192}
_96 = {"head_dim": 96, "head_dim_v": 96}
_BOTH_SIDES = {"window": (33, 7), "seqlen_q": 90, "seqlen_kv": 130}
_FEW = {"heads": 8, "seqlen_q": 3, "alibi": "h"} | _ODD
_SHARED_KV = {"heads": 4, "heads_kv": 1}

#: From those that find most to those that find one thing.
TRIALS = (
    # fwd_sm80.cu
    _sm80("two stages", _TWO_STAGES, causal=True, seqlen_q=170, seqlen_kv=130, **_HEAD),
    _sm80("along columns", _ALONG_COLUMNS, mask="qk", seqlen_q=40, **_HEAD, **_WIDE),
    _sm80("decode", _DECODE, seqlen_kv=500, **_FEW),
    _sm80("one stage", _ONE_STAGE, view="strided", **_WINDOW, **_ODD),
    _sm80("along keys", _ALONG_KEYS, mask_mod="blocks", window=(150, -1), seqlen_kv=250, **_HEAD),
    _sm80("packed", _TWO_STAGES, **_PACKED, **_UNSEEN),
    _sm80("packed, gaps", _TWO_STAGES, has_gaps=True, **_PACKED),
    _sm80("far scores", _ALONG_COLUMNS, **_FAR, **_HEAD, head_dim=120, head_dim_v=120),
    _sm80("decode, one split", _DECODE, seqlen_kv=20, **_FEW),
    _sm80("decode, eight rows", _DECODE, seqlen_q=2, seqlen_kv=300, **_SHARED_KV),
    _sm80("far scores, splits", _DECODE, seqlen_q=3, seqlen_kv=300, **_LARGE, **_SHARED_KV),
    _sm80("far scores, window", _ONE_STAGE, window=(9, 0), seqlen_kv=77, **_LARGE, **_HEAD),
    _sm80("far scores, gate", _TWO_STAGES, gate="softmax", **_GATED, **_HEAD),
    _sm80("gate", _TWO_STAGES, gate="softmax", seqlen_kv=75, **_HEAD),
    _sm80("blocks", _ONE_STAGE, mask_mod="blocks", seqlen_kv=250, **_HEAD),
    _sm80("listed", _TWO_STAGES | {"block_n": 128}, **_LISTED, **_HEAD),
    _sm80("listed, many", _ONE_STAGE, **_LISTED_LONG, **_HEAD),
    _sm80("listed, far", _ONE_STAGE | {"block_n": 16}, **_LISTED_FAR, **_HEAD),
    _sm80("many threads", _MANY_THREADS, seqlen_kv=50, softcap=1000.0, **_HEAD),
    _sm80("misaligned", _ONE_STAGE, view="misaligned", bias="qk", softcap=5.0, **_HEAD),
    _sm80("float32", {"block_m": 32, "warps_m": 2}, dtype="float32", gate="qk", **_HEAD),
    # fwd_sm90.cu
    _sm90("two consumers", _TWO, causal=True, seqlen_q=150, seqlen_kv=170, **_HEAD),
    _sm90("masks", _TWO, seqlen_q=150, seqlen_kv=304, multiprocessors=1, **_MASKS),
    _sm90("scheduler", _ONE, multiprocessors=2, heads=12, seqlen_q=40, causal=True),
    _sm90("packed", _ONE, **_PACKED, **_UNSEEN, **_72),
    _sm90("packed, gaps", _ONE, has_gaps=True, **_PACKED, **_72),
    _sm90("splits", _SPLITS, heads=8, seqlen_q=3, seqlen_kv=600, **_72),
    _sm90("cluster", _CLUSTER, heads=8, seqlen_q=3, seqlen_kv=600),
    _sm90("short blocks", _ONE | {"num_stages": 4}, multiprocessors=2, heads=12, seqlen_kv=20),
    _sm90("three consumers", _THREE, causal=True, seqlen_q=200, seqlen_kv=230, **_HEAD),
    _sm90("rows of one consumer", _TWO, multiprocessors=1, heads=4, heads_kv=4, seqlen_q=40),
    _sm90("no keys", _TWO, multiprocessors=1, heads=3, heads_kv=1, **_NO_KEYS),
    _sm90("far scores", _ONE, **_FAR, **_HEAD, **_72),
    _sm90("far scores, splits", _SPLITS, seqlen_q=3, seqlen_kv=400, **_LARGE, **_SHARED_KV),
    _sm90("far scores, gate", _ONE, gate="softmax", **_GATED, **_HEAD),
    _sm90("gate", _ONE, gate="softmax", seqlen_kv=75, **_HEAD),
    _sm90("broadcast mask", _ONE, **_BROADCAST),
    _sm90("128 keys", _ONE | {"block_n": 128}, mask_mod="thirds", **_HEAD),
    _sm90("packed, two consumers", _TWO, **_PACKED, **_UNSEEN),
    _sm90("packed, first rows", _ONE, **_FIRST_ROWS, **_HEAD),
    _sm90("packed, window", _ONE, **_PACKED_WINDOW, **_HEAD),
    _sm90("dropout", _ONE, **_DROPPED),
    _sm90("listed", _TWO | {"block_n": 128}, **_LISTED, **_HEAD),
    _sm90("listed, many", _TWO | {"block_n": 64}, **_LISTED_ALONE),
    _sm90("listed, turns", _THREE | {"block_n": 64}, **_LISTED_ALONE),
    _sm90("listed, no turns", _TWO | {"block_n": 64}, **_LISTED_ALONE, **_192),
    _sm90("listed, causal", _TWO | {"block_n": 64}, causal=True, **_LISTED, **_HEAD),
    # fwd_sm90_cluster.cu
    _cluster("two CTAs", _PAIR, causal=True, seqlen_kv=300, **_HEAD, head_dim=64, head_dim_v=72),
    _cluster("masks", _GROUP, seqlen_kv=304, **_MASKS, **_HEAD),
    _cluster("far scores", _PAIR, **(_FAR | {"seqlen_kv": 141}), **_HEAD, head_dim_v=56, seed=6),
    _cluster("broadcast mask", _GROUP, **_BROADCAST),
    _cluster(
        "128 keys",
        _PAIR | {"block_n": 128, "warps_n": 1, "one_tile": True},
        mask_mod="thirds",
        seqlen_kv=250,
        **_HEAD,
    ),
    # ladder/
    _ladder("scalar", causal=True, gate="qk", **_ODD, **_HEAD),
    _ladder("scalar", "output", causal=True, **_ODD),
    _ladder("wmma_fused_32", causal=True, head_dim=80, head_dim_v=72, **_HEAD),
    _ladder("wmma_cp_async", causal="top-left", seqlen_kv=300, head_dim=40, **_HEAD),
    _ladder("wmma_cp_async", "no keys", causal=True, seqlen_q=150, seqlen_kv=40, **_HEAD),
    _ladder("wmma_warp_softmax", causal=True, seqlen_kv=200),
    _ladder("wmma_warp_softmax", "one tile", seqlen_kv=40, **_HEAD),
    _ladder("fp8_wmma", causal="top-left", seqlen_kv=200, **_ODD),
    _ladder("fp8_wmma", "infinity", has_infinity=True, **_HEAD),
    _ladder("wmma_unfused", causal=True, seqlen_q=150, seqlen_kv=150, **_HEAD, **_ODD),
    _ladder("wmma_unfused", "no keys", causal=True, seqlen_q=150, seqlen_kv=20, **_HEAD),
    _ladder("wmma_unfused", "softmax", gate="softmax", **_HEAD),
    # bwd_sm80.cu, and what is launched with it
    _bwd80("two stages", _OWN_32, causal=True, seqlen_q=90, seqlen_kv=70, dlse=True, **_GROUPED),
    _bwd80("one stage", _OWN_32_ONE_STAGE, view="strided", **_WINDOW, **_ODD),
    _bwd80("packed", _OWN_32, **_PACKED, **_UNSEEN),
    _bwd80("masks", _OWN_32, mask="qk", mask_mod="blocks", **_BOTH_SIDES, **_HEAD),
    _bwd80("bias", _OWN_32, bias="bhqk", batch=2, **_BOTH_SIDES, **_96),
    _bwd80("bias of keys", _OWN_32, bias="1h1k", batch=2, causal=True, seqlen_q=100, **_96),
    _bwd80("bias of queries", _OWN_32, bias="b1q1", batch=2, softcap=5.0, **_DROPS),
    _bwd80("packed, gaps", _OWN_32, has_gaps=True, sink=True, **_PACKED, **_DROPS),
    _bwd80("dropout", _OWN_32, stored="fp32", **_DROPS, **_BOTH_SIDES, **_HEAD, **_ODD),
    _bwd80("blocks of columns", _OWN_32_ONE_STAGE, **_HEAD, head_dim=256, head_dim_v=256),
    _bwd80("misaligned", _OWN_32_ONE_STAGE, view="misaligned", causal=True, **_HEAD),
    _bwd80("float32", _OWN_32_ONE_STAGE, dtype="float32", **_DROPS, **_HEAD),
    _bwd80("slopes, sink", _OWN_32, alibi="bh", sink=True, batch=2, causal=True, **_GROUPED),
    _bwd80("score_mod", _OWN_32, score_mod="table", **_HEAD),
    _bwd80("gate", _OWN_32, gate="ds", only="k", causal=True, **_HEAD),
    _bwd80("lists", _OWN_32, **_LISTED_GRADIENTS, **_GROUPED),
    _bwd80("lists, positions", _OWN_32_ONE_STAGE, **_LISTED_WHOLE, causal=True, **_HEAD),
    _bwd80("lists, bias", _OWN_32, **_LISTED_GRADIENTS, bias="1h1k", only="bias", **_GROUPED),
    _bwd80("lists, far", _OWN_32_ONE_STAGE, **_LISTED_FAR_QUERIES, **_HEAD),
    # bwd_sm90.cu, and what is launched with it; whoever waits for a turn that never comes does not
    # end, so what has turns comes later
    _bwd90("any order", _OWN_128, causal=True, seqlen_q=128, dlse=True, **_GROUPED, **_FREE, **_40),
    _bwd90("turns", _OWN_128, causal=True, seqlen_q=150, seqlen_kv=214, **_GROUPED),
    _bwd90("two units", _OWN_128, **_WIDE, **_DROPPED, **_HEAD),
    _bwd90("two passes", _OWN_128, stored="fp32", dlse=True, **_BOTH_SIDES, **_72, **_GROUPED),
    _bwd90("one stage", _OWN_128_ONE_STAGE, causal=True, seqlen_q=300, seqlen_kv=320, **_HEAD),
    _bwd90("slopes, sink", _OWN_128, alibi="h", sink=True, batch=2, causal=True, **_GROUPED),
    _bwd90("no keys", _OWN_128, **_NO_KEYS, **_GROUPED),
    _bwd90("bias", _OWN_128, bias="qk", only="k", **_DROPS, **_BOTH_SIDES, **_96),
    _bwd90("gate", _OWN_128, gate="ds", only="k", causal=True, **_HEAD),
    _bwd90("masks, any order", _OWN_128, **_HIDDEN, **_FREE, **_HEAD),
    _bwd90("masks, queries", _OWN_128, **_HIDDEN_QUERIES, **_FREE, **_HEAD, **_40),
    _bwd90("masks", _OWN_128, mask="qk", **_BOTH_SIDES, **_GROUPED),
    _bwd90("masks, two passes", _OWN_128, **_HIDDEN, **_HEAD, **_96),
    _bwd90("lists", _OWN_128, **_LISTED_GRADIENTS, **_GROUPED),
    _bwd90("lists, unseen", _OWN_128, **_LISTED, unseen_queries=(slice(0, 64),), **_HEAD),
    _bwd90("lists, positions", _OWN_128, **_LISTED_WHOLE, causal=True, **_HEAD),
    _bwd90("packed, any order", _OWN_128, **_NEIGHBOURS, **_FREE, **_HEAD),
    _bwd90("packed, two passes", _OWN_128, **_NEIGHBOURS, **_GROUPED, **_96),
    _bwd90("packed, more queries", _OWN_128, **_MORE_QUERIES, **_HEAD),
    _bwd90("packed, slopes", _OWN_128, **_PACKED, **_UNSEEN),
    _bwd90("packed, gaps", _OWN_128, has_gaps=True, **(_PACKED | {"alibi": ""}), **_WIDE),
    # bwd_sm90_wide.cu
    _bwd_wide("any order", _TWO_STAGES_64, **_IN_TILES, dlse=True, **_GROUPED, **_FREE, **_200),
    _bwd_wide("turns", _TWO_STAGES_64, causal=True, seqlen_q=129, seqlen_kv=193, **_GROUPED),
    _bwd_wide("far keys", _TWO_STAGES_64, stored="fp32", **_WINDOW, **_HEAD, **_200),
    _bwd_wide("one stage", _ONE_STAGE_64, seqlen_q=300, seqlen_kv=150, **_HEAD),
    _bwd_wide("keys alone", _TWO_STAGES_64, only="k", dlse=True, **_BOTH_SIDES, **_GROUPED),
    _bwd_wide("no keys", _TWO_STAGES_64, **_NO_KEYS, **_GROUPED),
    _bwd_wide("no queries", _TWO_STAGES_64, **_NO_QUERIES, **_FREE, **_HEAD),
    _bwd_wide("gate", _TWO_STAGES_64, gate="ds", only="k", causal=True, **_HEAD),
)

#: What nothing finds, and why. After a kernel's name: in that kernel alone.
_LIVE: dict[str, tuple[str, ...]] = {
    # Barriers.
    "unnecessary: something else orders the same": (
        "ladder/wmma_tile.cuh: warp_sync() #2",
        "bwd_sm90.cu: state.wait_full(smem.vo) #2",
        "bwd_sm90_wide.cu: state.wait_full(smem.qk) #2",
        "sm90_wide_backward/dq.cuh: mbarrier_wait(&smem.full_own, 0)",
    ),
    "for a warp that pauses while all others go round the stages, which none does here": (
        "sm90_backward/producer.cuh: state.wait_empty(smem.vo)",
    ),
    "for a block that is cut in two by the end of the tiles that are taken at a time": (
        "tile_lists.cu: const int last = min(last_row / other.tile, end - 1); [0 for 1 in - 1]",
    ),
    "behind a shuffle, or before an election, which orders memory as well in the emulator, but not "
    "on a GPU": (
        "sm90_backward/producer.cuh: warp_sync()",
        "sm90/producer.cuh: warp_sync()",
        "tile_lists.cu: warp_sync() #4",
    ),
    "for a consumer that is two tiles ahead of another one, which no schedule brings about": (
        "sm90/listed_tiles.cuh: await_published() #2",
    ),
    "for launches that overlap, which those of the emulator do not": (
        "fwd_sm90_cluster.cu: griddepcontrol_wait()",
    ),
    "a pace, no order: how far ahead a CTA claims blocks": (
        "flashcore/scheduler/tile_scheduler.cuh: "
        "mbarrier_wait(&loaded[state.stage], state.parity ^ 1)",
        "flashcore/scheduler/tile_scheduler.cuh: queue.wait_loaded(loaded)",
    ),
    # Bounds.
    "one row more decides which tiles a block visits: the mask hides what is too much": (
        "backward/work.cuh: const int last = min(w.first_row + BLOCK_M, length) - 1; "
        "[0 for 1 in - 1]",
        "bwd_sm90.cu: const RowRange met = rows_met(work, mask(), first, "
        "min(first + ROWS, rows) - 1); [0 for 1 in - 1]",
        "flashcore/scheduler/work.cuh: "
        "return min(query_of<PACK_GQA>(w, end - 1), w.seqlen_q - 1); [0 for 1 in - 1]",
        "flashcore/scheduler/work.cuh: "
        "return min(query_of<PACK_GQA>(w, end - 1), w.seqlen_q - 1); [0 for 1 in - 1] #2",
        "ladder/scalar.cu: const int kv_end = mask.row_end("
        "min(block_first + BLOCK_M, params.seqlen_q) - 1); [0 for 1 in - 1]",
        "ladder/wmma_fused.cu: const int kv_end = c.mask.row_end("
        "min(c.first_query + BLOCK_M, p.seqlen_q) - 1); [0 for 1 in - 1]",
        "ladder/wmma_unfused.cu: const int last_query = "
        "min(first_query + BLOCK_M, p.seqlen_q) - 1; [0 for 1 in - 1]",
    ),
    "keys or queries more, which the mask hides": (
        "tile_lists.cu: last_own = min(first_own + own.tile, own.length) - 1; [0 for 1 in - 1]",
        "backward/work.cuh: if (rows.begin >= rows.end) tiles = {0, 0}; [> for >=]",
        "bwd_sm90.cu: return first < rows && tile * BLOCK_N < met.end && "
        "(tile + 1) * BLOCK_N > met.begin; [<= for <] #2",
        "bwd_sm90.cu: return first < rows && tile * BLOCK_N < met.end && "
        "(tile + 1) * BLOCK_N > met.begin; [>= for >]",
        "ladder/scalar.cu: for (int tile_n = 0; tile_n < div_up(kv_end, BLOCK_N); ++tile_n) { "
        "[<= for <]",
        "wmma_fused_32, ladder/wmma_fused.cu: for (int tile = 0; tile < num_tiles; ++tile) { "
        "[<= for <]",
        "sm90_cluster/warpgroup.cuh: return !(ONE_TILE && nth > 0) && tile(nth) < tiles.end; "
        "[<= for <]",
        "cluster_sm90, flashcore/softmax/exact_row.cuh: "
        "for (int key = keys.begin; key < keys.end; key += 2) { [<= for <] #2",
    ),
    "a maximum over keys more: it cancels": (
        "flashcore/softmax/exact_row.cuh: "
        "for (int key = keys.begin; key < keys.end; key += 2) { [<= for <]",
    ),
    "the way with masks, or with missing rows, where the other one would do": (
        "tile_lists.cu: const int blocks = ((end - 1) >> other.shift) - "
        "first_block(tile) + 1; [0 for 1 in - 1]",
        "tile_lists.cu: const int last_row = first_row + (1 << own.shift) - 1; [0 for 1 in - 1]",
        "tile_lists.cu: return OWNS_KEYS ? mask.needs_mask(first, end - 1, first_row, "
        "last_row + 1) [0 for 1 in - 1]",
        "backward/work.cuh: return end_query > w.seqlen_q || [>= for >]",
        "backward/work.cuh: c.mask().needs_mask(first_query, end_query - 1, first_key, end_key); "
        "[0 for 1 in - 1]",
        "flashcore/rules/position_mask.cuh: return end_key > row_end(first_query) || "
        "(LEFT && first_key < row_begin(last_query)); [>= for >]",
        "flashcore/rules/position_mask.cuh: return end_key > row_end(first_query) || "
        "(LEFT && first_key < row_begin(last_query)); [<= for <]",
        "flashcore/rules/key_bits.cuh: for (int n = w * 16; n < min(w * 16 + 16, PAIRS); ++n) "
        "[<= for <]",
        "flashcore/rules/listed_tiles.cuh: for (int c = 0; c < MOST_BLOCKS; ++c) { [<= for <]",
        "flashcore/rules/listed_tiles.cuh: if (end <= 0 || begin > 8 * PAIRS - 7) continue; "
        "[< for <=]",
        "flashcore/rules/listed_tiles.cuh: if (end <= 0 || begin > 8 * PAIRS - 7) continue; "
        "[>= for >]",
        "flashcore/tile/tile_copy.cuh: if (first_valid <= 0 && end_valid >= ROWS) { [< for <=]",
        "flashcore/tile/tile_copy.cuh: if (first_valid <= 0 && end_valid >= ROWS) { [> for >=]",
        "sm80/producer.cuh: return tile >= tiles.end || (BOUNDED_LEFT && tile < tiles.begin); "
        "[<= for <]",
        "sm90/unseen_keys.cuh: if (begin <= 0 && end >= BLOCK_N) return; [< for <=]",
        "sm90/unseen_keys.cuh: if (begin <= 0 && end >= BLOCK_N) return; [> for >=]",
        "sm90_backward/unseen_rows.cuh: if (begin <= 0 && end >= BLOCK_N) return; [< for <=]",
        "sm90_backward/unseen_rows.cuh: if (begin <= 0 && end >= BLOCK_N) return; [> for >=]",
        "sm90_backward/unseen_rows.cuh: for (int n = first; n < min(first + 16, TILES_N); ++n) { "
        "[<= for <]",
        "ladder/scalar.cu: if (mask.needs_mask(block_first, block_first + BLOCK_M - 1, first_key, "
        "[0 for 1 in - 1]",
        "ladder/wmma_fused.cu: if (c.mask.needs_mask(c.first_query, c.first_query + BLOCK_M - 1, "
        "tile * BLOCK_N, [0 for 1 in - 1]",
    ),
    "work for rows that do not exist, whose result nobody takes": (
        "backward/context.cuh: if (own >= work.seqlen_kv) return {0, 0}; [> for >=]",
        "bwd_sm90, backward/context.cuh: if (own >= work.seqlen_q) return {0, 0}; [> for >=]",
        "backward/differentiate.cuh: seen = seen && x.query < c.work.seqlen_q && [<= for <]",
        "bwd_sm90.cu: if (nth < walk.count()) look_up_rows(*this, walk[nth], visible[0]); "
        "[<= for <]",
        "sm90_backward/unseen_rows.cuh: seen = seen && x.query < c.work.seqlen_q && "
        "c.mask().visible(x.query, x.key); [<= for <]",
        "backward/work.cuh: return block >= 0 && w.first_row < w.seqlen_kv; [<= for <]",
        "bwd_sm80_bias.cu: if (c.first_row > 0 || c.lane >= QUAD) return; [> for >=]",
        "bwd_sm90.cu: return first < rows && tile * BLOCK_N < met.end && "
        "(tile + 1) * BLOCK_N > met.begin; [<= for <]",
        "flashcore/scheduler/work.cuh: return w.first_row < w.seqlen_q * w.group; [<= for <]",
        "flashcore/softmax/warp_rows.cuh: if (m * 16 + half * 8 >= end) continue; [> for >=]",
        "sm90/traits.cuh: if (w.first_row + first_row >= rows_of(w)) return {0, 0}; [> for >=]",
        "ladder/wmma_unfused.cu: if (first_key >= keys_read(params, first_query)) return; "
        "[> for >=]",
    ),
    "a copy more, which nobody reads": (
        "ladder/wmma_fused.cu: if (num_tiles > 0) { [>= for >]",
        "wmma_cp_async, ladder/wmma_fused.cu: if (NUM_STAGES == 2 && tile + 1 < num_tiles) "
        "load_kv(c, tile + 1, stage ^ 1); [<= for <]",
        "wmma_cp_async, ladder/wmma_fused.cu: if (NUM_STAGES == 2 && tile + 1 < num_tiles) "
        "load_kv(c, tile + 1, stage ^ 1); [0 for 1 in + 1]",
        "fp8_wmma, ladder/wmma_fused.cu: if (NUM_STAGES == 2 && tile + 1 < num_tiles) "
        "load_kv(c, tile + 1, stage ^ 1); [<= for <]",
        "fp8_wmma, ladder/wmma_fused.cu: if (NUM_STAGES == 2 && tile + 1 < num_tiles) "
        "load_kv(c, tile + 1, stage ^ 1); [0 for 1 in + 1]",
        "ladder/wmma_unfused.cu: if (num_tiles > 0) load_pv(smem, params, gP, gV, 0); [>= for >]",
    ),
    "both ways give the same where both sides are equal": (
        "flashcore/rules/softcap.cuh: return fabsf(x) < 0.25f ? near : far; [<= for <]",
        "mma_sm80, flashcore/scheduler/work.cuh: if (splits > 1) { [>= for >]",
        "wgmma_sm90, flashcore/scheduler/work.cuh: if (splits > 1) { [>= for >]",
        "mma_sm80, flashcore/scheduler/work.cuh: "
        "return tiles.begin < tiles.end ? tiles : TileRange{0, 0}; [<= for <]",
        "cluster_sm90, flashcore/scheduler/work.cuh: "
        "return tiles.begin < tiles.end ? tiles : TileRange{0, 0}; [<= for <]",
        "flashcore/scheduler/work.cuh: if (LAST_FIRST && p.section > 1) [>= for >]",
        "flashcore/softmax/online_softmax.cuh: "
        "return !(fabsf(mul_rn(max, scale)) < LARGE_SHIFT) && max != NEG_INFINITY; [<= for <]",
        "flashcore/output/split_combine.cuh: if (i < count) max = fmaxf(max, state[i].x); "
        "[<= for <]",
        "flashcore/output/split_combine.cuh: "
        "for (int first = 0; first < params.splits; first += AT_A_TIME) [<= for <]",
        "fwd_sm90.cu: takes_turns = all.end - all.begin > SHORT_BLOCK; [>= for >]",
        "fwd_sm90_cluster.cu: const bool is_final = !has(nth + 1) && !has_far_rows(); "
        "[0 for 1 in + 1]",
        "ladder/fp8_quantize.cu: for (int64 i = thread_index(); i < pieces; i += NUM_THREADS) { "
        "[<= for <]",
        "ladder/fp8_quantize.cu: const bool scaled = max > SMALLEST_MAX; [>= for >]",
    ),
    "the order of blocks, all of which are worked on": (
        "flashcore/scheduler/packed_batch.cuh: const int bits = q.pieces() > MANY ? 4 : 1; "
        "[>= for >]",
        "flashcore/scheduler/work.cuh: if (p.section > 1 && blocks >= 40) "
        "section = max(section, div_up(8 * int(grid_size()), blocks)); [>= for >]",
        "flashcore/scheduler/work.cuh: if (p.section > 1 && blocks >= 40) "
        "section = max(section, div_up(8 * int(grid_size()), blocks)); [> for >=]",
    ),
    "for as many tiles as are listed at a time, 32768 queries or keys here": (
        "wgmma_sm90, tile_lists.cu: for (int i = lane(); i < end - begin; i += WARP_SIZE) "
        "[<= for <]",
        "bwd_sm90, tile_lists.cu: for (int i = lane(); i < end - begin; i += WARP_SIZE) [<= for <]",
    ),
    "a block that is mixed and full is taken as mixed, and a tile touches one": (
        "bwd_sm90, tile_lists.cu: const int blocks = ((end - 1) >> other.shift) - "
        "first_block(tile) + 1; [0 for 1 in + 1]",
        "bwd_sm80, tile_lists.cu: const int blocks = ((end - 1) >> other.shift) - "
        "first_block(tile) + 1; [0 for 1 in + 1]",
    ),
    "where the corner of a block is hidden, one score, and each of its rows meets others": (
        "tile_lists.cu: return OWNS_KEYS ? mask.needs_mask(first, end - 1, first_row, "
        "last_row + 1) [0 for 1 in + 1]",
    ),
    "threads without a part: most trials have none, and the others clear what is hidden": (
        "flashcore/rules/seen_keys.cuh: if (group >= GROUPS) continue; [> for >=]",
    ),
    "once more, and there is nothing": (
        "bwd_sm80_bias.cu: while (begin < end && states_of(c, begin) == 0) ++begin; [<= for <]",
        "tile_lists.cu: if (!OWNS_KEYS && (block < 0 || block >= other.end_block())) return; "
        "[> for >=]",
        "tile_lists.cu: for (int begin = first_tile; begin < end_tile; begin += TILES) { "
        "[<= for <]",
        "tile_lists.cu: for (int first = begin; first < end; first += WARP_SIZE) { [<= for <]",
        "flashcore/scheduler/packed_batch.cuh: if (group < q.pieces()) continue; [<= for <]",
        "sm90/unseen_keys.cuh: const int end = work_tile().start_kv + last < BLOCK_N "
        "? last - tile * BLOCK_N : BLOCK_N; [<= for <]",
    ),
    "both sides are never equal, or nobody asks for the result": (
        "flashcore/rules/seen_keys.cuh: for (int chunk = place % CHUNKS; chunk < CHUNKS; "
        "chunk += EIGHTHS) [<= for <]",
        "flashcore/softmax/online_softmax.cuh: "
        "return mul_rn(new_max, scale) - mul_rn(m, scale) <= MAX_ABOVE ? m : new_max; [< for <=]",
        "bwd_sm90, backward/context.cuh: return rows_met(c.work, c.mask(), 0, length - 1); "
        "[0 for 1 in - 1]",
        "bwd_sm90_wide, backward/context.cuh: return rows_met(c.work, c.mask(), 0, length - 1); "
        "[0 for 1 in - 1]",
        "sm80_backward/traits.cuh: return COLUMN_BLOCKS == 1 || first_col < dims; [<= for <]",
        "sm90_backward/turns.cuh: last < granted && "
        "mbarrier_test_wait(&smem.added[last % TURNS], last / TURNS % 2); [<= for <]",
        "wmma_cp_async, ladder/block_wide.cuh: if (d >= TILES_D) break; [> for >=]",
    ),
    "for boundaries that fall, which a test of its own has: with them it never ends": (
        "sm90_backward/turns.cuh: falls = falls || kv.boundary(n) > kv.boundary(n + 1); "
        "[0 for 1 in + 1]",
    ),
    "columns of padding": (
        "ladder/block_wide.cuh: for (int d = part; d < HEAD_DIM; d += THREADS_PER_ROW) [<= for <]",
    ),
}
KNOWN = {name: why for why, names in _LIVE.items() for name in names}
