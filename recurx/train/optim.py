"""Optimisers of TRM and HRM training that never wait for the device.

Each is one launch of a Triton kernel on a GPU (`kernels/adam_atan2.py`, `kernels/sign_sgd.py`), one
pass of the CPU engine (AdamATan2 in fp32), and the same formula in plain PyTorch elsewhere. Step
counts are tensors beside the weights and `lr` may be one, so a step can be captured in a CUDA graph
and still follow a schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from recurx import measure, small_ops
from recurx.errors import bad_argument
from recurx.models import RecursiveModel
from recurx.models.puzzle_embedding import sign_sgd_
from recurx.train.config import TrainConfig
from recurx.train.ranks import all_gather

ENGINE = ("the CPU engine",)  # beside kinds of a Triton kernel's tensors
TORCH_MUON: Any = getattr(torch.optim, "Muon", None)  # torch 2.9 brought it


def make_optimizers(
    config: TrainConfig, model: RecursiveModel, world: int = 1
) -> list[torch.optim.Optimizer]:
    """The optimizer of the weights of a model, and that of its puzzle embedding if it has one.

    "muon" is two: Muon for the matrices of the blocks, and AdamW for embeddings, heads and biases.
    Its steps are scaled to the size of AdamW's, so that one learning rate and decay serve both.

    Args:
        world: ranks that train on it.
    """
    device = next(model.parameters()).device
    settings: dict[str, Any] = {
        "lr": torch.tensor(config.lr, device=device),
        "betas": (config.beta1, config.beta2),
        "weight_decay": config.weight_decay,
    }
    made: list[torch.optim.Optimizer]
    if config.optimizer == "adam-atan2":
        made = [AdamATan2(model.parameters(), **settings)]
    else:
        named, matrices = dict(model.named_parameters()), []
        if config.optimizer == "muon":
            inside = [n for n, p in named.items() if p.ndim == 2 and "_level.layers." in n]
            matrices = [named.pop(name) for name in inside]
        made = [torch.optim.AdamW(named.values(), **settings, capturable=device.type == "cuda")]
        if config.optimizer == "muon":
            del settings["betas"]
            made.append(Muon(matrices, **settings, adjust_lr_fn="match_rms_adamw"))
    if model.config.puzzle_emb_ndim:
        rows = model.puzzle_emb.buffers()
        made.append(SparseSignSGD(rows, config.puzzle_emb_lr, config.weight_decay, world))
    return made


def stepping(rule: Callable[[torch.optim.Optimizer], None]) -> Callable[..., Any]:
    """A method `step` by a rule that changes the weights of an optimizer; runs without gradient."""

    @torch.no_grad()
    def step(self: torch.optim.Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        """One step on every parameter that has a gradient; what `closure` returned, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        rule(self)
        return loss

    return step


class AdamATan2(torch.optim.Optimizer):
    """Adam whose step is `lr * atan2(m, sqrt(v))` instead of `lr * m / (sqrt(v) + eps)`.

    The step is bounded by lr * pi / 2 and does not depend on the scale of the loss; weight decay is
    decoupled. Means are kept in fp32 at least, whatever the dtype of the weights.
    Source: Everett et al., arXiv 2407.05872, section 4.3; used by HRM and TRM.

    Args:
        params: parameters or groups.
        lr: 0 is accepted: official training loops set it later, per group. A float, or a 0-d
            tensor on the device of the weights, which a captured step reads each time.
        betas, weight_decay: as in AdamW.

    State of a weight: "step" (0-d fp32 on its device), "exp_avg" and "exp_avg_sq".
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
    ) -> None:
        check_rate("train.AdamATan2", lr, weight_decay)
        if not all(0 <= beta < 1 for beta in betas):
            raise bad_argument("train.AdamATan2", "betas", "two numbers in [0, 1)", repr(betas))
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    step = stepping(lambda optimizer: adam_atan2_(optimizer))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state; one whose counts lie on the CPU, or with bf16 means, is fine too."""
        super().load_state_dict(state_dict)
        # PyTorch casts a state to the dtype of its weight and leaves "step" where it was saved.
        params = [p for group in self.param_groups for p in group["params"]]
        indices = [i for group in state_dict["param_groups"] for i in group["params"]]
        for param, index in zip(params, indices, strict=True):
            if index in state_dict["state"]:
                self.state[param] = _state_like(state_dict["state"][index], param)


