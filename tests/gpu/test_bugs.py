"""Each bug that is put back is noticed."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases_bugs import BUGS, Bug, on_gpu, put_back


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_the_bug_would_be_caught(bug: Bug, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in bug.kernels:
        assert not bug.is_wrong(on_gpu, kernel), f"{kernel} has it"
    put_back(bug, tmp_path, monkeypatch)
    for kernel in bug.kernels:
        assert bug.is_wrong(on_gpu, kernel), f"{kernel}: the bug was put back and not noticed"
