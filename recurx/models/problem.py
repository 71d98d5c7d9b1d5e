"""The `Problem` that a model's recursion is, from the model or from its configuration alone."""

from __future__ import annotations

from recurx.models.act import RecursiveModel
from recurx.models.config import ModelConfig
from recurx.models.inner import Inner
from recurx.nets import ATTENTION, TOKEN_MLP, BlockSpec, Net, NetSpec, as_net
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


def problem_of_config(
    config: ModelConfig, batch_size: int = 1, device_type: str = "cpu"
) -> Problem:
    """What `problem_of_model` says of the model of a configuration, without building one."""
    width = config.hidden_size
    shape = (width, config.inner_width(width))
    if config.mlp_t:
        inner = config.inner_width(config.tokens)
        block = BlockSpec(
            TOKEN_MLP, *shape, tokens=config.tokens, token_inner=inner, eps=config.rms_norm_eps
        )
    else:
        block = BlockSpec(ATTENTION, *shape, num_heads=config.num_heads, eps=config.rms_norm_eps)
    layers = {"H": config.H_layers, "L": config.L_layers}
    schedule = config.schedule
    nets = tuple((name, NetSpec((block,) * layers[name])) for name in schedule.nets)
    return Problem(
        schedule, nets, batch_size, config.tokens, width, config.dtype, device_type,
        rope=config.pos_encodings == "rope" and not config.mlp_t,
    )  # fmt: skip
