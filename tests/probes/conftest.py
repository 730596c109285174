"""The machines on which probes run."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import PROBES, gpu_skip_reason, one_at_a_time
from probe import CHECKED, Machine, Probe, Probes, library, machines, source, why_not

from flashcore_cupy.cuda.targets import HOPPER


@pytest.fixture(scope="session")
def emulated(request: pytest.FixtureRequest) -> None:
    """The libraries of this session's probes, built side by side."""
    tests = {item.path.stem.removeprefix("test_") for item in request.session.items}
    if why_not() is None:
        with one_at_a_time("probes"), ThreadPoolExecutor(os.cpu_count()) as pool:
            names = [path.stem for path in PROBES if path.stem in tests]
            wait = [pool.submit(library, source(name, HOPPER)) for name in names]
            checked = [source(name, HOPPER) for name in names if name in CHECKED]
            wait += [pool.submit(library, one, checking=True) for one in checked]
            for each in wait:
                each.result()


@pytest.fixture
def probe(request: pytest.FixtureRequest, emulated: None) -> Probes:
    """A probe by its name, on all machines that are here."""
    if gpu_skip_reason() is None:
        request.getfixturevalue("probe_folder")

    def of(name: str) -> Probe:
        here: dict[str, Machine] = machines(name)
        if not here:
            pytest.skip("needs a GPU that has its instructions, or a C++ compiler")
        return Probe(here)

    return of
