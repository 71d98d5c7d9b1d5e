"""What a first call under inference mode leaves behind serves ordinary calls, and gradients.

A tensor that is made in inference mode may never be written outside, and autograd saves none. So
nothing that is kept may be one: found by looking at every tensor that is alive.
"""

from __future__ import annotations

import dataclasses
import gc

import pytest
import torch
from torch import Tensor

import recurx
from recurx import packed
from recurx.backends.cuda import Cuda
from recurx.models import TRM
from recurx.models.config import TRMConfig
from recurx.plan import DEVICES
from recurx.plan.cuda import KINDS
from tests.backends.test_second_call import StubLibrary, recursion
from tests.factories import quantize_net
from tests.kernels.writes import ENGINES, Stack, answer


def made_in_inference_mode() -> list[tuple[int, ...]]:
    """Shapes of all such tensors that somebody still holds."""
    gc.collect()
    return [tuple(t.shape) for t in gc.get_objects() if type(t) is Tensor and t.is_inference()]


def test_the_search_finds_what_is_kept() -> None:
    with torch.inference_mode():
        kept = {"here": [torch.ones(3)]}
    assert made_in_inference_mode() == [(3,)]
    del kept
    assert made_in_inference_mode() == []


@pytest.mark.parametrize("engine", ENGINES)
def test_engines(engine: str) -> None:
    packed.device_words.cache_clear()
    with ENGINES[engine]() as backend:
        answer(Stack(), backend, "inference")
        assert made_in_inference_mode() == []


@pytest.mark.parametrize("kind", KINDS)
def test_cuda_kernels(kind: str) -> None:
    packed.device_words.cache_clear()
    cuda = Cuda(StubLibrary(kind), DEVICES["h100"])
    problem, operands, span = recursion(5, torch.bfloat16)
    problem = dataclasses.replace(problem, device_type="cuda")
    with torch.inference_mode():
        cuda.run(problem, operands, span)
    assert made_in_inference_mode() == []
    (entry,) = cuda.tapes._entries.values()
    assert not entry.made[1].is_inference()
    operands.weights[0].requires_grad_()
    cuda.run(problem, operands, span)  # writes into what was kept


def test_quantised_weights_in_the_grid_kernel() -> None:
    cuda = Cuda(StubLibrary("grid"), DEVICES["h100"])
    problem, operands, span = recursion(1, torch.bfloat16)
    spec = problem.nets[0][1]
    net = quantize_net(recurx.Net(spec, operands.weights))
    problem = dataclasses.replace(problem, device_type="cuda")
    operands = operands._replace(weights=tuple(net.weights))
    with torch.inference_mode():
        cuda.run(problem, operands, span)
    assert made_in_inference_mode() == []


def test_tables_of_a_training_step() -> None:
    multi_tensor = pytest.importorskip("recurx.kernels.multi_tensor")
    tables, weight = multi_tensor.Tables(), torch.ones(8)
    with torch.inference_mode():
        tables.get("", [[weight]])
    assert made_in_inference_mode() == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_answered_in_inference_mode_can_be_trained(dtype: str) -> None:
    model = TRM(TRMConfig.tiny(vocab_size=11, seq_len=9, forward_dtype=dtype))
    batch = {"inputs": torch.randint(0, 11, (2, 9))}
    with torch.inference_mode():
        recurx.solve(model, batch, max_steps=2)
    assert made_in_inference_mode() == []
    full = {**batch, "puzzle_identifiers": torch.zeros(2, dtype=torch.int32)}
    _, outputs = model(carry=model.initial_carry(full), batch=full)
    outputs["logits"].float().square().mean().backward()
    assert all(p.grad is not None for p in model.inner.L_level.parameters())
