"""Configuration of a hybrid: a TRM or HRM whose tokens are a text's, then slots for the answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from recurx.models.config import ModelConfig


@dataclass(frozen=True)
class HybridConfig(ModelConfig):
    """Fields beside those of `ModelConfig`, of which two have another meaning here:

    `seq_len` is K, the number of answer slots; `vocab_size` the number of answers that each slot
    chooses from.

    Args:
        passages: S, passages of a text (sentences, say), each encoded by itself.
        passage_tokens: L, room for the tokens of one passage. The recursion has no mask: unused
            room holds a learned vector.
        encoder_width: W, width of the encoder's embeddings.
        answer_per_passage: slot k answers at passage k (K = S), and holds what its tokens say
            together.
    """

    passages: int = 1
    passage_tokens: int = 64
    encoder_width: int = 384
    answer_per_passage: bool = False

    @property
    def prefix_len(self) -> int:
        """Tokens before the answer slots: S * L."""
        return self.passages * self.passage_tokens

    @classmethod
    def tiny(cls, vocab_size: int, seq_len: int, **changes: Any) -> HybridConfig:
        """A small fp32 TRM for laptops and tests: D = 64, one block, learned positions."""
        base = cls(
            vocab_size, seq_len, hidden_size=64, num_heads=4, expansion=2.0, inner_multiple=16,
            L_layers=1, H_cycles=1, L_cycles=2, pos_encodings="learned", forward_dtype="float32",
            halt_max_steps=8,
        )  # fmt: skip
        return base.replace(**changes)

    def _bounds(self) -> Iterator[tuple[str, bool, str]]:
        yield from super()._bounds()
        for name in ("passages", "passage_tokens", "encoder_width"):
            yield name, getattr(self, name) >= 1, "at least 1"
        yield "puzzle_emb_ndim", not self.puzzle_emb_ndim, "0: its tokens are the text's"
        fits = not self.answer_per_passage or self.seq_len == self.passages
        yield "seq_len", fits, f"passages={self.passages}, one answer each"
