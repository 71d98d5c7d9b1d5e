"""The paper model of data-parallel training: it says that it is one, and follows its inputs."""

import dataclasses

import pytest

import recurx
from recurx.bench import scaling
from recurx.plan import DEVICES


def test_more_gpus_train_faster_and_pay_for_the_exchange():
    found = scaling.scaling("trm-att", "h100", 96)
    assert [s.gpus for s in found] == list(scaling.GPUS)
    rates = [s.samples_per_second for s in found]
    assert rates == sorted(rates) and rates[-1] < 64 * rates[0]
    assert found[0].exchange_seconds == 0 < found[1].exchange_seconds
    by_gpus = {s.gpus: s for s in found}
    assert by_gpus[16].exchange_seconds > by_gpus[8].exchange_seconds  # the network is slower


def test_the_window_is_what_the_backward_costs():
    problem = dataclasses.replace(scaling._problem("trm-att"), batch=64, device_type="cuda")
    full = dataclasses.replace(problem.schedule, grad_from=0)
    h100 = DEVICES["h100"]
    short = scaling.training_seconds(problem, h100, "eager")
    long = scaling.training_seconds(dataclasses.replace(problem, schedule=full), h100, "eager")
    assert short / long == pytest.approx((1 + 2 * 7 / 21) / 3)


def test_the_table_says_what_it_is():
    text = scaling.report()
    assert "a model, not measured" in text and "| 64 |" in text and "96 samples a GPU" in text
    with pytest.raises(recurx.InvalidArgument):
        scaling.markdown("trm-att", "abacus", 8)
