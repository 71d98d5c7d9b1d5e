"""The CPU engine under sanitizers of addresses, undefined behaviour and threads, on random shapes.

RECURX_SANITIZED_CASES=N takes every engine that this processor has, N cases each, and leaves out
every barrier in turn.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.cpu import sanitized

ASKED = int(os.environ.get("RECURX_SANITIZED_CASES", "0"))
NAMES = sanitized.engines() if ASKED else ["portable"]
CASES = {sanitized.ADDRESS: 32, sanitized.THREAD: 12}
# Of a block's forward and of its backward.
BARRIERS = ("block.hpp", "backward/block_backward.hpp")

pytestmark = pytest.mark.slow


def built(sanitizer: str) -> tuple[Path, list[str]]:
    reason = sanitized.why_not(sanitizer)
    if reason:
        pytest.skip(reason)
    return sanitized.program(sanitizer, NAMES)


@pytest.mark.parametrize("sanitizer", CASES)
def test_random_shapes(sanitizer: str) -> None:
    check, _ = built(sanitizer)
    count = 2 * len(NAMES) * ASKED or CASES[sanitizer]  # fp32 and bf16
    status, said = sanitized.run(check, 0, count)
    assert status == 0 and "ok" in said.splitlines(), said[-6000:]


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
