"""Windows of the CPU engine: threads, slices of samples, and what these may not change."""

from __future__ import annotations

import pytest
import torch

from recurx import Schedule, comparing
from recurx.backends import cpu
from recurx.nets import KINDS
from tests.cpu.windows import DTYPES, assert_right, case, each_engine, judged, on_engine, window_of
from tests.cpu.windows import small_work_is_split_too as small_work_is_split_too


@each_engine
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_of_samples_and_gathered_calls_add_up(engine, dtype) -> None:
    """More samples than a slice holds; calls that are summed one by one, some, or all together."""
    for batch in (3, 13, 33, 130):
        schedule = Schedule.trm(1, 2)
        given, truths = judged(schedule, dtype=dtype, batch=batch, hidden=32, inner=32)
        assert_right(on_engine(engine, given, "block"), given, truths=truths)


def test_a_sample_that_is_not_finite_stays_alone_in_x(native) -> None:
    given = case(Schedule.trm(1, 1))
    clean = on_engine(cpu.BACKEND, given)[0]
    given[2][1, 5, 7] = float("nan")
    got = on_engine(cpu.BACKEND, given)[0]
    assert got[1].isnan().any()
    assert torch.equal(got[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_threads_and_reruns_agree(engine, kind, dtype) -> None:
    shape = dict(tokens=37, hidden=96, heads=3)
    for batch in (1, 5):
        given = case(Schedule.trm(1, 2), kind, dtype, batch, **shape)
        torch.set_num_threads(1)
        first = on_engine(engine, given)
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            got = on_engine(engine, given)
            assert all(torch.equal(a, b) for a, b in zip(first, got, strict=True)), threads


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_that_products_are_slow_with_are_zeros(engine, dtype) -> None:
    """In the window alone: who called it has them afterwards, on all threads."""
    problem, operands, span, d_outs = window_of(*case(Schedule.trm(1, 1), dtype=dtype))
    tiny = [None if d is None else d.float().sign().to(dtype) * 2.0**-130 for d in d_outs]
    assert any(d is not None and d.any() for d in tiny)
    for grad in comparing.gradients(engine, problem, operands, span, "all", tiny):
        assert not grad.any()
    many = torch.full((1 << 20,), 2.0**-130)
    assert (many * 0.5 != 0).all()
