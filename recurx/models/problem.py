"""The `Problem` that a model's recursion is."""

from __future__ import annotations

from recurx.models.act import RecursiveModel
from recurx.models.inner import Inner
from recurx.nets import Net, as_net
from recurx.problem import Problem


def problem_of_model(model: RecursiveModel | Inner, batch_size: int = 1) -> Problem:
    """The recursion of a `TRM` or `HRM` on `batch_size` samples, on the device it is on."""
    inner = model if isinstance(model, Inner) else model.inner
    bound = {name: as_net(net, name) for name, net in inner.nets().items()}
    specs = {name: net.spec for name, net in bound.items() if isinstance(net, Net)}
    return Problem(
        inner.schedule,
        tuple((name, specs[name]) for name in inner.schedule.nets),
        batch_size,
        inner.config.tokens,
        inner.config.hidden_size,
        inner.config.dtype,
        inner.lm_head.weight.device.type,
        rope=inner.cos_sin() is not None,
        needs_grad=inner.training,
    )
