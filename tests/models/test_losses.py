"""Losses and metrics of deep supervision against their formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recurx import InvalidArgument
from recurx.models import ACTLossHead, Carry, softmax_cross_entropy, stablemax_cross_entropy


def logits_and_labels() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(0, 5, (3, 4))
    labels[0, :2] = -100
    return 3 * torch.randn(3, 4, 5, dtype=torch.float64), labels


def test_stablemax_is_its_formula() -> None:
    logits, labels = logits_and_labels()
    logits[0, 3, 1], logits[1, 0, 0] = 0.0, 1.0
    loss = stablemax_cross_entropy(logits, labels)
    for index in torch.cartesian_prod(torch.arange(3), torch.arange(4)).tolist():
        row, label = logits[tuple(index)].tolist(), labels[tuple(index)].item()
        s = [x + 1 if x >= 0 else 1 / (1 - x) for x in row]
        want = 0.0 if label == -100 else -torch.tensor(s[label] / sum(s)).log().item()
        assert loss[tuple(index)].item() == pytest.approx(want, rel=1e-6)


def test_losses_are_differentiable_and_wide() -> None:
    logits, labels = logits_and_labels()
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: stablemax_cross_entropy(x, labels), logits)
    for dtype in (torch.bfloat16, torch.float32):
        assert stablemax_cross_entropy(logits.to(dtype), labels).dtype == torch.float64
        assert softmax_cross_entropy(logits.to(dtype), labels).dtype == torch.float32
    want = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
    torch.testing.assert_close(softmax_cross_entropy(logits, labels), want.view(3, 4))


class Fixed(nn.Module):
    """A model that answers what it is told."""

    def __init__(self, carry: Carry, outputs: dict[str, Tensor]) -> None:
        super().__init__()
        self.result = carry, outputs

    def forward(self, carry: Carry, batch: dict[str, Tensor]) -> tuple[Carry, dict[str, Tensor]]:
        return self.result[0], dict(self.result[1])


def fixed_head(loss_type: str = "stablemax_cross_entropy", **more: float) -> ACTLossHead:
    labels = torch.tensor([[1, 2, -100], [0, 0, 0], [2, 2, 2], [-100, -100, -100]])
    answers = torch.tensor([[1, 2, 0], [0, 0, 1], [2, 2, 2], [0, 0, 0]])
    carry = Carry(
        inner_carry={}, steps=torch.tensor([3, 5, 2, 9]),
        halted=torch.tensor([True, True, False, True]), current_data={"labels": labels},
    )  # fmt: skip
    outputs = {
        "logits": 4 * F.one_hot(answers, 3).float(),
        "q_halt_logits": torch.tensor([1.0, -1.0, 1.0, 1.0]),
        "q_continue_logits": torch.tensor([0.5, 0.5, 0.5, 0.5]),
    }
    return ACTLossHead(Fixed(carry, outputs), loss_type, **more)


@pytest.mark.parametrize("loss_type", ["stablemax_cross_entropy", "softmax_cross_entropy"])
def test_metrics_count_the_samples_that_halted_with_labels(loss_type: str) -> None:
    head = fixed_head(loss_type)
    _, loss, metrics, out, done = head(return_keys=["preds", "absent"], carry=None, batch={})
    values = {name: value.item() for name, value in metrics.items()}
    assert values["count"] == 2
    assert values["exact_accuracy"] == 1
    assert values["accuracy"] == pytest.approx(1 + 2 / 3)
    assert values["q_halt_accuracy"] == 2
    assert values["steps"] == 8
    assert list(out) == ["preds"] and not done
    assert loss.item() == pytest.approx(values["lm_loss"] + 0.5 * values["q_halt_loss"])


def test_each_sample_weighs_alike_whatever_its_labels() -> None:
    head = fixed_head("softmax_cross_entropy")
    metrics = head(carry=None, batch={})[2]
    right = -F.log_softmax(torch.tensor([4.0, 0.0, 0.0]), 0)[0].item()
    wrong = -F.log_softmax(torch.tensor([4.0, 0.0, 0.0]), 0)[1].item()
    assert metrics["lm_loss"].item() == pytest.approx(right + (2 * right + wrong) / 3 + right)
    solved = torch.tensor([1.0, 0.0, 1.0, 1.0])
    q = torch.tensor([1.0, -1.0, 1.0, 1.0])
    want = F.binary_cross_entropy_with_logits(q, solved, reduction="sum")
    torch.testing.assert_close(metrics["q_halt_loss"], want)


def test_q_continue_has_its_loss_when_there_is_a_target() -> None:
    head = fixed_head()
    plain = head(carry=None, batch={})[1]
    head.model.result[1]["target_q_continue"] = torch.tensor([0.1, 0.9, 0.5, 0.5])
    _, loss, metrics, _, _ = head(carry=None, batch={})
    torch.testing.assert_close(loss, plain + 0.5 * metrics["q_continue_loss"])
    assert metrics["q_continue_loss"] > 0


@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_the_weight_of_the_halting_losses(weight: float) -> None:
    head = fixed_head(halt_weight=weight)
    head.model.result[1]["target_q_continue"] = torch.tensor([0.1, 0.9, 0.5, 0.5])
    _, loss, metrics, _, _ = head(carry=None, batch={})
    halting = metrics["q_halt_loss"] + metrics["q_continue_loss"]
    assert halting > 1
    torch.testing.assert_close(loss, metrics["lm_loss"] + weight * halting)


def test_an_unknown_loss_lists_the_known_ones() -> None:
    with pytest.raises(InvalidArgument, match="stablemax_cross_entropy"):
        ACTLossHead(nn.Identity(), "hinge")
