"""One supervision step of TRM, single-z, hier6 and HRM: embed, recurse, read the heads."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recurx.api import recurse
from recurx.errors import bad_argument
from recurx.models.config import VARIANTS, ModelConfig, Variant
from recurx.models.layers import (
    CastEmbedding,
    CastLinear,
    ReasoningNet,
    RotaryEmbedding,
    check_ids,
    truncated_normal_,
)
from recurx.models.puzzle_embedding import PuzzleEmbedding
from recurx.nets import Net
from recurx.problem import Problem
from recurx.proof import as_net

States = dict[str, Tensor]  # {state name: [B, T, D]}


class Inner(nn.Module):
    """The model without halting. Parameter names and initialisation are the official ones.

    Modules are created in the official order, so that one seed gives one initialisation.

    Args:
        config: see `ModelConfig`.
        backend: name of the backend that runs the recursion. It and the attribute `save` may be
            changed at any time.
    """

    def __init__(self, config: ModelConfig, backend: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.backend = backend
        self.save = "all"  # what the window keeps for the backward; see `recurx.recurse`
        self.schedule = config.schedule
        width, tokens, dtype = config.hidden_size, config.tokens, config.dtype
        self.embed_scale = math.sqrt(width)

        self.embed_tokens = CastEmbedding(config.vocab_size, width, 1 / self.embed_scale, dtype)
        self.lm_head = CastLinear(width, config.vocab_size)
        self.q_head = CastLinear(width, 2, bias=True)
        if config.puzzle_emb_ndim > 0:
            self.puzzle_emb = PuzzleEmbedding(
                config.num_puzzle_identifiers, config.puzzle_emb_ndim, config.batch_size, dtype
            )
        if config.pos_encodings == "rope" and not config.mlp_t:
            head_dim = width // config.num_heads
            self.rotary_emb = RotaryEmbedding(tokens, head_dim, config.rope_theta)
        elif config.pos_encodings == "learned":
            self.embed_pos = CastEmbedding(tokens, width, 1 / self.embed_scale, dtype)

        for name, attribute in self.variant.nets.items():
            layers = config.H_layers if name == "H" else config.L_layers
            self.add_module(attribute, ReasoningNet(config, layers))
        for buffer in self.variant.init.values():
            start = truncated_normal_(torch.empty(width, dtype=dtype), std=1)
            self.register_buffer(buffer, start)
        with torch.no_grad():  # halting starts improbable, and equal for all samples
            self.q_head.weight.zero_()
            self.q_head.bias.fill_(-5)

    @property
    def variant(self) -> Variant:
        """Names of states, init buffers and nets."""
        return VARIANTS[self.config.variant]

    # ---- states ----------------------------------------------------------------------------

    def empty_carry(self, batch_size: int) -> States:
        """Zero states [B, T, D] in the forward dtype; `reset_carry` gives them their start."""
        shape = (batch_size, self.config.tokens, self.config.hidden_size)
        return {name: start.new_zeros(shape) for name, start in self._init().items()}

    def reset_carry(self, reset: Tensor, carry: Mapping[str, Tensor]) -> States:
        """The carry with the samples of `reset` [B] (bool) at their learned start."""
        reset = reset.view(-1, 1, 1)
        return {name: torch.where(reset, z, carry[name]) for name, z in self._init().items()}

    def initial_states(self, batch_size: int) -> States:
        """Every sample at its start: states [B, T, D]."""
        shape = (batch_size, self.config.tokens, self.config.hidden_size)
        return {name: start.expand(shape).clone() for name, start in self._init().items()}

    def _init(self) -> States:
        return {name: getattr(self, buffer) for name, buffer in self.variant.init.items()}

    # ---- one supervision step --------------------------------------------------------------

    def nets(self) -> dict[str, ReasoningNet]:
        """{net name of the schedule: module}."""
        return {name: getattr(self, attribute) for name, attribute in self.variant.nets.items()}

    def cos_sin(self) -> tuple[Tensor, Tensor] | None:
        """The rotary tables, or None."""
        return self.rotary_emb() if hasattr(self, "rotary_emb") else None

    def embed(
        self, inputs: Tensor, puzzle_identifiers: Tensor | None = None, **how: bool
    ) -> Tensor:
        """Token ids [B, seq_len] and puzzle ids [B] to the embedded input x [B, T, D]."""
        config = self.config
        if inputs.ndim != 2 or inputs.shape[1] != config.seq_len:
            raise bad_argument(
                "models", "inputs", f"token ids [B, seq_len={config.seq_len}]", list(inputs.shape)
            )
        check_ids("inputs", inputs, config.vocab_size, 2)
        x = self.embed_tokens(inputs.to(torch.int32))
        if config.puzzle_emb_ndim > 0:
            got = None if puzzle_identifiers is None else [*puzzle_identifiers.shape]
            if puzzle_identifiers is None or got != [len(inputs)]:
                wanted = f"puzzle ids [B={len(inputs)}]"
                raise bad_argument("models", "puzzle_identifiers", wanted, got)
            prefix = self.puzzle_emb(puzzle_identifiers, **how)
            room = config.prefix_len * config.hidden_size
            prefix = F.pad(prefix, (0, room - config.puzzle_emb_ndim))
            x = torch.cat((prefix.view(-1, config.prefix_len, config.hidden_size), x), dim=-2)
        if config.pos_encodings == "learned":
            # 1/sqrt(2) keeps the variance of the sum; the digits are those of the official code.
            x = 0.707106781 * (x + self.embed_pos.embedding_weight.to(config.dtype))
        return self.embed_scale * x

    def heads(self, states: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [B, seq_len, vocab], and q_halt and q_continue logits [B] in fp32."""
        answer = states[self.variant.output]
        logits = self.lm_head(answer)[:, self.config.prefix_len :]
        q = self.q_head(answer[:, 0]).to(torch.float32)
        return logits, q[..., 0], q[..., 1]

    def forward(
        self,
        carry: Mapping[str, Tensor],
        batch: Mapping[str, Tensor],
        backend: str | None = None,
        **how: bool,
    ) -> tuple[States, Tensor, tuple[Tensor, Tensor]]:
        """One supervision step.

        Args:
            carry: {state: [B, T, D]}; never modified.
            batch: "inputs" [B, seq_len], and "puzzle_identifiers" [B] with a puzzle embedding.
            backend, how: that and `training` of this call alone, whatever the attributes say.

        Returns:
            The new carry (detached), logits [B, seq_len, vocab] in the forward dtype, and
            (q_halt, q_continue), each [B] fp32.
        """
        x = self.embed(batch["inputs"], batch.get("puzzle_identifiers"), **how)
        states = recurse(
            self.schedule, self.nets(), x, carry,
            backend=backend or self.backend, cos_sin=self.cos_sin(), save=self.save,
        )  # fmt: skip
        logits, q_halt, q_continue = self.heads(states)
        return {name: z.detach() for name, z in states.items()}, logits, (q_halt, q_continue)


def problem_of_model(model: nn.Module, batch_size: int = 1) -> Problem:
    """The recursion of a `TRM`, an `HRM` or its `Inner`, however wrapped, on its device, for
    `batch_size` samples.

    Raises:
        InvalidArgument: there is none in it.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    inner = next((module for module in modules if isinstance(module, Inner)), None)
    if inner is None:
        raise bad_argument(
            "models.problem_of_model", "model", "a recurx TRM or HRM", type(model).__name__,
            "recurx.explain(model) says the same of official code.",
        )  # fmt: skip
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
