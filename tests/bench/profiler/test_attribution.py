"""Every operator of a step lies in the stage that its source says, forward and backward."""

from __future__ import annotations

import pytest
import torch

import recurx
from recurx.bench.profiler import attribute, roles, stage
from recurx.bench.profiler.fused import OPS
from recurx.bench.profiler.step import initial_carry, random_batch, training_step
from recurx.bench.profiler.tables import make_engines
from recurx.bench.profiler.tracer import Tracer
from recurx.models import HRM, TRM, HRMConfig, TRMConfig
from recurx.train import AdamATan2, Average
from tests import lookalike
from tests.bench.profiler.profile_cases import (
    ATTENTION_STAGES,
    BLOCK_STAGES,
    CASES,
    TOKEN_STAGES,
    build,
    expected_kernels,
    kernels_of,
    profile,
    profiled,
)
from tests.train.simulated import on

EVERY_CASE = pytest.mark.parametrize("case", CASES)


def wrong_stages(found: object, case: str) -> list[str]:
    """What the profile of a lookalike says that its source does not."""
    wrong = []
    for name, expected in expected_kernels(case).items():
        got = kernels_of(found, name)
        if got != expected:
            wrong.append(f"{name}: expected {expected}, got {got}")
    return wrong


@EVERY_CASE
def test_every_operator_is_in_its_stage(case: str) -> None:
    found = profiled(case)
    assert not wrong_stages(found, case)
    names = {row.name for row in found.rows}
    mixer = TOKEN_STAGES if case == "trm-mlp" else ATTENTION_STAGES
    other_mixer = ATTENTION_STAGES if case == "trm-mlp" else TOKEN_STAGES
    assert mixer | BLOCK_STAGES | {"embedding", "lm_head", "q_head", "heads", "loss"} <= names
    assert not names & other_mixer
    assert found.row("other").operators <= 1  # Python after the last operator


