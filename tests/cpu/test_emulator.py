"""Kernels on NumPy arrays, as far as nothing is compiled: what is refused, and what is missing."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from typing import Any

import numpy as np
import pytest

from flashcore_cupy import attention, explain
from flashcore_cupy.attention import plan
from flashcore_cupy.cpu.emulator.build import cxx, why_not

Array = np.ndarray[Any, Any]


def ones(*shape: int, dtype: str = "float16") -> list[Array]:
    return [np.ones(shape or (1, 2, 8, 32), dtype) for _ in range(3)]


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


@pytest.mark.usefixtures("without_compiler")
def test_without_a_compiler_one_message_names_the_cure() -> None:
    with pytest.raises(RuntimeError) as caught:
        attention(*ones(), kernel="mma_sm80")
    assert str(caught.value) == (
        "there is no C++ compiler: pip install 'flashcore-cupy[emulator]', which brings one, "
        "or install g++"
    )
    # What launches nothing needs none.
    assert explain(*ones(), kernel="mma_sm80").endswith("NumPy arrays: emulated on the CPU")
    assert attention(*ones(1, 2, 0, 32), kernel="mma_sm80").shape == (1, 2, 0, 32)


def test_the_compiler_is_the_one_that_is_named_or_the_first_there(
    monkeypatch: pytest.MonkeyPatch, without_compiler: None
) -> None:
    there: dict[str, str] = {}
    monkeypatch.setattr(shutil, "which", there.get)
    assert cxx() is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "ziglang" or None)
    found = cxx()
    assert found is not None and found[:4] == (sys.executable, "-m", "ziglang", "c++")
    there["clang++"] = "/bin/clang++"
    assert cxx() == ("/bin/clang++",)
    there["g++"] = "/bin/g++"
    assert cxx() == ("/bin/g++",) and why_not() is None
    monkeypatch.setenv("CXX", "ccache g++ -m64")
    assert cxx() is None and "CXX=ccache g++ -m64 is not there" in (why_not() or "")
    there["ccache"] = "/bin/ccache"
    assert cxx() == ("/bin/ccache", "g++", "-m64")


def test_windows_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "name", "nt")
    assert why_not() == "kernels run on the CPU of Linux and macOS alone"


REFUSED = {
    "a dtype": (
        "wmma_unfused",
        {},
        "float32",
        "kernel 'wmma_unfused': takes float16",
    ),
    "a rule": ("scalar", {"window": (3, 0)}, "float16", "kernel 'scalar': has no window"),
    "a tile": ("mma_sm80", {"config": {"block_n": 8}}, "float16", "kernel 'mma_sm80': config: "),
    "a field": ("mma_sm80", {"config": {"rows": 8}}, "float16", "config: unknown field 'rows'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_kernel_cannot_do_is_said_before_anything_is_built(what: str) -> None:
    kernel, rules, dtype, message = REFUSED[what]
    for call in (attention, explain, plan):
        with pytest.raises(ValueError, match=message):
            call(*ones(dtype=dtype), kernel=kernel, **rules)


def test_a_kernel_of_another_target_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert explain(*ones(), kernel="wgmma_sm90").startswith("wgmma_sm90 on sm_90a: ")
    monkeypatch.setenv("FLASHCORE_ARCH", "sm_80")
    assert explain(*ones(), kernel="mma_sm80").startswith("mma_sm80 on sm_80: ")
    with pytest.raises(ValueError, match=r"needs wgmma, .* the target is sm_80"):
        attention(*ones(), kernel="wgmma_sm90")


def test_mods_are_expressions_for_a_kernel_and_functions_for_numpy() -> None:
    with pytest.raises(TypeError, match=r"mask_mod: got str; .*, or name a kernel, which takes an"):
        attention(*ones(), mask_mod="kv_idx < 3")
    with pytest.raises(TypeError, match=r"mask_mod: got a Python function, and kernel='mma_sm80'"):
        attention(*ones(), kernel="mma_sm80", mask_mod=lambda b, h, q_idx, kv_idx: kv_idx < 3)
    with pytest.raises(TypeError, match="mod_args: table has dtype float64"):
        table = {"table": np.ones(3)}
        attention(*ones(), kernel="mma_sm80", score_mod="score + table[0]", mod_args=table)


def test_the_other_byte_order_is_for_numpy_alone() -> None:
    swapped = [x.astype(">f2") for x in ones()]
    assert attention(*swapped).shape == (1, 2, 8, 32)
    with pytest.raises(TypeError, match="q: got dtype >f2, which is not in this machine's byte"):
        attention(*swapped, kernel="mma_sm80")
