"""A checker is worth what it finds: every planted bug, in ten of ten runs, named for what it is."""

import re

import pytest

from emulator import bugs_gemm, bugs_wrappers, planted
from emulator.build import unavailable
from emulator.planted_by_reader import ReaderBug, outcomes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(unavailable() is not None, reason=str(unavailable())),
]
# Those of the kernels' own files in one library, as planted_by_reader.py has them; what is planted
# in a header that kernels share, and in wrappers, is compiled by itself.
TOGETHER = [ReaderBug(**vars(bug)) for bug in bugs_gemm.BUGS if bug.file is None]
ALONE = [bug for bug in bugs_gemm.BUGS if bug.file] + bugs_wrappers.BUGS


def check(bug, found):
    missed = [outcome for outcome in found if not re.search(bug.found, outcome)]
    assert len(found) == 10
    assert not missed, f"{len(missed)} of 10 runs did not report {bug.found!r}, but: {missed[0]}"


@pytest.mark.parametrize("bug", TOGETHER, ids=lambda bug: bug.name)
def test_found_in_ten_of_ten_runs(bug):
    check(bug, outcomes(bug, TOGETHER))


@pytest.mark.parametrize("bug", ALONE, ids=lambda bug: bug.name)
def test_found_alone_in_ten_of_ten_runs(bug):
    check(bug, planted.run(bug))
