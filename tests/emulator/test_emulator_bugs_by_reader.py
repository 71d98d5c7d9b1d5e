"""Bugs planted by somebody who had not read the race checker, and changes proven harmless."""

import pytest

from emulator.bugs_by_reader import ALL, BUGS, CONTROLS
from emulator.build import unavailable
from emulator.planted_by_reader import KINDS, SEEDS, kind_of, outcomes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(unavailable() is not None, reason=str(unavailable())),
]


def cases(bugs):
    """Strict: a `not_yet` that has become wrong fails, and wants to be taken out."""

    def marks(bug):
        return [pytest.mark.xfail(reason=bug.not_yet, strict=True)] if bug.not_yet else []

    return pytest.mark.parametrize(
        "bug", [pytest.param(bug, marks=marks(bug), id=bug.name) for bug in bugs]
    )


def check(bug):
    found = outcomes(bug, ALL)
    assert len(found) == SEEDS
    strange = [text for text in found if kind_of(text) not in bug.found.split("|")]
    assert not strange, f"{len(strange)} of {SEEDS} runs are not {bug.found!r}: {strange[0]}"


@cases(BUGS)
def test_found_in_ten_of_ten_runs(bug):
    check(bug)


@cases(CONTROLS)
def test_what_is_harmless_is_not_reported(bug):
    check(bug)


def test_every_expectation_names_a_kind():
    for bug in ALL:
        assert set(bug.found.split("|")) <= set(KINDS)
        assert ("harmless" in bug.found) == (bug in CONTROLS)