@EVERY_CASE
def test_net_calls_cycles_and_blocks(case: str) -> None:
    _, calls, cycle, blocks = CASES[case]
    found = profiled(case)
    assert [c.call for c in found.calls] == list(range(calls))
    assert [c.cycle for c in found.calls] == [n // cycle for n in range(calls)]
    last = "H" if case == "hrm" else "L"
    assert [c.net for c in found.calls] == (["L"] * (cycle - 1) + [last]) * (calls // cycle)
    pairs = {(o.call, o.where.block) for o in found.ops if o.stage == "gate_up"}
    assert len(pairs) == blocks


def plant_swapped_products(patch: pytest.MonkeyPatch) -> None:
    parts = dict(roles.BLOCK_PARTS)
    parts["mlp.gate_up_proj"], parts["mlp.down_proj"] = "down", "gate_up"
    parts["mlp"] = "norm"
    patch.setattr(roles, "BLOCK_PARTS", parts)


def plant_no_rope(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attribute, "_is_core", lambda op: True)


def plant_lost_sums(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attribute, "_INNER", ("io", "lm_head", "q_head"))


def plant_lost_blocks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attribute, "_resolve_block", lambda group: None)


@pytest.mark.parametrize(
    "plant", [plant_swapped_products, plant_no_rope, plant_lost_sums, plant_lost_blocks]
)
def test_a_planted_misattribution_is_seen(plant: object, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)  # type: ignore[operator]
    assert wrong_stages(profile(build("trm")), "trm")


def test_attention_without_rotation_has_no_rope() -> None:
    model = TRM(TRMConfig.tiny(7, 9, pos_encodings="learned"), backend="eager")
    found = recurx.profile(model, batch_size=2, seconds=0.05, halting_steps=0, compare=False)
    names = {row.name for row in found.rows}
    assert "attention" in names and "rope" not in names


# ---- backward, training -------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["trm", "trm-mlp", "hrm"])
def test_backward_operators_belong_to_the_stage_of_their_forward(case: str) -> None:
    found = profile(build(case), train=True)
    window = 2 if case == "hrm" else 3
    blocks = {"trm": 6, "trm-mlp": 6, "hrm": 3}[case]  # of the calls with gradient
    backward = [op for op in found.ops if op.phase == "backward"]
    # Two products, of the input and of the weight, for every product of the window.
    for name in ("gate_up", "down"):
        assert sum(o.name == "mm" for o in backward if o.stage == name) == 2 * blocks
    assert sum(o.name == "silu_backward" for o in backward if o.stage == "swiglu") == blocks
    where = {o.call for o in backward if o.stage == "gate_up"}
    assert len(where) == window and min(where) == CASES[case][1] - window
    attention = [o for o in backward if "scaled_dot_product" in o.name]
    assert all(o.stage == "attention" for o in attention)
    assert len(attention) == (0 if case == "trm-mlp" else blocks)
    assert all(c.backward_ms == 0 for c in found.calls[: CASES[case][1] - window])
    assert all(c.backward_ms > 0 for c in found.calls[CASES[case][1] - window :])


def test_training_step_has_loss_optimiser_and_ema_and_leaves_no_trace() -> None:
    config = HRMConfig.tiny(7, 9, batch_size=2, puzzle_emb_ndim=64, num_puzzle_identifiers=3)
    model = HRM(config, backend="eager")
    optimizer = AdamATan2(model.parameters(), lr=0.1)
    average = Average(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    averages = {k: v.clone() for k, v in average.weights.items()}
    random = torch.get_rng_state()
    model.train()
    found = recurx.profile(
        model, batch_size=2, train=True, optimizer=optimizer, ema=average,
        seconds=0.05, halting_steps=0, compare=False,
    )  # fmt: skip
    for name in ("loss", "optimizer", "ema", "optimizer: sign SGD of puzzle rows", "gradients"):
        assert found.row(name).operators, name
    assert kernels_of(found, "optimizer")["atan2"] == len(list(model.parameters()))
    assert found.row("other").share < 0.05
    assert {c.recursion for c in found.calls} == {0, 1}  # Q-learning looks one step ahead
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(v, averages[k]) for k, v in average.weights.items())
    assert average.updates == 0 and not optimizer.state and model.training
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_a_step_of_the_users_own() -> None:
    model = build("trm")
    carry, batch = lookalike.inputs(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    average = Average(model)

    def step() -> None:
        with stage("augmentation"):
            torch.ones(3).add_(1)
        _, _, loss = model(carry, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(model)

    found = recurx.profile(
        model, run=step, ema=average, seconds=0.05, halting_steps=0, compare=False
    )
    assert found.row("augmentation").operators == 2
    assert found.row("optimizer").operators and found.row("ema").operators
    assert "update" not in vars(average)
    assert found.row("gate_up").backward_ms > 0


# ---- recurx's models and patched code -----------------------------------------------------------


@pytest.mark.parametrize("mlp_t", [False, True])
def test_reference_backend_has_the_stages_of_the_official_text(mlp_t: bool) -> None:
    model = TRM(TRMConfig.tiny(7, 9, mlp_t=mlp_t, H_cycles=2, L_cycles=2), backend="eager")
    found = recurx.profile(model, batch_size=2, seconds=0.05, halting_steps=0, compare=False)
    blocks = 12
    assert kernels_of(found, "inject") == {"add": 10}
    for name in ("gate_up", "down"):
        assert kernels_of(found, name)["mm"] == blocks
    assert kernels_of(found, "swiglu") == {"silu": blocks, "mul": blocks}
    assert kernels_of(found, "norm")["rsqrt"] == (blocks if mlp_t else 2 * blocks)
    if mlp_t:
        assert kernels_of(found, "t_norm")["rsqrt"] == blocks
        assert kernels_of(found, "t_swiglu") == {"silu": blocks, "mul": blocks}
    else:
        assert kernels_of(found, "rope")["neg"] == 2 * blocks
        assert kernels_of(found, "qkv")["mm"] == blocks
        assert kernels_of(found, "o")["mm"] == blocks
    assert [c.call for c in found.calls] == list(range(6))
    assert [c.cycle for c in found.calls] == [0, 0, 0, 1, 1, 1]


def test_a_fused_recursion_is_one_operator_with_the_engines_split() -> None:
    model = TRM(TRMConfig.tiny(7, 9), backend="cpu")
    found = recurx.profile(model, batch_size=2, seconds=0.05, halting_steps=0, compare=False)
    (engine,) = found.engines
    assert "calls 0..20 of 21" in engine.label and engine.flops > 0
    phases = {phase for phase, _, _ in engine.phases}
    assert {"qkv", "attention", "o", "gate_up", "down"} <= phases
    assert sum(ms for _, ms, _ in engine.phases) == pytest.approx(engine.ms)
    assert found.row("recursion").launches == 1 and not found.calls
    assert not {"qkv", "norm", "inject"} & {row.name for row in found.rows}
    assert found.row("embedding").operators and found.row("lm_head").operators


def test_a_patched_model_and_its_training_window() -> None:
    model = build("trm")
    with recurx.patch(model):
        found = profile(model)
        assert found.row("recursion").launches == 1
        assert any("runs on recurx already" in line for line in found.advice)
        trained = profile(model, train=True)
    before, *window = [engine.label for engine in trained.engines]
    assert "calls 0..2 of 6" in before and len(window) == 2
    assert all("calls 3..5 of 6" in label for label in window)
    assert trained.row("recursion").backward_ms > 0
    assert not profile(model).engines  # the patch is gone


def test_the_window_of_a_backend_is_a_fused_recursion_too() -> None:
    """One operator for the calls before it, one for its forward, one for its backward."""
    config = TRMConfig.tiny(5, 4, H_cycles=2, L_cycles=1, L_layers=1, hidden_size=32, num_heads=1)
    model = TRM(config, backend="triton")
    batch = random_batch(model, 1)
    step = training_step(model.train(), batch, initial_carry(model, batch), [], None)
    with on("triton"):
        trace = Tracer(roles.roles_of(step.model)).record(step.model, step)
    attribute.resolve(trace)
    fused = [op for op in trace.ops if op.name in OPS]
    assert [op.name.partition("::")[2] for op in fused] == ["recurse", "window", "window_backward"]
    assert [op.phase for op in fused] == ["forward", "forward", "backward"]
    assert {op.stage for op in fused} == {"recursion"}
    prefix, forward, backward = make_engines(fused, [1.0, 2.0, 3.0])
    assert prefix.label.startswith("triton: forward of calls 0..1 of 4")
    assert forward.label.startswith("triton: forward of calls 2..3 of 4")
    assert backward.label.startswith("triton: backward of calls 2..3 of 4")
    assert backward.flops == 2 * forward.flops == 2 * prefix.flops > 0


def test_the_gradient_of_a_fused_op_is_its_stages_backward() -> None:
    """PyTorch runs the forward of an autograd.Function, as these ops are, without gradient."""
    model = TRM(TRMConfig.tiny(7, 9, H_cycles=2, L_cycles=1), backend="cpu")
    model.inner.save = "states"
    found = recurx.profile(
        model, batch_size=2, train=True, seconds=0.05, halting_steps=0, compare=False
    )
    assert found.engines[-1].label.startswith("cpu: backward of calls 2..3 of 4")
    assert found.row("recursion").backward_ms > 0
    assert not any(row.backward_ms for row in found.rows if row.name in ATTENTION_STAGES)


def test_foreign_code_is_shown_by_its_modules() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    found = recurx.profile(
        model, run=lambda: model(torch.ones(2, 4)), seconds=0.05, halting_steps=0
    )
    assert {"module 0", "module 1"} <= {row.name for row in found.rows}
    assert any("finds no recursion" in line for line in found.advice)


# ---- lucidrains ----------------------------------------------------------------------------------


def test_lucidrains_package() -> None:
    """Its network is any module: a net call each, without stages inside."""
    lucid = pytest.importorskip("tiny_recursive_model")
    network = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.GELU())
    model = lucid.TinyRecursiveModel(
        dim=16, num_tokens=8, network=network, num_refinement_blocks=3, num_latent_refinements=4
    )
    ids = torch.zeros(2, 12, dtype=torch.long)

    def step() -> None:
        outputs, latents = model.get_initial()
        loss, *_ = model(ids, outputs, latents, labels=ids)
        loss.backward()

    found = recurx.profile(model, run=step, seconds=0.05, halting_steps=0, compare=False)
    assert [c.call for c in found.calls] == list(range(15))
    assert [c.cycle for c in found.calls] == [n // 5 for n in range(15)]
    assert found.row("foreign").share > 0.3 and found.row("inject").operators
    assert any("foreign code" in line for line in found.advice)
    with recurx.patch(model):
        patched = recurx.profile(model, run=step, seconds=0.05, halting_steps=0, compare=False)
    assert [c.call for c in patched.calls] == list(range(15))
    assert kernels_of(patched, "foreign") == kernels_of(found, "foreign")
