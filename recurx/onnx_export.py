"""`recurx.export_onnx`: one supervision step as an ONNX file, for other engines."""

from __future__ import annotations

import copy
import importlib.util
import os
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from recurx.atomic import replacing
from recurx.errors import InvalidArgument, bad_argument
from recurx.models.act import RecursiveModel

NEEDED = ("onnx", "onnxscript")


class Step(nn.Module):
    """One supervision step with tensors alone: tokens, puzzle ids and states in; states, logits,
    q_halt and q_continue out."""

    def __init__(self, model: RecursiveModel) -> None:
        super().__init__()
        self.inner = model.inner
        self.states = model.inner.schedule.states

    def forward(self, inputs: Tensor, puzzle_identifiers: Tensor, *carry: Tensor) -> tuple[Tensor]:
        # Other engines index by int64 alone.
        batch = {"inputs": inputs, "puzzle_identifiers": puzzle_identifiers.long()}
        states, logits, q = self.inner(dict(zip(self.states, carry, strict=True)), batch)
        return (*(states[name] for name in self.states), logits, *q)


def export_onnx(model: RecursiveModel, path: str | Path, batch_size: int = 1) -> None:
    """Write one supervision step of a model, weights included (shared by all net calls).

    Its inputs are `inputs` [B, seq_len] int32, `puzzle_identifiers` [B] int32 and each state
    [B, T, D]; its outputs `new_STATE`, `logits` [B, seq_len, vocab], `q_halt` and `q_continue` [B].
    Halting stays with the caller. All in the model's dtype: CPU engines want float32, whose
    products OpenVINO rounds to bf16 if it is told so.

    Args:
        model: a `TRM` or an `HRM`, on the CPU. It is left alone: a copy is exported.
        path: one file, whose weights must stay below the 2 GB of the format.
        batch_size: B, which is fixed.

    Raises:
        InvalidArgument: another model, or one with feedback; or onnx and onnxscript are missing.
    """
    if not isinstance(model, RecursiveModel):
        kind = type(model).__name__
        raise bad_argument("export_onnx", "model", "a recurx.models.TRM or HRM", kind)
    if model.config.feedback:
        raise bad_argument("export_onnx", "feedback", "'', none", repr(model.config.feedback))
    config, states = model.config, list(model.inner.schedule.states)
    example = (
        torch.ones(batch_size, config.seq_len, dtype=torch.int32),
        torch.zeros(batch_size, dtype=torch.int32),
        *model.inner.empty_carry(batch_size).values(),
    )
    own = copy.deepcopy(model).eval()
    own.backend = "eager"
    names = [*(f"new_{name}" for name in states), "logits", "q_halt", "q_continue"]
    write(Step(own), example, path, ["inputs", "puzzle_identifiers", *states], names)


def write(
    part: nn.Module, example: tuple[Tensor, ...], path: str | Path, inputs: list[str],
    outputs: list[str],
) -> None:  # fmt: skip
    """Write a module of tensors under these names, of the sizes of `example`; the same errors."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise InvalidArgument(
            f"recurx.export_onnx: needs {' and '.join(missing)}; run: pip install 'recurx[onnx]'."
        )
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's exporter, about its own insides
        program = torch.onnx.export(
            part, example, dynamo=True, verbose=False, input_names=inputs, output_names=outputs
        )
    assert program is not None
    with replacing(Path(path)) as unfinished:
        program.save(os.fspath(unfinished), external_data=False)
