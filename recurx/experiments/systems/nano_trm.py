"""nano-trm's TRM, a LightningModule: its `inner_forward` with the recursion on recurx.

The recursion is TRM's, and names differ from the official code's: `lenet`, `input_embedding`,
`hparams` for `config`, batches with "input" and "output", and a q head of one output.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from recurx.patching.official import Official


class Nano(Official):
    """Adapter of nano-trm's code (see `Adapter`)."""

    method = "inner_forward"
    inputs, labels, rotary = "input", "output", "pos_embedding"
    needed = (
        "input_embedding", "lm_head", "q_head", "lenet", "hparams", "puzzle_emb_len", "z_H_init",
        "z_L_init",
    )  # fmt: skip
    carry_takes = ("batch_size", "device")
    one_q = True

    def settings(self, module: Any) -> Any:
        return module.hparams

    def resembles(self, module: nn.Module) -> bool:
        return {"lenet", "lm_head"} <= module._modules.keys()

    def resembles_class(self, cls: type) -> bool:
        return all(hasattr(cls, name) for name in ("inner_forward", "reset_carry"))

    def variant(self, module: nn.Module) -> str | None:
        return "trm"

    def nets(self, module: Any) -> dict[str, str]:
        return {"L": "lenet"}
