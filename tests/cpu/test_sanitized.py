"""The CPU engine under sanitizers of addresses, undefined behaviour and threads, on random shapes.

The threads meet in code that all engines share: the portable one stands for them. Addresses are
those of each kind of core, but for AMX, whose emulated tiles cost the compiler minutes.
RECURX_SANITIZED_CASES=N takes every engine that this processor has for both, N cases each, and
leaves out every barrier in turn.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.cpu import build, sanitized

ASKED = int(os.environ.get("RECURX_SANITIZED_CASES", "0"))
# Their engines in the driver.
OTHERS = {"avx2": "avx2_", "avx512_bf16": "dot_", "amx": "amx_", "amx_split": "amx_f32"}
TILES = ("amx", "amx_split")
# A bug that shows in its window or its products.
SEEN_BY = {
    "avx2": "a panel too many",
    "avx512_bf16": "a row too few in a window's scratch",
    **dict.fromkeys(TILES, "a row too few in a window's scratch"),
}
CASES = {sanitized.ADDRESS: 32, sanitized.THREAD: 12}
# Of a block's forward and of its backward, and of those of later systems.
BARRIERS = (
    "block.hpp", "backward/block_backward.hpp", "variant_block.hpp", "backward/variant_forward.hpp",
)  # fmt: skip

pytestmark = pytest.mark.slow


def names(sanitizer: str) -> list[str]:
    """The engines of a driver."""
    if ASKED:
        return sanitized.engines()
    here = [name for name in OTHERS if name in build.usable() and name not in TILES]
    return ["portable", *(here if sanitizer == sanitized.ADDRESS else ())]


def built(sanitizer: str) -> tuple[Path, list[str]]:
    reason = sanitized.why_not(sanitizer)
    if reason:
        pytest.skip(reason)
    return sanitized.program(sanitizer, names(sanitizer))


@pytest.mark.parametrize("sanitizer", CASES)
def test_random_shapes(sanitizer: str) -> None:
    check, _ = built(sanitizer)
    count = 2 * len(names(sanitizer)) * ASKED or CASES[sanitizer]  # fp32 and bf16
    status, said = sanitized.run(check, 0, count, "" if ASKED else "portable")
    assert status == 0 and "ok" in said.splitlines(), said[-6000:]


@pytest.mark.parametrize("name", OTHERS)
def test_random_shapes_of_other_cores(name: str) -> None:
    """Calls, solves and windows; a panel too many is found here too."""
    if name not in build.usable():
        pytest.skip(f"this processor (or this build) has no {name}")
    if name in TILES and not ASKED:
        pytest.skip("with RECURX_SANITIZED_CASES=N alone: its tiles cost the compiler minutes")
    check, _ = built(sanitized.ADDRESS)
    status, said = sanitized.run(check, 0, 16, OTHERS[name])
    assert status == 0 and "ok" in said.splitlines(), said[-6000:]
    bug = list(sanitized.BUGS).index(SEEN_BY[name])
    status, said = sanitized.run(check, 0, 60, OTHERS[name], bug)
    assert status != 0 and sanitized.BUGS[SEEN_BY[name]][0] in said, said[-6000:]


@pytest.mark.parametrize("bug", sanitized.BUGS)
def test_a_planted_bug_is_found(bug: str) -> None:
    check, _ = built(sanitized.ADDRESS)
    number = list(sanitized.BUGS).index(bug)
    status, said = sanitized.run(check, 0, 60, "portable", number)
    assert status != 0 and sanitized.BUGS[bug][0] in said, said[-6000:]


def test_a_barrier_that_is_missing_is_found() -> None:
    check, places = built(sanitized.THREAD)
    for file in BARRIERS:
        of_file = [n for n, place in enumerate(places) if place.split(":")[0] == file]
        for number in of_file if ASKED else of_file[:1]:
            bug = len(sanitized.BUGS) + number
            status, said = sanitized.run(check, 0, 12, "portable", bug)
            assert status != 0 and "data race" in said, f"{places[number]}: {said[-3000:]}"
