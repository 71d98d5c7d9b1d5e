"""Every rx:: wrapper does in the emulator what the PTX manual says, whatever the schedule."""

import numpy as np
import pytest

from emulator import wrapper_cases
from emulator.build import prune_cache, unavailable

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

SEEDS = range(1, 6)


@pytest.fixture(scope="module", params=wrapper_cases.FILES)
def emulated(request):
    prune_cache()
    return wrapper_cases.load(request.param)


def test_writes_what_it_must_under_every_seed(emulated):
    for name in wrapper_cases.names(emulated.library):
        for seed in SEEDS:
            emulated.configure(seed=seed)
            got, want = wrapper_cases.run(emulated, name), wrapper_cases.EXPECTED[name]()
            wrong = np.flatnonzero(got != want)
            assert not wrong.size, (
                f"{name}, seed {seed}: {wrong.size} of {got.size} words are wrong, the first is "
                f"word {wrong[0]}: {got[wrong[0]]:#010x}, expected {want[wrong[0]]:#010x}"
            )


def test_golden_words_are_what_the_emulator_writes(emulated):
    golden = np.load(wrapper_cases.GOLDEN)
    for name in wrapper_cases.names(emulated.library):
        assert np.array_equal(golden[name], wrapper_cases.run(emulated, name)), name


def test_every_wrapper_has_an_expectation():
    names = [n for f in wrapper_cases.FILES for n in wrapper_cases.names(_library(f))]
    assert sorted(names) == sorted(wrapper_cases.EXPECTED) == sorted(np.load(wrapper_cases.GOLDEN))


def test_lazy_and_eager_copies_agree(emulated):
    for policy in (0, 1):  # at once, and only when somebody waits
        emulated.configure(**{"async": policy})
        for name in wrapper_cases.names(emulated.library):
            assert np.array_equal(wrapper_cases.run(emulated, name), wrapper_cases.EXPECTED[name]())
    emulated.configure(**{"async": 2})


def _library(file):
    return wrapper_cases.load(file).library
