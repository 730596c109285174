"""CUDA streams: what tells one from another."""

from __future__ import annotations

import threading


def stream_key() -> tuple[int, int, int]:
    """What tells the current stream from others: its GPU, its handle and, maybe, its thread."""
    import cupy

    stream = cupy.cuda.get_current_stream().ptr
    # The default stream of each thread is another one under the same handle.
    thread = threading.get_ident() if stream == cupy.cuda.runtime.streamPerThread else 0
    return cupy.cuda.runtime.getDevice(), stream, thread
