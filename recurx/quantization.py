"""`recurx.quantize`: a trained model with FP8 or int8 nets for inference, behind a gate.

    small = recurx.quantize(model, batch)        # a copy, or QuantizationRefused with the reason
    recurx.solve(small, batch)                   # as before; print(small.quantization)

Nets are quantised (recurx/fp8.py), embeddings and heads are not. Of FP8 weights the grid kernel of
backend "cuda" keeps the codes, half the bytes of bf16, and applies the scales to sums. With int8
backend "cpu", which the copy asks for, quantises activations too (csrc/cpu/gemm_int8.hpp). Other
backends and kernels run the dequantised weights.

The gate: a recursion feeds its own error back, hundreds of times, and the error of a weight says
little about where that ends. So the model and the copy both run free from the same start, and are
compared on the caller's batch: the direction of the carry after each supervision step, and the
answers. It is for trained nets; the random ones of a test are chaotic, and fail.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from recurx import backends, fp8
from recurx.backends.cpu import BACKEND as CPU
from recurx.errors import BackendUnavailable, QuantizationRefused, bad_argument
from recurx.models.act import RecursiveModel
from recurx.models.inner import problem_of_model
from recurx.nets import Net
from recurx.proof import as_net
from recurx.solving.solve import solve

# A tiny trained net (tests/test_fp8.py) keeps 0.997 and 99 %; with scales wrong by 5 %, 0.989 and
# 96 %.
MIN_COSINE, MIN_AGREEMENT = 0.98, 0.98
FORMATS = {"fp8": (fp8.FP8, "e4m3 weights"), "int8": (fp8.INT8, "int8 weights and activations")}


@dataclass(frozen=True)
class Gate:
    """What the gate saw, and how it judged; prints as a sentence.

    Args:
        cosines: after each supervision step, the cosine between the answer states of the model
            and of its copy, mean over samples.
        agreement: share of tokens with the same answer, each sample at its halt.
        whole: share of samples whose whole answer is the same.
        reason: why it was refused; "" if it passed.
        form: what was quantised.
    """

    cosines: tuple[float, ...]
    agreement: float
    whole: float
    reason: str = ""
    form: str = FORMATS["fp8"][1]

    @property
    def passed(self) -> bool:
        return not self.reason

    def __str__(self) -> str:
        verdict = "passed" if self.passed else f"refused: {self.reason}"
        return (
            f"{self.form} {verdict}; carry cosine {min(self.cosines):.4f} at its worst step of "
            f"{len(self.cosines)}, {self.agreement:.2%} of tokens and {self.whole:.2%} of answers "
            f"agree"
        )


def quantize(
    model: RecursiveModel, batch: Mapping[str, Tensor], *, to: str = "fp8",
    max_steps: int | None = None, halt: str | None = "q", min_cosine: float = MIN_COSINE,
    min_agreement: float = MIN_AGREEMENT,
) -> RecursiveModel:  # fmt: skip
    """A copy of a trained model with quantised nets, if the gate lets it pass.

    Args:
        model: a recurx TRM or HRM; not modified.
        batch: samples to judge by, as for `recurx.solve`: dozens of typical ones.
        to: "fp8", e4m3 weights, or "int8", int8 weights and activations on the CPU.
        max_steps: supervision steps that both may take; None for those of the training.
        halt: how answers halt, as for `recurx.solve`. The carries run all the steps.
        min_cosine, min_agreement: least accepted `Gate.cosines` and `Gate.agreement`.

    Returns:
        The copy, in evaluation mode, without gradient; its attribute `quantization` is the `Gate`.

    Raises:
        QuantizationRefused: the copy behaves differently; `.gate` has the figures.
        InvalidArgument: not such a model, no such format, or a threshold outside [0, 1].
        BackendUnavailable: int8 cannot run this model here, or would be slower than bf16.
    """
    if not isinstance(model, RecursiveModel):
        raise bad_argument("quantize", "model", "a recurx TRM or HRM", type(model).__name__)
    for name, value in (("min_cosine", min_cosine), ("min_agreement", min_agreement)):
        if not 0 <= value <= 1:
            raise bad_argument("quantize", name, "a number in [0, 1]", value)
    if to not in FORMATS:
        raise bad_argument("quantize", "to", f"one of {tuple(FORMATS)}", repr(to))
    dtype, form = FORMATS[to]
    if to == "int8":
        reason = backends.why_not("cpu", problem_of_model(model.inner)) or CPU.why_not_int8()
        if reason is not None:
            why = f'recurx.quantize: to="int8" is for backend "cpu", which {reason}. Keep bf16.'
            raise BackendUnavailable(why)
    small = _quantized_copy(model, dtype)
    small.backend = "cpu" if to == "int8" else small.backend
    gate = compare(model, small, batch, max_steps, halt, min_cosine, min_agreement, form)
    if not gate.passed:
        raise QuantizationRefused(
            f"recurx.quantize: {gate}. Keep bf16, or train longer: the gate is for nets that have "
            f"converged.",
            gate,
        )
    small.quantization = gate
    return small


def compare(
    model: RecursiveModel, small: RecursiveModel, batch: Mapping[str, Tensor],
    max_steps: int | None = None, halt: str | None = "q", min_cosine: float = MIN_COSINE,
    min_agreement: float = MIN_AGREEMENT, form: str = FORMATS["fp8"][1],
) -> Gate:  # fmt: skip
    """The gate alone: run both models free from the same start and judge the difference."""
    max_steps = model.config.halt_max_steps if max_steps is None else max_steps
    answers = [solve(m, batch, max_steps, halt).predictions for m in (model, small)]
    states = [_trajectory(m, batch, max_steps) for m in (model, small)]
    same = answers[0] == answers[1]
    cosines = []
    for a, b in zip(*states, strict=True):
        each = torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=1)
        cosines.append(float(torch.nan_to_num(each, nan=-1.0).mean()))
    agreement, whole = float(same.float().mean()), float(same.all(dim=1).float().mean())
    reason, worst = "", min(range(len(cosines)), key=lambda k: cosines[k])
    if cosines[worst] < min_cosine:
        reason = (
            f"after step {worst + 1} the cosine of the carries is {cosines[worst]:.4f}, "
            f"at least {min_cosine} is asked for"
        )
    elif agreement < min_agreement:
        reason = f"{agreement:.2%} of answers agree, at least {min_agreement:.2%} is asked for"
    return Gate(tuple(cosines), agreement, whole, reason, form)


def _quantized_copy(model: RecursiveModel, dtype: torch.dtype) -> RecursiveModel:
    small = copy.deepcopy(model).eval().requires_grad_(False)
    for name, module in small.inner.nets().items():
        net = as_net(module, name)
        assert isinstance(net, Net), "the nets of a RecursiveModel are block stacks"
        for weight in net.weights:
            codes = fp8.quantize_weight(weight, dtype)
            with torch.no_grad():
                weight.copy_(codes.dequantized())
            fp8.register(weight, codes)
    return small


@torch.no_grad()
def _trajectory(model: RecursiveModel, batch: Mapping[str, Tensor], max_steps: int) -> list[Tensor]:
    """The answer state after each supervision step, [B, T * D]."""
    inner, found = model.inner, []
    carry = inner.initial_states(len(batch["inputs"]))
    zeros = torch.zeros_like(batch["inputs"][:, 0], dtype=torch.int32)
    data = {"puzzle_identifiers": zeros, **batch}
    for _ in range(max_steps):
        carry, _, _ = inner(carry, data)
        found.append(carry[inner.variant.output].flatten(1))
    return found
