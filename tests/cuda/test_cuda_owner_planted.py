"""What proves the owner kernel is worth what it finds: every planted bug, under every seed."""

from __future__ import annotations

import re
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from emulator.bugs_owner import BUGS, OwnerBug
from emulator.build import unavailable
from emulator.owner import EmulatedCuda

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(unavailable() is not None, reason=str(unavailable())),
]
SEEDS = (1, 2, 3)


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Future[EmulatedCuda]]:
    """All builds, two at a time, begun before the first test needs one."""
    pool = ThreadPoolExecutor(2)
    folder = tmp_path_factory.mktemp("bugs")
    made = {bug.name: pool.submit(bug.build, folder / f"{i}") for i, bug in enumerate(BUGS)}
    made[""] = pool.submit(
        OwnerBug("", "api.h", "#pragma once", "#pragma once", "").build, folder / "0ok"
    )
    return made


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_found_under_every_seed(bug: OwnerBug, builds: dict[str, Future[EmulatedCuda]]) -> None:
    cuda = builds[bug.name].result()
    outcomes = [bug.outcome(cuda, seed) for seed in (SEEDS if "race" in bug.found else (1,))]
    missed = [text for text in outcomes if not re.search(bug.found, text)]
    assert not missed, f"{len(missed)} of {len(outcomes)} runs: {missed[0]}"


def test_without_a_bug_all_these_runs_are_right(builds: dict[str, Future[EmulatedCuda]]) -> None:
    cuda = builds[""].result()
    runs = {(bug.kind, bug.schedule, bug.tokens): bug for bug in BUGS}
    assert {bug.outcome(cuda, 1) for bug in runs.values()} == {"right"}
