"""One supervision step of TRM, single-z, hier6 and HRM: embed, recurse, read the heads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recurx.api import recurse
from recurx.errors import bad_argument
from recurx.models.config import ModelConfig
from recurx.models.layers import (
    CastEmbedding,
    CastLinear,
    ReasoningNet,
    RotaryEmbedding,
    check_ids,
    truncated_normal_,
)
from recurx.models.puzzle_embedding import PuzzleEmbedding
from recurx.models.systems import VARIANTS, Variant
from recurx.nets import Net, spelled
from recurx.noise import DRAWN
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
            spec = config.block_spec
            self.rotary_emb = RotaryEmbedding(spec.line(tokens), spec.head_dim, config.rope_theta)
        elif config.pos_encodings == "learned":
            self.embed_pos = CastEmbedding(tokens, width, 1 / self.embed_scale, dtype)
        if config.feedback:  # starts as the net without
            self.embed_feedback = CastEmbedding(config.vocab_size, width, 0, dtype)

        for name, attribute in self.variant.nets.items():
            layers = config.H_layers if name == "H" else config.L_layers
            self.add_module(attribute, ReasoningNet(config, layers))
        for buffer in self.variant.init.values():
            start = truncated_normal_(torch.empty(width, dtype=dtype), std=1)
            self.register_buffer(buffer, start)
        spec = config.block_spec  # what it drops in training; the nets are those of evaluation
        self.dropped = {name: getattr(spec, name) for name in DRAWN if name in spec.changed}
        self.first_sample = 0  # number of the first one in the streams of noise and dropout
        if config.noise or self.dropped:  # another one each call, saved with the weights
            self.register_buffer("noise_seed", torch.randint(2**62, ()))
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

    def answer_of(self, logits: Tensor) -> States:
        """What the next step hears of these logits, detached: {"last_answer": [B, seq_len, vocab]}
        in the forward dtype; {} for models without feedback."""
        if not self.config.feedback:
            return {}
        share = logits.detach().float().softmax(-1)
        if self.config.feedback == "argmax":
            share = F.one_hot(logits.argmax(-1), logits.shape[-1])
        return {"last_answer": share.to(self.config.dtype)}

    # ---- one supervision step --------------------------------------------------------------

    def nets(self, training: bool = False) -> dict[str, Any]:
        """{net name of the schedule: module}; in training, of blocks that drop, a `Net` of it."""
        nets = {name: getattr(self, attribute) for name, attribute in self.variant.nets.items()}
        if not (training and self.dropped):
            return nets
        for name, module in nets.items():
            net = as_net(module, name, self.cos_sin())
            nets[name] = Net.trusted(spelled(net.spec, self.dropped), net.weights)
        return nets

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
        self, carry: Mapping[str, Tensor], batch: Mapping[str, Tensor], backend: str | None = None,
        **how: bool,
    ) -> tuple[States, Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
        """One supervision step.

        Args:
            carry: {state: [B, T, D]}; never modified.
            batch: "inputs" [B, seq_len], and "puzzle_identifiers" [B] with a puzzle embedding; with
                feedback also what `answer_of` made of the last step's logits, if this is no first.
            backend, how: that and `training` of this call alone, whatever the attributes say.

        Returns:
            The new carry (detached), logits [B, seq_len, vocab] in the forward dtype, and
            (q_halt, q_continue), each [B] fp32.
        """
        x = self.embed(batch["inputs"], batch.get("puzzle_identifiers"), **how)
        seed, training = None, how.get("training", self.training)
        if training and (self.config.noise or self.dropped):
            seed = self.noise_seed.add_(1)
            seed = torch.stack((seed, torch.full_like(seed, self.first_sample)))
        if self.config.feedback and "last_answer" in batch:
            told = batch["last_answer"] @ self.embed_feedback.embedding_weight.to(x.dtype)
            x = x + F.pad(self.embed_scale * told, (0, 0, self.config.prefix_len, 0))
        states = recurse(
            self.schedule, self.nets(training), x, carry, backend=backend or self.backend,
            cos_sin=self.cos_sin(), save=self.save, seed=seed,
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
    bound = {name: as_net(net, name) for name, net in inner.nets(inner.training).items()}
    specs = {name: net.spec for name, net in bound.items() if isinstance(net, Net)}
    config, device_type = inner.config, inner.lm_head.weight.device.type
    return Problem(
        inner.schedule, tuple((name, specs[name]) for name in inner.schedule.nets), batch_size,
        config.tokens, config.hidden_size, config.dtype, device_type,
        rope=inner.cos_sin() is not None, needs_grad=inner.training,
    )  # fmt: skip
