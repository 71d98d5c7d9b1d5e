"""recurx.models: configuration, names, ACT bookkeeping, puzzle embedding, tracing."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from recurx import InvalidArgument, Schedule, backends
from recurx.models import (
    HRM,
    TRM,
    ACTLossHead,
    Carry,
    HRMConfig,
    ModelConfig,
    PuzzleEmbedding,
    TRMConfig,
    problem_of_model,
)
from recurx.models.act import RecursiveModel
from recurx.models.layers import truncated_normal_

VOCAB, LENGTH = 7, 9
PUZZLES = dict(puzzle_emb_ndim=64, puzzle_emb_len=2, num_puzzle_identifiers=5, batch_size=6)
CONFIGS = {
    "trm": TRMConfig.tiny(VOCAB, LENGTH, **PUZZLES),
    "mlp": TRMConfig.tiny(VOCAB, LENGTH, mlp_t=True, pos_encodings="none"),
    "single_z": TRMConfig.tiny(VOCAB, LENGTH, variant="single_z", pos_encodings="learned"),
    "hier6": TRMConfig.tiny(VOCAB, LENGTH, variant="hier6", **{**PUZZLES, "puzzle_emb_ndim": 100}),
    "hrm": HRMConfig.tiny(VOCAB, LENGTH, **PUZZLES),
}
EVERY_CONFIG = pytest.mark.parametrize("kind", CONFIGS)


def build(kind: str, backend: str = "eager", **changes: Any) -> RecursiveModel:
    torch.manual_seed(0)
    config = CONFIGS[kind].replace(**changes)
    return (HRM if kind == "hrm" else TRM)(config, backend=backend)


def batch(size: int = 4, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "inputs": torch.randint(0, VOCAB, (size, LENGTH), generator=generator),
        "labels": torch.randint(0, VOCAB, (size, LENGTH), generator=generator),
        "puzzle_identifiers": torch.randint(0, 5, (size,), generator=generator),
    }


def set_q(model: RecursiveModel, halt: float, go_on: float = 0.0) -> None:
    """Constant q logits: the weights are zero at the start."""
    with torch.no_grad():
        model.inner.q_head.bias.copy_(torch.tensor([halt, go_on]))


# ---- configuration -------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_configurations_survive_json_and_print(config: ModelConfig) -> None:
    assert type(config).from_json(config.to_json()) == config
    assert eval(repr(config)) == config
    assert hash(config) == hash(type(config).from_json(config.to_json()))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.vocab_size = 3  # type: ignore[misc]


def test_presets_have_the_published_shapes() -> None:
    att, mlp, hrm = TRMConfig.sudoku_att(), TRMConfig.sudoku_mlp(), HRMConfig.sudoku()
    assert (att.tokens, att.inner_width(512), len(att.schedule), att.schedule.window) == (
        97, 1536, 21, 7,
    )  # fmt: skip
    assert (mlp.tokens, mlp.inner_width(97), mlp.pos_encodings) == (97, 512, "none")
    assert (hrm.tokens, len(hrm.schedule), hrm.schedule.window) == (82, 6, 2)
    for big in (TRMConfig.arc(num_puzzle_identifiers=3), TRMConfig.maze()):
        assert (big.tokens, len(big.schedule)) == (916, 15)
    net = sum(p.numel() for p in TRM(att).inner.L_level.parameters())
    assert net == 6_815_744  # 13.6 MB in bf16


def test_official_keys_are_accepted() -> None:
    arch = {
        "name": "recursive_reasoning.trm_singlez@Some_ACTV1", "loss": {"name": "x"},
        "causal": False, "vocab_size": VOCAB, "seq_len": LENGTH, "hidden_size": 64,
        "num_heads": 2, "expansion": 4, "H_cycles": 3.0, "H_layers": 0,
    }  # fmt: skip
    config = TRMConfig.from_dict(arch)
    assert config.variant == "single_z" and config.H_cycles == 3 and config.expansion == 4.0
    assert TRM(arch).config == config
    assert TRM(vocab_size=VOCAB, seq_len=LENGTH, hidden_size=64).config.hidden_size == 64


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"num_heads": 3}, "num_heads.*divisor of hidden_size=64"),
        ({"num_heads": 64}, "even head_dim"),
        ({"vocab_size": 0}, "vocab_size.*at least 1"),
        ({"seq_len": "9"}, "seq_len.*an int"),
        ({"mlp_t": 1}, "mlp_t.*True or False"),
        ({"variant": "hrm"}, "variant.*one of trm, single_z, hier6"),
        ({"variant": "hier6", "L_cycles": 7}, "at most n=6"),
        ({"pos_encodings": "alibi"}, "one of rope, learned, none"),
        ({"forward_dtype": "int8"}, "forward_dtype.*one of bfloat16"),
        ({"puzzle_emb_ndim": 65, "puzzle_emb_len": 1}, "at most puzzle_emb_len x hidden_size"),
        ({"halt_exploration_prob": 1.5}, "within 0..1"),
        ({"expansion": 0}, "expansion.*positive"),
        ({"grad_window": 99}, r"1\.\.21 or 'full'"),
        ({"hidden": 3}, "hidden.*one of the fields vocab_size"),
    ],
)
def test_bad_configurations_name_the_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        CONFIGS["trm"].replace(**changes)
    with pytest.raises(InvalidArgument, match="HRMConfig"):
        HRM(CONFIGS["trm"])


def test_the_window_is_configurable() -> None:
    assert build("trm", grad_window="full").inner.schedule == Schedule.trm(3, 6, window="full")
    assert build("hrm", grad_window=4).inner.schedule == Schedule.hrm(2, 2, window=4)


# ---- names and start -----------------------------------------------------------------------


def test_parameter_names_are_the_official_ones() -> None:
    head = ["inner.embed_tokens.embedding_weight", "inner.lm_head.weight"]
    head += ["inner.q_head.weight", "inner.q_head.bias"]
    att = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]
    mlp = ["mlp_t.gate_up_proj", "mlp_t.down_proj", "mlp.gate_up_proj", "mlp.down_proj"]

    def blocks(level: str, count: int, parts: list[str]) -> list[str]:
        return [f"inner.{level}.layers.{n}.{part}.weight" for n in range(count) for part in parts]

    both = ["inner.H_init", "inner.L_init"]
    table, learned = ["inner.puzzle_emb.weights"], ["inner.embed_pos.embedding_weight"]
    expected = {
        "trm": head + table + both + blocks("L_level", 2, att),
        "mlp": head + both + blocks("L_level", 2, mlp),
        "single_z": head + learned + ["inner.L_init"] + blocks("L_level", 2, att),
        "hier6": head
        + table
        + ["inner.H_init", *(f"inner.L{k}_init" for k in range(1, 7))]
        + blocks("L_level", 2, att),
        "hrm": head + table + both + blocks("H_level", 1, att) + blocks("L_level", 1, att),
    }
    for kind, names in expected.items():
        assert sorted(build(kind).state_dict()) == sorted(names), kind


def test_the_start_is_the_published_one() -> None:
    model = build("trm")
    assert not model.inner.q_head.weight.any()
    assert (model.inner.q_head.bias == -5).all()
    assert not model.puzzle_emb.weights.any()
    sample = truncated_normal_(torch.empty(200_000), std=0.5)
    assert abs(sample.std().item() - 0.5) < 0.01
    assert sample.abs().max() < 0.5 * 2.28  # two of the sigmas before truncation
    assert sample.abs().max() > 0.5 * 2.2
    assert abs(sample.mean().item()) < 0.01
    weight = build("trm", hidden_size=512, num_heads=8).inner.lm_head.weight
    assert abs(weight.std().item() * 512**0.5 - 1) < 0.05


# ---- one supervision step ------------------------------------------------------------------


@EVERY_CONFIG
def test_every_parameter_gets_gradient_and_copies_agree(kind: str) -> None:
    model = build(kind)
    head = ACTLossHead(model)
    carry, loss, *_ = head(carry=head.initial_carry(batch()), batch=batch())
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    copied = copy.deepcopy(head)
    loaded = pickle.loads(pickle.dumps(head))
    for other in (copied, loaded):
        again = other(carry=other.initial_carry(batch()), batch=batch())
        assert torch.equal(again[1], loss)
    assert all(not state.requires_grad for state in carry.inner_carry.values())


@EVERY_CONFIG
def test_backends_agree_in_evaluation(kind: str) -> None:
    results = {}
    for name in backends.ORDER:
        if backends.why_not(name, problem_of_model(build(kind))):
            continue
        model = build(kind, backend=name).eval()
        with torch.no_grad():
            results[name] = model(model.initial_carry(batch()), batch())[1]["logits"]
    for name, logits in results.items():
        torch.testing.assert_close(logits, results["eager"], rtol=1e-3, atol=1e-3, msg=name)


@EVERY_CONFIG
def test_inner_and_loss_head_trace_whole(kind: str) -> None:
    torch._dynamo.reset()
    model = build(kind, H_cycles=1)
    head = ACTLossHead(model)
    carry = head.initial_carry(batch())
    torch.manual_seed(5)
    want = head(carry=carry, batch=batch(), return_keys=["logits"])
    torch.manual_seed(5)
    compiled = torch.compile(head, fullgraph=True, backend="eager")
    got = compiled(carry=carry, batch=batch(), return_keys=["logits"])
    torch.testing.assert_close(got[3]["logits"], want[3]["logits"])
    torch.testing.assert_close(got[1], want[1])
    assert torch.equal(got[0].halted, want[0].halted)


def test_inputs_of_the_wrong_shape_are_named() -> None:
    model = build("trm")
    short = {"inputs": torch.zeros(2, 3, dtype=torch.long)}
    with pytest.raises(InvalidArgument, match=r"inputs.*seq_len=9\].*\[2, 3\]"):
        model(model.initial_carry(short), short)
    missing = {"inputs": batch()["inputs"]}
    with pytest.raises(InvalidArgument, match="puzzle_identifiers"):
        model(model.initial_carry(missing), missing)


def test_backend_can_be_changed_and_is_checked() -> None:
    model = build("mlp")
    model.backend = "no such backend"
    with pytest.raises(InvalidArgument, match="backend"):
        model(model.initial_carry(batch()), batch())


# ---- ACT -----------------------------------------------------------------------------------


def run(model: RecursiveModel, steps: int) -> list[Carry]:
    carry = model.initial_carry(batch())
    carries = []
    for number in range(steps):
        carry, _ = model(carry, batch(seed=number))
        carries.append(carry)
    return carries


def test_evaluation_takes_all_the_steps_whatever_q_says() -> None:
    model = build("trm", halt_max_steps=3).eval()
    set_q(model, +9)
    carries = run(model, 4)
    assert [c.steps.unique().tolist() for c in carries] == [[1], [2], [3], [1]]
    assert [c.halted.all().item() for c in carries] == [False, False, True, False]


def test_a_model_has_no_mask_of_keys() -> None:
    with pytest.raises(InvalidArgument, match="key_padding"):
        TRMConfig.tiny(VOCAB, LENGTH, block="key_padding:true")


def test_mkl_has_found_the_processor_before_anything_is_drawn() -> None:
    """Two threads that made its first call of a vector function at once drew other weights."""
    code = (
        "import torch; own, sizes = torch.erfinv, []; torch.set_default_device('meta'); "
        "torch.erfinv = lambda x: (sizes.append((x.numel(), x.device.type)), own(x))[1]; "
        "import recurx.models; assert sizes == [(1, 'cpu')], sizes"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_halted_slots_take_a_fresh_sample_and_start_again() -> None:
    model = build("trm", halt_max_steps=8, halt_exploration_prob=0.0).eval()
    first, second = batch(seed=1), batch(seed=2)
    carry, _ = model(model.initial_carry(first), first)
    halted = torch.tensor([True, False, False, True])
    mixed = dataclasses.replace(carry, halted=halted)
    after, outputs = model(mixed, second)
    assert after.steps.tolist() == [1, 2, 2, 1]
    for key, value in after.current_data.items():
        assert torch.equal(value[halted], second[key][halted]), key
        assert torch.equal(value[~halted], first[key][~halted]), key
    fresh, fresh_outputs = model(model.initial_carry(second), second)
    going, going_outputs = model(carry, second)
    for name, state in after.inner_carry.items():
        torch.testing.assert_close(state[halted], fresh.inner_carry[name][halted])
        torch.testing.assert_close(state[~halted], going.inner_carry[name][~halted])
    torch.testing.assert_close(outputs["logits"][halted], fresh_outputs["logits"][halted])
    torch.testing.assert_close(outputs["logits"][~halted], going_outputs["logits"][~halted])


@pytest.mark.parametrize("kind,go_on", [("trm", 9.0), ("hrm", 0.0)])
def test_training_halts_by_q(kind: str, go_on: float) -> None:
    model = build(kind, halt_max_steps=4, halt_exploration_prob=0.0).train()
    set_q(model, +1, go_on)  # TRM compares with zero, HRM with q_continue
    assert run(model, 1)[0].halted.all()
    set_q(model, -1, go_on)
    carries = run(model, 4)
    assert [c.halted.any().item() for c in carries] == [False, False, False, True]
    assert carries[3].halted.all()


def test_exploration_draws_a_uniform_minimum_of_steps() -> None:
    """q always wants to halt: only explored minima of 2..4 steps keep a sample going."""
    small = dict(H_cycles=1, L_cycles=1, L_layers=1)
    model = build("mlp", halt_max_steps=4, halt_exploration_prob=0.5, **small).train()
    set_q(model, +9)
    slots = 3000
    data = {"inputs": torch.zeros(slots, LENGTH, dtype=torch.long)}
    carry = model.initial_carry(data)
    with torch.no_grad():
        torch.manual_seed(3)
        after, _ = model(carry, data)
        kept = 1 - after.halted.float().mean().item()
        assert abs(kept - 0.5) < 0.04, "half of the samples explore; every minimum exceeds 1"
        second = dataclasses.replace(after, halted=torch.zeros_like(after.halted))
        after, _ = model(second, data)
    kept = 1 - after.halted.float().mean().item()
    assert abs(kept - 0.5 * 2 / 3) < 0.04, "minima 3 and 4 of 2, 3, 4 keep an explorer"


def test_q_learning_target_is_the_next_step() -> None:
    model = build("hrm", halt_max_steps=3, halt_exploration_prob=0.0).train()
    with torch.no_grad():
        model.inner.q_head.weight.normal_(generator=torch.Generator().manual_seed(0))
    carry, outputs = model(model.initial_carry(batch()), batch())
    with torch.no_grad():
        _, _, (halt, go_on) = model.inner(carry.inner_carry, batch())
    torch.testing.assert_close(
        outputs["target_q_continue"], torch.sigmoid(torch.maximum(halt, go_on))
    )
    last = dataclasses.replace(carry, steps=torch.full_like(carry.steps, 2))
    last = dataclasses.replace(last, halted=torch.zeros_like(carry.halted))
    carry, outputs = model(last, batch())
    with torch.no_grad():
        _, _, (halt, _) = model.inner(carry.inner_carry, batch())
    torch.testing.assert_close(outputs["target_q_continue"], torch.sigmoid(halt))
    assert "target_q_continue" not in model.eval()(model.initial_carry(batch()), batch())[1]


def test_q_learning_trains_a_trm_too() -> None:
    """The published TRM code crashes here: it unpacks five values of three."""
    head = ACTLossHead(build("trm", no_ACT_continue=False)).train()
    _, loss, metrics, _, _ = head(carry=head.initial_carry(batch()), batch=batch())
    loss.backward()
    expected = metrics["lm_loss"] + 0.5 * (metrics["q_halt_loss"] + metrics["q_continue_loss"])
    torch.testing.assert_close(loss.detach(), expected)


def test_batches_that_do_not_fit_the_carry_are_named() -> None:
    model = build("trm")
    carry = model.initial_carry(batch())
    with pytest.raises(InvalidArgument, match="number of slots"):
        model(carry, batch(3))
    with pytest.raises(InvalidArgument, match="keys of the carry"):
        model(carry, {"inputs": batch()["inputs"]})


# ---- puzzle embedding ----------------------------------------------------------------------


def table(rows: int = 10, room: int = 4) -> PuzzleEmbedding:
    torch.manual_seed(0)
    return PuzzleEmbedding(rows, 6, room, torch.float32, init_std=1.0)


def test_only_rows_of_the_batch_are_updated_by_sign_sgd() -> None:
    embedding = table()
    before = embedding.weights.clone()
    ids = torch.tensor([7, 2, 7])
    direction = torch.randn(3, 6)
    (embedding(ids) * direction).sum().backward()
    assert embedding.weights.grad is None and not embedding.weights.requires_grad
    embedding.sign_sgd_(lr=0.1, weight_decay=0.5)
    expected = before.clone()
    expected[7] = before[7] * 0.95 - 0.1 * torch.sign(direction[0] + direction[2])
    expected[2] = before[2] * 0.95 - 0.1 * torch.sign(direction[1])
    torch.testing.assert_close(embedding.weights, expected)
    embedding.sign_sgd_(lr=0.1)  # no new backward: nothing to do
    torch.testing.assert_close(embedding.weights, expected)


def test_rows_of_a_moved_table_still_learn() -> None:
    embedding = table().double()
    embedding(torch.tensor([1, 2])).sum().backward()
    assert embedding.local_weights.is_leaf and embedding.local_weights.grad.abs().sum() == 12


def test_evaluation_reads_the_table_and_training_batches_are_bounded() -> None:
    embedding = table()
    ids = torch.tensor([1, 1, 9, 0, 3])
    assert torch.equal(embedding.eval()(ids), embedding.weights[ids])
    with pytest.raises(InvalidArgument, match="batch_size=5"):
        embedding.train()(ids)
    assert embedding(ids[:0]).shape == (0, 6)
    assert sorted(embedding.state_dict()) == ["weights"]


def test_a_model_learns_its_puzzles() -> None:
    head = ACTLossHead(build("trm", num_puzzle_identifiers=4))
    data = batch() | {"puzzle_identifiers": torch.arange(4)}
    _, loss, *_ = head(carry=head.initial_carry(data), batch=data)
    loss.backward()
    head.model.puzzle_emb.sign_sgd_(lr=0.01)
    moved = head.model.puzzle_emb.weights.abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.01))
    _, better, *_ = head(carry=head.initial_carry(data), batch=data)
    assert better < loss
