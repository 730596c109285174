"""Places in the kernels that can be broken, and a copy of ``kernels/`` in which each can be.

There are two kinds. A barrier is left out: anything that orders threads, copies or products. A
bound is off by one: ``<`` for ``<=``, ``>`` for ``>=`` and the other way round, 0 for 1 where 1 is
added or subtracted.

One copy has all places, and each of them asks, when a thread comes to it, whether it is the broken
one. So a kernel is compiled once, however many of its places are broken after that.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

#: What has a twin on the CPU, and what the emulator's own runtime includes.
_NOT_THE_KERNELS = ("flashcore/ptx/", "flashcore/types.cuh")
#: Calls of the PTX layer that order something, and of what is made of them. ``fence_registers`` is
#: for the compiler alone: no instruction is made of it.
_BARRIER = re.compile(
    r"\b((?!fence_registers)(?:(?!copy_)\w+_)?"
    r"(?:sync|wait|await|arrive|fence|commit|release|init)(?:_\w+)?"
    r"|pass_turn|end)(<[^<>;]*>)?\("
)
_COMPARISON = re.compile(r"(?<=\s)[<>]=?(?=\s)")
_ONE = re.compile(r"(?<= [+-] )1(?![\w.])")
#: Functions whose arguments count elements of registers, which is no bound.
_ELEMENTS = re.compile(r"\b(pair|put|get)\([^()]*$")
_ORDERS = {"<": "LESS", "<=": "LESS_EQUAL", ">": "GREATER", ">=": "GREATER_EQUAL"}
_OFF_BY_ONE = {"<": "<=", "<=": "<", ">": ">=", ">=": ">"}
#: What is decided when a kernel is compiled: directives, template parameters, constants ...
_CONSTANT = re.compile(
    r"^[ \t]*#(?!pragma unroll\n)(?:.*\\\n)*.*|\btemplate <[^{};]*?>(?=\s*\n)"
    r"|\bconstexpr\b[^;{()]*=[^;]*;",
    re.MULTILINE,
)
#: ... assertions, branches, and loops over registers.
_CONSTANT_BRACKET = re.compile(r"\bstatic_assert\(|\bif constexpr \(|#pragma unroll\n\s*for \(")

_HEADER = r"""#pragma once
extern "C" {  // which place is broken, and which ones somebody has come to
__attribute__((visibility("default"))) int flashcore_broken = -1;
__attribute__((visibility("default"))) unsigned char flashcore_reached[@COUNT@] = {};
}

namespace mutants {

__attribute__((noinline, no_sanitize("thread"))) inline bool is_broken(int place) {
    flashcore_reached[place] = 1;
    return flashcore_broken == place;
}
constexpr int one(int place) {
    if (__builtin_is_constant_evaluated()) return 1;
    return is_broken(place) ? 0 : 1;
}

// a < LESS{place} < b is a < b; broken, it is a <= b. All four operators bind alike, so a and b are
// what they were.
enum Order { LESS, LESS_EQUAL, GREATER, GREATER_EQUAL };
template <Order ORDER>
struct Comparison {
    int place;
};
template <typename A, Order ORDER>
struct LeftSide {
    A a;
    int place;
};
template <typename A, Order ORDER>
constexpr LeftSide<A, ORDER> operator<(A a, Comparison<ORDER> c) {
    return {a, c.place};
}
template <typename A, Order ORDER, typename B>
constexpr bool operator<(LeftSide<A, ORDER> left, B b) {
    bool with_equal = ORDER == LESS_EQUAL || ORDER == GREATER_EQUAL;
    if (!__builtin_is_constant_evaluated()) with_equal ^= is_broken(left.place);
    if (with_equal && left.a == b) return true;
    return ORDER <= LESS_EQUAL ? left.a < b : left.a > b;
}

}  // namespace mutants
"""

Kind = Literal["barrier", "bound"]


@dataclass(frozen=True)
class Mutant:
    """A place, and what becomes of it."""

    number: int
    kind: Kind
    file: str
    line: int
    text: str
    """The call that is left out, or the line of the bound and what stands for what."""

    @property
    def name(self) -> str:
        """What stays the same as long as the text does."""
        return f"{self.file}: {self.text}"


class _Edit(NamedTuple):
    """Text that replaces a part of a file; @ is the place's number."""

    begin: int
    end: int
    text: str


class _Place(NamedTuple):
    kind: Kind
    at: int
    what: str
    edits: list[_Edit]