def adam_atan2_(optimizer: torch.optim.Optimizer) -> None:
    """One AdamATan2 step with the groups and the state of any optimizer that has its settings.

    `lr`, `betas` and `weight_decay` are read from each group. Runs without gradient.
    """
    for index, group in enumerate(optimizer.param_groups):
        params = [p for p in group["params"] if p.grad is not None]
        if any(p.grad.is_sparse for p in params):
            raise bad_argument(
                "train.AdamATan2", "grad", "dense gradients", "a sparse one",
                "Give sparse embeddings to SparseSignSGD.",
            )  # fmt: skip
        for param in params:
            state = optimizer.state[param]
            if not state:
                optimizer.state[param] = _fresh_state(param)
            elif state["step"].device != param.device:  # of a foreign optimizer's state
                optimizer.state[param] = _state_like(state, param)
        if params:
            torch._foreach_add_([optimizer.state[p]["step"] for p in params], 1)
            _step_group(optimizer, index, group, params)


def _step_group(
    optimizer: torch.optim.Optimizer, index: int, group: dict[str, Any], params: list[Tensor]
) -> None:
    """A kernel for those that it takes, one launch for each pair of dtypes; the formula else."""
    kinds: dict[tuple[Any, ...], list[Tensor]] = {}
    for p in params:
        step, *means = (optimizer.state[p][key] for key in ("step", "exp_avg", "exp_avg_sq"))
        wide = all(t.dtype == torch.float32 for t in (step, *means))
        all_of = (p, p.grad, *means)
        kind: tuple[Any, ...] = ()
        if wide and small_ops.takes(*all_of):
            kind = p.device, p.dtype, p.grad.dtype
        elif wide and _engine_takes(*all_of):
            kind = ENGINE
        kinds.setdefault(kind, []).append(p)
    settings = {key: group[key] for key in ("lr", "betas", "weight_decay")}
    for kind, some in kinds.items():
        states = [optimizer.state[p] for p in some]
        lists = [[s[key] for s in states] for key in ("exp_avg", "exp_avg_sq", "step")]
        grads = [p.grad for p in some]
        if not kind:
            _adam_atan2(some, grads, *lists, **settings)
            continue
        if kind is ENGINE:
            _on_engine(some, grads, *lists, **settings)
        else:
            from recurx.kernels.adam_atan2 import adam_atan2
            from recurx.kernels.multi_tensor import Tables

            # Address tables are kept outside the state, so they are never saved.
            tables = vars(optimizer).setdefault("_recurx_tables", Tables())
            adam_atan2(some, grads, *lists, **settings, tables=tables, name=(index, *kind))
        small_ops.wrote([*some, *lists[0], *lists[1]])


def _engine_takes(*tensors: Tensor) -> bool:
    """Whether the CPU engine is there, and these are plain fp32 tensors whose operations nobody
    watches (transforms, modes such as those that count or record, `torch.compile`)."""
    plain = all(
        type(t) in (Tensor, torch.nn.Parameter) and t.device.type == "cpu" and t.is_contiguous()
        and t.dtype == torch.float32 and not torch._C._functorch.is_functorch_wrapped_tensor(t)
        for t in tensors
    )  # fmt: skip
    watched = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    return plain and not watched and bool(measure.engine_isa())


def _on_engine(
    *lists: Sequence[Tensor], lr: float | Tensor, betas: tuple[float, float], weight_decay: float
) -> None:
    from recurx import _C

    rows = [
        (*(t.data_ptr() for t in four), four[0].numel(), *(1 - b ** float(step) for b in betas))
        for *four, step in zip(*lists, strict=True)
    ]
    rates = [float(lr), 1 - float(lr) * weight_decay, 1 - betas[0], betas[1], 1 - betas[1]]
    _C.cpu_adam_atan2(measure.engine_isa(), rows, rates, torch.get_num_threads())


def _adam_atan2(
    params: Sequence[Tensor], grads: Sequence[Tensor], means: Sequence[Tensor],
    squares: Sequence[Tensor], steps: Sequence[Tensor], lr: float | Tensor,
    betas: tuple[float, float], weight_decay: float,
) -> None:  # fmt: skip
    """The formula of `kernels/adam_atan2.py`; wide means, `steps` already count this step."""
    beta1, beta2 = betas
    wide = [g.to(m.dtype) for g, m in zip(grads, means, strict=True)]
    torch._foreach_lerp_(means, wide, 1 - beta1)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, wide, wide, 1 - beta2)
    torch._foreach_mul_(params, 1 - lr * weight_decay)
    for param, mean, square, step in zip(params, means, squares, steps, strict=True):
        moved = torch.atan2(
            mean / _one_minus_power(beta1, step), (square / _one_minus_power(beta2, step)).sqrt_()
        )
        param.sub_(moved.mul_(lr))


def _one_minus_power(beta: float, steps: Tensor) -> Tensor:
    """1 - beta^steps without cancellation and without reading the device."""
    return -torch.expm1(steps * (math.log(beta) if beta else -math.inf))


def _fresh_state(param: Tensor) -> dict[str, Tensor]:
    wide = torch.promote_types(param.dtype, torch.float32)
    return {
        "step": torch.zeros((), dtype=torch.float32, device=param.device),
        "exp_avg": torch.zeros_like(param, dtype=wide),
        "exp_avg_sq": torch.zeros_like(param, dtype=wide),
    }


