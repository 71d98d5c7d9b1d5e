"""PTX text to statements. Nothing here knows what an instruction means.

The grammar is the small part of PTX that compilers emit: one module of global directives and entry
functions, whose bodies are labels, register declarations, scopes and instructions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .types import TranslationError, Type, is_type


@dataclass(frozen=True)
class Instruction:
    """`@!%p1 ld.shared.v2.b32 {%r1, %r2}, [%r3+8];`: line, predicate, words, operands."""

    line: int
    text: str
    predicate: str  # "", "%p1" or "!%p1"
    words: tuple[str, ...]  # the opcode split at dots
    operands: tuple[str, ...]

    @property
    def opcode(self) -> str:
        return self.words[0]

    @property
    def type(self) -> Type:
        """The last type of the opcode."""
        for word in reversed(self.words):
            if is_type(word):
                return Type(word)
        raise self.error("no type in")

    @property
    def types(self) -> list[Type]:
        return [Type(word) for word in self.words[1:] if is_type(word)]

    def has(self, *words: str) -> bool:
        return any(word in self.words for word in words)

    def error(self, what: str) -> TranslationError:
        return TranslationError(f"PTX line {self.line}: {what}: {self.text}")


@dataclass(frozen=True)
class Label:
    name: str


@dataclass(frozen=True)
class Registers:
    """`.reg .b32 %r<5>;` declares %r0 to %r4; without <> the one name."""

    type: Type
    names: tuple[tuple[str, int | None], ...]


@dataclass(frozen=True)
class Local:
    """`.local .align 16 .b8 name[32];`: memory of one thread."""

    name: str
    align: int
    bytes: int


@dataclass(frozen=True)
class OpenScope:
    pass


@dataclass(frozen=True)
class CloseScope:
    pass


Statement = Instruction | Label | Registers | Local | OpenScope | CloseScope


@dataclass
class Entry:
    """One kernel: parameter offsets in the constant bank, and its body."""

    name: str
    parameters: dict[str, int]
    parameter_bytes: int
    statements: list[Statement]


@dataclass
class Module:
    entries: list[Entry] = field(default_factory=list)
    shared: dict[str, int] = field(default_factory=dict)  # offset from the first shared byte
    extern_shared: list[str] = field(default_factory=list)  # names of the dynamic part
    shared_bytes: int = 0


_SPACE = re.compile(r"\s+")
_LABEL = re.compile(r"([$\w%.]+)\s*:(?!:)")
_SKIPPED = re.compile(r"\.(?:loc|file|pragma)\b[^\n;]*(?:;|\n)")
_SHARED = re.compile(
    r"^\s*(?P<extern>\.extern\s+)?(?:\.visible\s+)?\.shared\s+(?:\.align\s+(?P<align>\d+)\s+)?"
    r"\.(?P<type>\w+)\s+(?P<name>[$\w]+)(?:\[(?P<count>\d*)\])?",
    re.M,
)
_LOCAL = re.compile(r"\.local\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([$\w]+)(?:\[(\d+)\])?$")
_ENTRY = re.compile(
    r"\.entry\s+(?P<name>[$\w]+)\s*\((?P<parameters>.*?)\)(?P<directives>[^{;]*)\{", re.S
)
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)(?:\s+\.ptr[^,]*?)?\s+([$\w]+)(?:\[(\d+)\])?\s*$"
)


def parse(text: str) -> Module:
    text = _without_comments(text)
    module = Module()
    for match in _SHARED.finditer(text):
        _declare_shared(module, match)
    function = re.search(r"^\s*(?:\.visible\s+|\.weak\s+)?\.func\b", text, re.M)
    if function:
        line = text.count("\n", 0, function.end()) + 1
        raise TranslationError(f"PTX line {line}: device functions are not translated; inline them")
    for match in _ENTRY.finditer(text):
        body_end = _matching_brace(text, match.end() - 1)
        offsets, size = _parameters(match["parameters"])
        statements = list(_statements(text, match.end(), body_end))
        module.entries.append(Entry(match["name"], offsets, size, statements))
    return module


def _without_comments(text: str) -> str:
    """Comments become blanks, so that offsets and line numbers stay."""
    blank = lambda m: re.sub(r"[^\n]", " ", m[0])  # noqa: E731
    return re.sub(r"//[^\n]*|/\*.*?\*/", blank, text, flags=re.S)


def _declare_shared(module: Module, match: re.Match[str]) -> None:
    if match["extern"]:
        module.extern_shared.append(match["name"])
        return
    element = Type(match["type"]).bytes
    align = int(match["align"] or element)
    offset = -(-module.shared_bytes // align) * align
    module.shared[match["name"]] = offset
    module.shared_bytes = offset + element * int(match["count"] or 1)


def _parameters(text: str) -> tuple[dict[str, int], int]:
    offsets, end = {}, 0
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = _PARAMETER.match(part)
        if not match:
            raise TranslationError(f"parameter not understood: {part}")
        element = Type(match[2]).bytes
        align = int(match[1] or element)
        end = -(-end // align) * align
        offsets[match[3]] = end
        end += element * int(match[4] or 1)
    return offsets, end


def _matching_brace(text: str, start: int) -> int:
    depth = 0
    for match in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return match.start()
    raise TranslationError("unbalanced braces")


def _statements(text: str, position: int, end: int):
    while True:
        space = _SPACE.match(text, position, end)
        position = space.end() if space else position
        if position >= end:
            return
        if skipped := _SKIPPED.match(text, position, end):
            position = skipped.end()
        elif text[position] == "{":
            yield OpenScope()
            position += 1
        elif text[position] == "}":
            yield CloseScope()
            position += 1
        elif label := _LABEL.match(text, position, end):
            yield Label(label[1])
            position = label.end()
        else:
            stop = text.index(";", position, end)
            line = text.count("\n", 0, position) + 1
            statement = _statement(" ".join(text[position:stop].split()), line)
            if statement:
                yield statement
            position = stop + 1


def _statement(text: str, line: int) -> Statement | None:
    if text.startswith(".reg"):
        _, kind, names = text.split(None, 2)
        return Registers(Type(kind[1:]), tuple(_register_name(n) for n in names.split(",")))
    if local := _LOCAL.match(text):
        return Local(local[3], int(local[1] or 16), Type(local[2]).bytes * int(local[4] or 1))
    if text.startswith(".shared") or not text:
        return None  # declared with the module
    predicate = ""
    if text.startswith("@"):
        predicate, text = text[1:].split(None, 1)
    if text.startswith("."):
        raise TranslationError(f"PTX line {line}: unknown directive: {text}")
    opcode, _, rest = text.partition(" ")
    words = tuple(opcode.split("."))
    return Instruction(line, text, predicate, words, tuple(split_operands(rest)))


def _register_name(text: str) -> tuple[str, int | None]:
    match = re.match(r"\s*([^\s<]+)(?:<(\d+)>)?\s*$", text)
    return match[1], int(match[2]) if match[2] else None


def split_operands(text: str) -> list[str]:
    """Split at the commas outside braces and brackets."""
    parts, depth, current = [], 0, ""
    for char in text:
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(char, 0)
        if char == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += char
    return [*parts, current.strip()] if current.strip() else parts