def write(source: Path, target: Path) -> list[Mutant]:
    """Copy ``source``, a folder like ``kernels/``, with all its places breakable; return these."""
    shutil.copytree(source, target)
    mutants: list[Mutant] = []
    for path in sorted([*target.rglob("*.cu"), *target.rglob("*.cuh")]):
        file = path.relative_to(target).as_posix()
        if file.startswith(_NOT_THE_KERNELS):
            continue
        text = path.read_text()
        lines, names, edits = text.splitlines(), Counter[str](), list[_Edit]()
        for place in _places(text):
            line = text.count("\n", 0, place.at)
            name = place.what
            if place.kind == "bound":
                name = f"{lines[line].split('//')[0].strip()} [{place.what}]"
            names[name] += 1
            again = f" #{names[name]}" if names[name] > 1 else ""
            number = len(mutants)
            mutants.append(Mutant(number, place.kind, file, line + 1, name + again))
            edits += [e._replace(text=e.text.replace("@", str(number))) for e in place.edits]
        for edit in sorted(edits, reverse=True):
            text = text[: edit.begin] + edit.text + text[edit.end :]
        path.write_text(f'#include <mutants.cuh>\n#line 1 "{file}"\n{text}')
    (target / "mutants.cuh").write_text(_HEADER.replace("@COUNT@", str(len(mutants))))
    return mutants


def included(folder: Path, file: str) -> set[str]:
    """The files of a folder like ``kernels/`` that one of them includes, and itself."""
    found, new = set[str](), {file}
    while new:
        found |= new
        texts = [(folder / name).read_text() for name in new]
        named = {name for text in texts for name in re.findall(r"#include <(.*)>", text)}
        new = {name for name in named - found if (folder / name).exists()}
    return found


def _places(text: str) -> Iterator[_Place]:
    code = re.sub(r"//.*", _blank, text)
    yield from _barriers(code)
    code = _CONSTANT.sub(_blank, code)
    for match in _CONSTANT_BRACKET.finditer(code):
        end = _closing(code, match.end() - 1)
        code = code[: match.end()] + re.sub(r"[^\n]", " ", code[match.end() : end]) + code[end:]
    yield from _bounds(code)


def _blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match[0])


def _barriers(code: str) -> Iterator[_Place]:
    for match in _BARRIER.finditer(code):
        object_ = re.compile(r"[\w.>:\[\]-]*$").search(code, 0, match.start())
        assert object_ is not None  # it may be empty
        begin = object_.start()
        end = _closing(code, match.end() - 1) + 1
        before = code[:begin].rstrip()
        if not re.search(r"[;{})]$|\b(else|return)$", before):
            continue  # declared, or asked for its result
        if before.endswith("return") or code[end:].lstrip()[:1] != ";":
            continue  # made of barriers that are places themselves
        edits = [
            _Edit(begin, begin, "(mutants::is_broken(@) ? void() : "),
            _Edit(end, end, ")"),
        ]
        yield _Place("barrier", match.start(), " ".join(code[begin:end].split()), edits)


def _bounds(code: str) -> Iterator[_Place]:
    for match in _COMPARISON.finditer(code):
        left = _operand(code[: match.start()][::-1], ")]}", "([{")[::-1]
        right = _operand(code[match.end() :], "([{", ")]}")
        if _is_constant(left) and _is_constant(right):
            continue
        broken = f"< mutants::Comparison<mutants::{_ORDERS[match[0]]}>{{@}} <"
        what = f"{_OFF_BY_ONE[match[0]]} for {match[0]}"
        yield _Place("bound", match.start(), what, [_Edit(*match.span(), broken)])
    for match in _ONE.finditer(code):
        before = code[code.rfind("\n", 0, match.start()) : match.start()]
        if before.count("[") > before.count("]") or _ELEMENTS.search(before):
            continue
        what = f"0 for 1 in {before.split()[-1]} 1"
        yield _Place("bound", match.start(), what, [_Edit(*match.span(), "mutants::one(@)")])


def _closing(code: str, opening: int) -> int:
    """Where the bracket that opens at ``opening`` closes."""
    depth = 0
    for at in range(opening, len(code)):
        depth += (code[at] in "([{") - (code[at] in ")]}")
        if depth == 0:
            return at
    raise ValueError(f"never closed: {code[opening : opening + 60]!r}")


def _operand(code: str, opening: str, closing: str) -> str:
    """What of the text beside a comparison belongs to it. Backwards, brackets change roles."""
    depth = 0
    for at, char in enumerate(code):
        depth += (char in opening) - (char in closing)
        near = code[max(0, at - 1) : at + 2]
        ends = char in ";,?=" or "&&" in near or "||" in near or (char == ":" and "::" not in near)
        if depth < 0 or (depth == 0 and ends):
            return code[:at]
    return code


def _is_constant(operand: str) -> bool:
    """Whether an operand is known when the kernel is compiled, by its names."""
    names = re.findall(r"[A-Za-z_]\w*", re.sub(r"\w+(<[^<>]*>)?::", "", operand))
    return all(name.isupper() or name in ("sizeof", "int", "return") for name in names)
