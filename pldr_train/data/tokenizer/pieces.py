"""The pieces that every tokenizer of a PLDR-LLM has, as published: special ones first, then the bytes."""

from __future__ import annotations

SPECIAL_PIECES = ("[PAD]", "[UNK]", "[START]", "[END]", "[SEP]", "[CLS]")
"""The ids are their places."""
PAD_ID, UNK_ID, START_ID, END_ID = range(4)
NUM_BYTE_PIECES = 256
NUM_FIXED_PIECES = len(SPECIAL_PIECES) + NUM_BYTE_PIECES
