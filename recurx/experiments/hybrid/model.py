"""The hybrid: passages -> frozen embeddings -> projection and answer slots -> recursion -> heads.

    x [B, T, D], T = S * L + K: the projected embedding of every token of S passages with room for L
    each, a learned vector where there is none, then K learned slots. Learned positions of a text's
    tokens are a vector of the passage plus one of the place in it, so that what is learned of one
    passage holds for all. Slot k of the answer state gives the logits of answer k, token 0 the
    halting logits.

Everything after x is the TRM or HRM of `recurx.models`, so every backend runs it, and `solve`,
`evaluate`, the loss head and the trainer take it as they are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recurx import checkpoint
from recurx.errors import CheckpointError, InvalidArgument, bad_argument
from recurx.experiments.hybrid.config import HybridConfig
from recurx.experiments.hybrid.encoder import PassageBank
from recurx.models.act import RecursiveModel
from recurx.models.inner import Inner
from recurx.models.layers import CastLinear, truncated_normal_
from recurx.solving.solve import Answers, solve

Text = str | Sequence[str]

LEAST_SPREAD = 1e-4  # of the first principal component; below it is rounding


class HybridInner(Inner):
    """`Inner` whose x comes from a bank of passages instead of a table of token embeddings."""

    config: HybridConfig
    bank: PassageBank  # set by `HybridReasoner`

    def __init__(self, config: HybridConfig, backend: str = "auto") -> None:
        super().__init__(config, backend)
        del self.embed_tokens

        def learned(*rows: int) -> nn.Parameter:  # scaled in `embed`, as token embeddings are
            rows_of_width = torch.empty(*rows, config.hidden_size)
            return nn.Parameter(truncated_normal_(rows_of_width, std=1 / self.embed_scale))

        self.text_proj = CastLinear(config.encoder_width, config.hidden_size, bias=True)
        self.no_token, self.slots = learned(), learned(config.seq_len)
        if config.pos_encodings == "learned":
            del self.embed_pos
            self.passage_pos = learned(config.passages, 1)
            self.place_pos = learned(config.passage_tokens)

    @torch.no_grad()
    def whiten_(self) -> None:
        """Start `text_proj` at the principal components of all that the bank holds, each with
        variance 1 and turned at random.

        What token embeddings have in common is most of them; what tells sentences apart can be a
        thousandth of the variance, which a random projection buries.
        """
        vectors, there = self.bank.tables()
        rows, width = vectors[there].double(), self.config.hidden_size
        mean = rows.mean(dim=0)
        _, singular, directions = torch.linalg.svd(rows - mean, full_matrices=False)
        spread = singular / len(rows) ** 0.5
        kept = min(width, int((spread > LEAST_SPREAD * spread[0]).sum()))
        turned = torch.linalg.qr(torch.randn(width, kept, dtype=torch.float64))[0]
        scale = (width / kept) ** 0.5 / spread[:kept, None]
        weight = turned @ (scale * directions[:kept])
        self.text_proj.weight.copy_(weight)
        self.text_proj.bias.copy_(-weight @ mean)

    def embed(
        self, inputs: Tensor, puzzle_identifiers: Tensor | None = None, **how: bool
    ) -> Tensor:
        """Passage numbers [B, S] to x [B, S * L + K, D]."""
        config = self.config
        if inputs.ndim != 2 or inputs.shape[1] != config.passages:
            raise bad_argument(
                "hybrid", "inputs", f"passage numbers [B, passages={config.passages}]",
                list(inputs.shape), "Make batches by model.batch(texts).",
            )  # fmt: skip
        vectors, there = self.bank.tables(inputs.device)
        numbers, scale = inputs.long(), self.embed_scale
        here = there[numbers].unsqueeze(-1)
        text_of = self.text_proj(vectors[numbers].to(config.dtype))
        no_token = (scale * self.no_token).to(config.dtype)
        text = torch.where(here, text_of, no_token)
        if config.pos_encodings == "learned":
            position = (scale * (self.passage_pos + self.place_pos)).to(config.dtype)
            text = 3**-0.5 * (text + position)  # each of the three has variance 1
        slots = (scale * self.slots).to(config.dtype).expand(len(inputs), -1, -1)
        if config.answer_per_passage:
            slots = 2**-0.5 * (slots + self._pooled(text_of, here))
        return torch.cat((text.flatten(1, 2), slots), dim=1)

    @staticmethod
    def _pooled(text: Tensor, here: Tensor) -> Tensor:
        """What the tokens of each passage [B, S, L, D] say together, [B, S, D]: their sum, at the
        scale of one of them."""
        count = here.sum(dim=2).clamp(min=1)
        return torch.where(here, text, 0).sum(dim=2) * count.to(text.dtype).rsqrt()


class HybridReasoner(RecursiveModel):
    """A frozen encoder with a tiny recursive reasoner behind it.

    Args:
        encoder, tokenizer: as Hugging Face's, see `PassageBank`; `recurx.hybrid.load_encoder` and
            `packaged_encoder` make them. The encoder is no submodule: it gets no gradient, is in
            evaluation mode, and its weights are not in the state_dict. A `PassageBank` as `encoder`
            (tokenizer None) is shared.
        config: a `HybridConfig`, or None with its `fields` given.
        backend: what runs the recursion, see `recurx.recurse`.

    Raises:
        InvalidArgument: the configuration does not fit itself, or the bank.
    """

    config_class = HybridConfig
    inner_class = HybridInner
    config: HybridConfig
    inner: HybridInner

    def __init__(
        self,
        encoder: Callable[..., Any] | PassageBank,
        tokenizer: Callable[..., Mapping[str, Tensor]] | None = None,
        config: HybridConfig | Mapping[str, Any] | None = None,
        backend: str = "auto",
        **fields: Any,
    ) -> None:
        super().__init__(config, backend, **fields)
        tokens, width = self.config.passage_tokens, self.config.encoder_width
        if not isinstance(encoder, PassageBank):
            known = getattr(getattr(encoder, "config", None), "hidden_size", width)
            if known != width:
                raise bad_argument(
                    "hybrid", "encoder_width", f"{known}, the width of this encoder", width
                )
            encoder = PassageBank(encoder, tokenizer, tokens, width)  # type: ignore[arg-type]
        if encoder.passage_tokens != tokens or encoder.width not in (None, width):
            raise bad_argument(
                "hybrid", "encoder", f"a bank of passage_tokens={tokens}, width={width}",
                f"{encoder.passage_tokens}, {encoder.width}",
            )  # fmt: skip
        self.inner.bank = encoder

    @property
    def bank(self) -> PassageBank:
        """The encoder with all that it has said."""
        return self.inner.bank

    def batch(self, texts: Sequence[Text]) -> dict[str, Tensor]:
        """What the model and `recurx.solve` take: "inputs" [B, S] and "puzzle_identifiers" [B].

        Args:
            texts: each a string (one passage) or a list of at most S passages, in reading order.

        Raises:
            InvalidArgument: a text has too many passages, or a passage too many tokens.
        """
        room = self.config.passages
        lists = [[text] if isinstance(text, str) else list(text) for text in texts]
        for row, passages in enumerate(lists):
            if not 1 <= len(passages) <= room:
                raise bad_argument(
                    "hybrid", f"texts[{row}]", f"1..{room} passages", len(passages),
                    "The model's `passages` is fixed; join short ones.",
                )  # fmt: skip
        # All at once: the encoder likes batches.
        numbers = iter(self.bank.numbers([p for passages in lists for p in passages]))
        inputs = torch.zeros(len(texts), room, dtype=torch.int64)
        for row, passages in enumerate(lists):
            for column in range(len(passages)):
                inputs[row, column] = next(numbers)
        device = self.inner.no_token.device
        identifiers = torch.zeros(len(texts), dtype=torch.int32, device=device)
        return {"inputs": inputs.to(device), "puzzle_identifiers": identifiers}

    def answer(self, texts: Sequence[Text], **solve_arguments: Any) -> Answers:
        """`recurx.solve` of `batch(texts)`; `predictions` [B, K] are the answers."""
        return solve(self, self.batch(texts), **solve_arguments)

    def save(self, path: str | os.PathLike[str], extra: Mapping[str, Any] | None = None) -> None:
        """Write weights and configuration as safetensors, atomically; not the encoder."""
        checkpoint.save_checkpoint(path, self, extra)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        encoder: Callable[..., Any] | PassageBank,
        tokenizer: Callable[..., Mapping[str, Tensor]] | None = None,
        backend: str = "auto",
    ) -> HybridReasoner:
        """The model that `save` wrote, with an encoder like the one it was trained with.

        Raises:
            CheckpointError: the file is damaged, no hybrid, or does not fit its configuration.
            InvalidArgument: the encoder has another width.
        """
        state, values = checkpoint.read_own(Path(path))
        if "encoder_width" not in values:
            raise CheckpointError(
                f"{path}: no hybrid: recurx.load_checkpoint reads TRM and HRM weights."
            )
        try:
            config = HybridConfig.from_dict(values)
        except InvalidArgument as error:
            raise CheckpointError(f"{path}: {error}") from error
        model = cls(encoder, tokenizer, config, backend)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise CheckpointError(f"{path}: {error}") from error
        return model.eval()
