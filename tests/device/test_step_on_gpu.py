"""The training step on the hardware: a captured step against the same step uncaptured."""

from __future__ import annotations

import copy

import pytest
import torch

from recurx.train import AdamATan2, CapturedStep, CudaGraphs, SampleQueue, Trainer, swap
from tests.train.official_like import LossHead
from tests.train.test_train import tiny

pytestmark = pytest.mark.gpu

LOSS = "fused_stablemax_cross_entropy"
CASES = {
    "puzzle embedding": {"model": {"puzzle_emb_ndim": 16}, "loss": LOSS},
    "bf16": {"model": {"forward_dtype": "bfloat16"}, "loss": LOSS},
    "fp64 loss": {"model": {}},
    "attention, AdamW": {
        "model": {"mlp_t": False, "pos_encodings": "rope"}, "loss": LOSS, "optimizer": "adamw",
    },
    "HRM, Q-learning": {
        "model": {"variant": "hrm", "H_layers": 1, "no_ACT_continue": False}, "loss": LOSS,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def plain_attention():
    """The fused attention of PyTorch sums its gradient in no fixed order: no bits to compare."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield


def differing(a: CapturedStep, b: CapturedStep) -> list[int]:
    pairs = zip(a.static_tensors(), b.static_tensors(), strict=True)
    return [n for n, (x, y) in enumerate(pairs) if not torch.equal(x, y)]


@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize("name", CASES)
def test_replays_are_the_uncaptured_step_to_the_bit(name, backend):
    config = tiny(**copy.deepcopy(CASES[name]))
    plain = Trainer(config, device="cuda", backend=backend, captured=False)
    replayed = Trainer(config, device="cuda", backend=backend)
    for step in range(12):
        first, second = plain.train_step(), replayed.train_step()
        assert first.sums == second.sums, step
        assert differing(plain.one_step, replayed.one_step) == [], step
    assert replayed.one_step.captured and not plain.one_step.captured


def test_the_host_runs_ahead_of_the_device():
    """With a replayed step nothing waits: many steps are launched while the first still runs."""
    run = Trainer(tiny(loss=LOSS), device="cuda")
    for _ in range(6):
        run.train_step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(200_000_000)  # a tenth of a second of the device's time
        run.train_step()
        assert not torch.cuda.current_stream().query()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_run_is_resumed_to_the_bit(tmp_path):
    config = tiny(loss=LOSS)
    whole = Trainer(config, device="cuda")
    for _ in range(12):
        whole.train_step()
    Trainer(config, tmp_path, device="cuda").run(steps=7)
    resumed = Trainer.resume(tmp_path, device="cuda")
    resumed.run(steps=12)
    for (name, got), want in zip(
        resumed.model.state_dict().items(), whole.model.state_dict().values(), strict=True
    ):
        assert torch.equal(got, want), name


def test_draws_of_pytorch_generators_are_captured_too():
    """An official-style head draws its exploration from PyTorch; each replay draws anew."""
    run = Trainer(tiny(model={"halt_exploration_prob": 1.0}), device="cuda", captured=False)
    run.model.exploration = None
    with torch.no_grad():
        run.model.inner.q_head.bias[0] = 5  # everybody wants to halt, but draws 2 or 3 steps first
    head = LossHead(run.model)
    swap(head)
    adam = AdamATan2(head.parameters(), lr=0.0)
    queue = SampleQueue(run.data.draw, 6, "cuda")
    step = CapturedStep(head, [adam], queue, capture=CudaGraphs(warm_steps=2))
    halted = []
    for _ in range(12):
        step()
        halted.append(tuple(step.carry.halted.tolist()))
    assert step.captured and len(set(halted[3:])) > 4
