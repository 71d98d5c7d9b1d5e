"""A checker is worth what it finds: every planted bug, in ten of ten runs, named for what it is."""

import re

import pytest

from emulator import bugs_gemm, bugs_wrappers, planted
from emulator.build import unavailable

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(unavailable() is not None, reason=str(unavailable())),
]


@pytest.mark.parametrize("bug", [*bugs_gemm.BUGS, *bugs_wrappers.BUGS], ids=lambda bug: bug.name)
def test_found_in_ten_of_ten_runs(bug):
    outcomes = planted.run(bug)
    missed = [outcome for outcome in outcomes if not re.search(bug.found, outcome)]
    assert len(outcomes) == 10
    assert not missed, f"{len(missed)} of 10 runs did not report {bug.found!r}, but: {missed[0]}"
