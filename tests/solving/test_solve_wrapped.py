"""Models inside wrappers, and arguments of another kind: an answer, or what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import recurx
from recurx import InvalidArgument
from recurx.models import TRM, ACTLossHead, TRMConfig, problem_of_model
from recurx.tasks.base import Examples
from tests import lookalike_nano

BATCH = {"inputs": torch.randint(0, 7, (3, 9), generator=torch.Generator().manual_seed(0))}


def build() -> TRM:
    torch.manual_seed(0)
    return TRM(TRMConfig.tiny(7, 9))


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "loss head": ACTLossHead,
    "as DDP holds it": nn.DataParallel,
    "both": lambda model: nn.DataParallel(ACTLossHead(model)),
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "averaged": torch.optim.swa_utils.AveragedModel,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_solve_looks_inside_wrappers(wrapper: str) -> None:
    want = recurx.solve(build(), BATCH, max_steps=2, logits=True).logits
    wrapped = WRAPPERS[wrapper](build())
    got = recurx.solve(wrapped, BATCH, max_steps=2, logits=True).logits
    torch.testing.assert_close(got, want)
    assert problem_of_model(wrapped) == problem_of_model(build())
    assert str(problem_of_model(wrapped)) in recurx.explain(wrapped)


EXAMPLES = Examples(np.zeros((3, 9), dtype=np.int64), np.zeros((3, 9), dtype=np.int64))


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: recurx.solve(build(), EXAMPLES), "torch.from_numpy(examples.inputs)"),
        (lambda: recurx.quantize(build(), EXAMPLES), "torch.from_numpy(examples.inputs)"),
        (lambda: recurx.solve(build(), [1]), "token ids [B, T], got list"),
        (lambda: recurx.solve("model", BATCH), "got str"),
        (lambda: recurx.solve(nn.Linear(2, 2), BATCH), "got Linear"),
        (lambda: recurx.solve(lookalike_nano.build(), BATCH), "nano-trm"),
        (lambda: recurx.cost(build(), "h100"), "recurx.models.problem_of_model(model"),
        (lambda: problem_of_model(nn.Linear(2, 2)), "expected a recurx TRM or HRM"),
    ],
)
def test_what_is_no_model_and_no_batch_is_told_what_to_do(call: Any, message: str) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(message)):
        call()


def test_the_problem_of_a_model_has_a_cost() -> None:
    assert recurx.cost(problem_of_model(build(), 8), "h100").plans
