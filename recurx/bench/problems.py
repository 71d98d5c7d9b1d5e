"""The `Problem` of a configuration, for models of times and bytes that build no model."""

from __future__ import annotations

from recurx.models.config import ModelConfig
from recurx.nets import ATTENTION, TOKEN_MLP, BlockSpec, NetSpec
from recurx.problem import Problem


def problem_of_config(
    config: ModelConfig, batch_size: int = 1, device_type: str = "cpu"
) -> Problem:
    """What `models.problem_of_model` says of the model of a configuration, without building one."""
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
