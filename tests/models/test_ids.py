"""Ids of tokens and puzzles: of any integer dtype, and never those of another row than they say."""

from __future__ import annotations

import pytest
import torch

import recurx
from recurx import InvalidArgument
from recurx.models import TRM, TRMConfig
from recurx.models.puzzle_embedding import PuzzleEmbedding

INPUTS = torch.arange(6).view(2, 3)


def make() -> TRM:
    torch.manual_seed(0)
    model = TRM(TRMConfig.tiny(7, 3, hidden_size=16, puzzle_emb_ndim=16, puzzle_emb_len=1,
                               num_puzzle_identifiers=4, batch_size=2))  # fmt: skip
    model.puzzle_emb.weights.normal_()
    return model


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_every_integer_dtype_means_the_same(dtype: torch.dtype, training: bool) -> None:
    table = PuzzleEmbedding(4, 8, 3, torch.float32, 1.0).train(training)
    ids = torch.tensor([1, 0, 3])
    assert torch.equal(table(ids.to(dtype)), table.weights[ids])
    model = make()
    want = recurx.solve(model, {"inputs": INPUTS, "puzzle_identifiers": ids[1:]}, max_steps=1)
    batch = {"inputs": INPUTS.to(dtype), "puzzle_identifiers": ids[1:].to(dtype)}
    assert torch.equal(recurx.solve(model, batch, max_steps=1).q, want.q)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("arg", "value", "says"),
    [
        ("puzzle_identifiers", torch.tensor([0, -1]), r"ids within 0\.\.3, got -1"),
        ("puzzle_identifiers", torch.tensor([4, 0]), r"ids within 0\.\.3, got 4"),
        ("puzzle_identifiers", torch.tensor([True, False]), "integer ids.*got torch.bool"),
        ("puzzle_identifiers", torch.tensor([1.0, 0.0]), "integer ids.*got torch.float32"),
        ("puzzle_identifiers", torch.tensor([1]), r"shape \[2\], as in the carry, got \[1\]"),
        ("puzzle_identifiers", torch.tensor([[1], [2]]), r"puzzle ids \[B=2\], got \[2, 1\]"),
        ("inputs", INPUTS + 2, r"ids within 0\.\.6, got 7"),
        ("inputs", INPUTS - 1, r"ids within 0\.\.6, got -1"),
        ("inputs", INPUTS.float(), "integer ids.*got torch.float32"),
        ("inputs", INPUTS > 2, "integer ids.*got torch.bool"),
    ],
)
def test_other_ids_are_refused(arg: str, value, says: str, training: bool) -> None:
    model = make().train(training)
    batch = {"inputs": INPUTS, "puzzle_identifiers": torch.tensor([1, 2]), arg: value}
    with pytest.raises(InvalidArgument, match=f"models: argument `.*{arg}.*`: expected {says}"):
        model(model.initial_carry(batch), batch)
