"""The published special pieces of PLDR-LLM's tokenizers; byte pieces follow them."""

from __future__ import annotations

SPECIAL_PIECES = ("[PAD]", "[UNK]", "[START]", "[END]", "[SEP]", "[CLS]")
"""The ids are their places."""
PAD_ID, UNK_ID, START_ID, END_ID = range(4)
NUM_BYTE_PIECES = 256