def _state_like(saved: dict[str, Any], param: Tensor) -> dict[str, Tensor]:
    """A saved state in the dtypes and on the device that `_fresh_state` has."""
    state = _fresh_state(param)
    for key, fresh in state.items():
        fresh.copy_(torch.as_tensor(saved[key]))
    return state


class SparseSignSGD(torch.optim.Optimizer):
    """Sign SGD on the few rows of a puzzle-embedding table that a batch touched.

    The rule is that of `recurx.models.puzzle_embedding.sign_sgd_`.

    Args:
        params: the three buffers of the embedding, in any order (`embedding.buffers()`):
            the table [rows, D], the rows of the batch with gradient [B, D], and their ids [B].
        lr: a float (0 is accepted) or a 0-d tensor on the device.
        weight_decay: decoupled.
        world_size: ranks of the default process group that train on this table; each step gathers
            their gradients and ids, so that every copy of the table takes the same step.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        world_size: int = 1,
    ) -> None:
        check_rate("train.SparseSignSGD", lr, weight_decay)
        defaults = {"lr": lr, "weight_decay": weight_decay, "world_size": world_size}
        super().__init__(list(params), defaults)
        for group in self.param_groups:
            embedding_buffers(group["params"])

    step = stepping(lambda optimizer: sparse_sign_sgd_(optimizer))


def sparse_sign_sgd_(optimizer: torch.optim.Optimizer) -> None:
    """One SparseSignSGD step with the groups of any optimizer that has its settings."""
    for group in optimizer.param_groups:
        table, local, ids = embedding_buffers(group["params"])
        if local.grad is None:
            continue
        grads, ranks = local.grad, group["world_size"]
        if ranks > 1:
            grads, ids = (all_gather(t, ranks) for t in (grads, ids))
        sign_sgd_(table, grads, ids, group["lr"], group["weight_decay"])


def embedding_buffers(params: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(table, rows of the batch, their ids) among the buffers of a sparse embedding.

    Raises:
        InvalidArgument: they are not such three.
    """
    local = [p for p in params if p.requires_grad]
    ids = [p for p in params if not p.requires_grad and p.ndim == 1]
    table = [p for p in params if not p.requires_grad and p.ndim == 2]
    if not len(local) == len(ids) == len(table) == 1 or len(params) != 3:
        raise bad_argument(
            "train.SparseSignSGD", "params",
            "the 3 buffers of a sparse embedding: [rows, D], [B, D] with gradient, [B]",
            [tuple(p.shape) for p in params], "Pass model.puzzle_emb.buffers().",
        )  # fmt: skip
    return table[0], local[0], ids[0]


class Muon(TORCH_MUON or torch.optim.Optimizer):
    """`torch.optim.Muon`, number for number, with a learning rate that may lie on the device.

    PyTorch's reads it there at every step, so a captured step would repeat that of its capture.
    """

    def __init__(self, params: Any, **settings: Any) -> None:
        if TORCH_MUON is None:
            raise bad_argument(
                "train.Muon", "torch", "2.9 or newer, which has torch.optim.Muon",
                torch.__version__, "Install it, or choose another optimizer.",
            )  # fmt: skip
        super().__init__(params, **settings)

    step = stepping(lambda optimizer: muon_(optimizer))


def muon_(optimizer: torch.optim.Optimizer) -> None:
    """One step of a `torch.optim.Muon`: its own, at rate 1 from 0, is what weights move by."""
    for group in optimizer.param_groups:
        params = [p for p in group["params"] if p.grad is not None]
        moves = [torch.zeros_like(p) for p in params]
        own = TORCH_MUON([{**group, "params": moves, "lr": 1.0, "weight_decay": 0.0}])
        for param, move in zip(params, moves, strict=True):
            move.grad, own.state[move] = param.grad, optimizer.state[param]
        own.step()
        for param, move in zip(params, moves, strict=True):
            param.mul_(1 - group["lr"] * group["weight_decay"]).add_(move.mul_(group["lr"]))


def reads_the_rate(optimizer: torch.optim.Optimizer) -> bool:
    """Whether this is PyTorch's Muon with a `step` of its own."""
    return type(optimizer) is TORCH_MUON and "step" not in vars(optimizer)


def check_rate(op: str, lr: float | Tensor, weight_decay: float) -> None:
    if isinstance(lr, Tensor):
        if lr.ndim or not lr.is_floating_point():
            raise bad_argument(op, "lr", "a number or a 0-d tensor", f"{lr.dtype} {list(lr.shape)}")
    elif not lr >= 0:
        raise bad_argument(op, "lr", "a number >= 0", repr(lr))
    if not weight_decay >= 0:
        raise bad_argument(op, "weight_decay", "a number >= 0", repr(weight_decay))
