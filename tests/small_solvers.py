"""The small models on which solving inside an engine is compared with the loop on the host."""

from __future__ import annotations

TOKENS, VOCAB = 11, 7
SMALL = dict(
    vocab_size=VOCAB, seq_len=TOKENS, hidden_size=64, num_heads=2, expansion=2.0,
    inner_multiple=16, L_layers=1, H_cycles=1, L_cycles=2,
)  # fmt: skip
MODELS = {
    "attention": {},
    "tokens": dict(mlp_t=True, pos_encodings="none"),
    "learned positions": dict(pos_encodings="learned"),
    "prefix": dict(puzzle_emb_ndim=64, puzzle_emb_len=2, num_puzzle_identifiers=3),
    "single-z": dict(variant="single_z"),
    "hier6": dict(variant="hier6", L_cycles=1),
    "hrm": dict(variant="hrm", H_layers=1, no_ACT_continue=False),
}
