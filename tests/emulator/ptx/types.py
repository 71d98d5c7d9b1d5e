"""PTX types: how many bits, how a register holds them, and how C++ computes with them."""

from __future__ import annotations

import re
from dataclasses import dataclass


class TranslationError(Exception):
    """PTX that is not understood; the message names the line of the PTX text."""


@dataclass(frozen=True)
class Type:
    """A PTX type such as .s32. A register is an unsigned integer of its width, or a bool."""

    name: str

    @property
    def is_float(self) -> bool:
        return self.name in ("f32", "f64", "bf16", "bf16x2")

    @property
    def is_signed(self) -> bool:
        return self.name[0] == "s"

    @property
    def bits(self) -> int:
        fixed = {"pred": 1, "bf16": 16, "f16": 16, "bf16x2": 32, "f16x2": 32}
        return fixed.get(self.name) or int(self.name[1:])

    @property
    def bytes(self) -> int:
        return self.bits // 8

    @property
    def register(self) -> str:
        if self.name == "pred":
            return "bool"
        return "unsigned __int128" if self.bits == 128 else f"uint{self.bits}_t"

    @property
    def integer(self) -> str:
        """The C++ type of integer arithmetic."""
        if self.name == "pred":
            return "bool"
        sign = "" if self.is_signed else "unsigned "
        if self.bits == 128:
            return f"{sign}__int128"
        return f"int{self.bits}_t" if self.is_signed else f"uint{self.bits}_t"

    @property
    def wide(self) -> str:
        """The C++ integer of twice the width."""
        return Type(f"{self.name[0]}{self.bits * 2}").integer


_TYPE = re.compile(r"(?:[busf](?:8|16|32|64|128)|pred|bf16|bf16x2|f16x2)$")


def is_type(word: str) -> bool:
    return bool(_TYPE.match(word))
