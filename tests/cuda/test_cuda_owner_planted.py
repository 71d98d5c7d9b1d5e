"""What proves the owner kernel is worth what it finds: every planted bug, under every seed."""

from __future__ import annotations

import re

import pytest

from emulator import bugs_owner
from emulator.bugs_owner import BUGS, OwnerBug
from emulator.build import unavailable
from emulator.owner import EmulatedCuda

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(unavailable() is not None, reason=str(unavailable())),
]
SEEDS = (1, 2, 3)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> EmulatedCuda:
    return bugs_owner.plant_all(tmp_path_factory.mktemp("bugs"))


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_found_under_every_seed(planted: EmulatedCuda, bug: OwnerBug) -> None:
    bugs_owner.wake(planted, bug)
    outcomes = [bug.outcome(planted, seed) for seed in (SEEDS if "race" in bug.found else (1,))]
    missed = [text for text in outcomes if not re.search(bug.found, text)]
    assert not missed, f"{len(missed)} of {len(outcomes)} runs: {missed[0]}"


def test_without_a_bug_all_these_runs_are_right(planted: EmulatedCuda) -> None:
    bugs_owner.wake(planted, None)
    runs = {(bug.kind, bug.schedule, bug.tokens, bug.hidden, bug.blocks): bug for bug in BUGS}
    assert {bug.outcome(planted, 1) for bug in runs.values()} == {"right"}
