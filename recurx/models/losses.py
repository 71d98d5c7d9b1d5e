"""Losses of deep supervision: token cross-entropy and halting, as the papers train them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recurx.errors import bad_argument
from recurx.models.act import Carry
from recurx.models.stablemax import IGNORE, fused_stablemax_cross_entropy


def stablemax_cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = IGNORE) -> Tensor:
    """-log of s(logit of the label) / sum s, per token, in fp64; 0 where ignored.

    s(x) = x + 1 for x >= 0, 1 / (1 - x) below: softmax without its exponential, so that fp32
    logits cannot absorb a gradient (arXiv 2501.04697).

    Args:
        logits: [..., vocab], any floating dtype.
        labels: [...], integers.

    Returns:
        [...] fp64.
    """
    wide = logits.to(torch.float64)
    s = torch.where(wide < 0, 1 / (1 - wide.clamp(max=0)), wide + 1)
    log_p = s.log() - s.sum(-1, keepdim=True).log()
    valid = labels != ignore_index
    picked = log_p.gather(-1, torch.where(valid, labels, 0).long().unsqueeze(-1)).squeeze(-1)
    return -torch.where(valid, picked, 0)


def softmax_cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = IGNORE) -> Tensor:
    """Ordinary cross-entropy per token, in fp32; 0 where ignored. Shapes as for stablemax."""
    flat = logits.to(torch.float32).reshape(-1, logits.shape[-1])
    loss = F.cross_entropy(
        flat, labels.reshape(-1).long(), ignore_index=ignore_index, reduction="none"
    )
    return loss.view(labels.shape)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "stablemax_cross_entropy": stablemax_cross_entropy,
    "fused_stablemax_cross_entropy": fused_stablemax_cross_entropy,
    "softmax_cross_entropy": softmax_cross_entropy,
}

HALT_WEIGHT = 0.5  # as published


class ACTLossHead(nn.Module):
    """A model with its loss: the module that the official training loop holds.

    Args:
        model: a `TRM`, an `HRM`, or anything with their call contract; its parameters are
            named `model.*`.
        loss_type: "stablemax_cross_entropy" (published, fp64), "fused_stablemax_cross_entropy"
            (the same without fp64) or "softmax_cross_entropy".
        halt_weight: of the halting losses beside that of the tokens, which is a mean over them.
            In a tiny net the published 0.5 can outweigh the tokens: most of them are right while
            hardly any whole answer is.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_type: str = "stablemax_cross_entropy",
        halt_weight: float = HALT_WEIGHT,
    ) -> None:
        super().__init__()
        if loss_type not in LOSSES:
            raise bad_argument("ACTLossHead", "loss_type", f"one of {list(LOSSES)}", loss_type)
        self.model = model
        self.loss_fn = LOSSES[loss_type]
        self.halt_weight = halt_weight
        # From (new carry, token losses [B]): weights [B] of these, and of the halting losses; it
        # may change which slots halt.
        self.weigh: Callable[[Carry, Tensor], tuple[Tensor, Tensor]] | None = None

    def initial_carry(self, batch: dict[str, Tensor]) -> Any:
        """See `RecursiveModel.initial_carry`; `batch` needs "labels" [B, seq_len]."""
        return self.model.initial_carry(batch)

    def forward(
        self, return_keys: Sequence[str] = (), **model_kwargs: Any
    ) -> tuple[Carry, Tensor, dict[str, Tensor], dict[str, Tensor], Tensor]:
        """One supervision step with its loss.

        Args:
            return_keys: outputs to return, of "logits", "preds", "q_halt_logits", ...
            model_kwargs: `carry` and `batch` of the model.

        Returns:
            The new carry; the loss summed over the batch (divide by the batch size); metrics,
            each a sum over the samples that halted in this step, with their "count"; the asked
            outputs, detached; and whether all slots halted (a 0-d bool tensor).
        """
        carry, outputs = self.model(**model_kwargs)
        labels = carry.current_data["labels"]
        counted = labels != IGNORE
        tokens = counted.sum(-1)
        per_sample = tokens.clamp_min(1).unsqueeze(-1)  # samples without labels: no 0/0

        outputs["preds"] = outputs["logits"].detach().argmax(-1)
        correct = counted & (outputs["preds"] == labels)
        solved = correct.sum(-1) == tokens

        losses, of_q = self.loss_fn(outputs["logits"], labels) / per_sample, None
        if self.weigh is not None:
            of_tokens, of_q = self.weigh(carry, losses.detach().sum(-1))
            losses, of_q = losses * of_tokens[:, None], of_q.float()
        lm_loss = losses.sum()
        q_loss = _q_loss(outputs["q_halt_logits"], solved, of_q)
        loss = lm_loss + self.halt_weight * q_loss
        metrics = _metrics(carry, outputs["q_halt_logits"].detach(), tokens, correct, solved)
        metrics.update(lm_loss=lm_loss.detach(), q_halt_loss=q_loss.detach())
        if "target_q_continue" in outputs:
            continue_loss = _q_loss(
                outputs["q_continue_logits"], outputs["target_q_continue"], of_q
            )
            loss = loss + self.halt_weight * continue_loss
            metrics["q_continue_loss"] = continue_loss.detach()

        returned = {key: outputs[key].detach() for key in return_keys if key in outputs}
        return carry, loss, metrics, returned, carry.halted.all()


def _q_loss(logits: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    target = target.to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, target, weight, reduction="sum")


def _metrics(
    carry: Carry, q_halt: Tensor, tokens: Tensor, correct: Tensor, solved: Tensor
) -> dict[str, Tensor]:
    """Sums over the samples that halted now and have labels."""
    done = carry.halted & (tokens > 0)
    accuracy = correct.sum(-1) / tokens.clamp_min(1)
    return {
        "count": done.sum(),
        "accuracy": torch.where(done, accuracy, 0).sum(),
        "exact_accuracy": (done & solved).sum(),
        "q_halt_accuracy": (done & ((q_halt >= 0) == solved)).sum(),
        "steps": torch.where(done, carry.steps, 0).sum(),
    }
