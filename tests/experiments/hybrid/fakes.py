"""A text encoder of Hugging Face's shape, small enough for every test."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

CLS, SEP, PAD = 1, 2, 0


class FakeEncoder(nn.Module):
    """Embeddings that depend on the neighbours, and dropout that shows a training mode."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=width, max_position_embeddings=20)
        self.embed = nn.Embedding(200, width)
        self.dropout = nn.Dropout(0.5)
        self.texts: list[int] = []  # rows of every call

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        self.texts.append(len(input_ids))
        h = self.embed(input_ids) * attention_mask.unsqueeze(-1)
        h = h + 0.5 * h.roll(1, dims=1) + 0.1 * h.sum(1, keepdim=True)
        return SimpleNamespace(last_hidden_state=self.dropout(h))


class FakeTokenizer:
    """Words are tokens, between [CLS] and [SEP]."""

    def __init__(self) -> None:
        self.words: dict[str, int] = {}

    def __call__(self, texts: list[str], **asked: Any) -> dict[str, Tensor]:
        rows = [
            [CLS, *(self.words.setdefault(w, 3 + len(self.words)) for w in text.split()), SEP]
            for text in texts
        ]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
        special = (ids <= SEP).long()
        return {
            "input_ids": ids,
            "attention_mask": (ids != PAD).long(),
            "special_tokens_mask": special,
        }
