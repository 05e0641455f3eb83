"""The tokenizer of PLDR-LLMs on SentencePiece itself; `tokenization_pldrllm_fast` is the one on tokenizers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from .sentencepiece_text import SPECIAL_PIECES, load_model_file, pieces_to_text


class PldrllmTokenizer(SentencePieceBackend):
    """SentencePiece unigram tokenizer with the published special pieces; its ids are SentencePiece's own.

    Special pieces written out in a text ("[SEP]") become their ids, and the text around them is tokenized piece by
    piece, as everywhere in transformers.

    Args:
        vocab_file: a SentencePiece `.model` file.
        add_bos_token: put [START] before each sequence.
        add_eos_token: put [END] after each sequence.
        kwargs: other special tokens, `padding_side` ("left" unless set) and what every tokenizer takes.

    Raises:
        ValueError: the file is missing, is no SentencePiece model, or has other special pieces.
    """

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012
    padding_side = "left"

    def __init__(
        self, vocab_file: str, add_bos_token: bool = False, add_eos_token: bool = False, **kwargs: Any
    ) -> None:
        load_model_file(vocab_file)
        self._add_bos_token, self._add_eos_token = bool(add_bos_token), bool(add_eos_token)
        # transformers' own handling of the leading space ("legacy=False") is not SentencePiece's.
        kwargs.pop("legacy", None)
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        super().__init__(vocab_file=str(vocab_file), legacy=True, **(SPECIAL_PIECES | kwargs))
        self._set_pattern()

    @property
    def add_bos_token(self) -> bool:
        """Whether [START] is put before each sequence."""
        return self._add_bos_token

    @add_bos_token.setter
    def add_bos_token(self, value: bool) -> None:
        self._add_bos_token = bool(value)
        self._set_pattern()

    @property
    def add_eos_token(self) -> bool:
        """Whether [END] is put after each sequence."""
        return self._add_eos_token

    @add_eos_token.setter
    def add_eos_token(self, value: bool) -> None:
        self._add_eos_token = bool(value)
        self._set_pattern()

    def _set_pattern(self) -> None:
        names = [name for name, used in (("bos", self._add_bos_token), ("eos", self._add_eos_token)) if used]
        self.special_tokens_pattern = "_".join(names) or "none"

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join pieces to text, as SentencePiece decodes them."""
        return pieces_to_text(tokens, special=self._added_tokens_encoder.keys())

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> tuple[str, ...]:
        """Write `tokenizer.model` and `tokenizer_config.json`."""
        files: tuple[str, ...] = super().save_pretrained(save_directory, *args, **kwargs)
        # transformers leaves these two to tokenizer.json, which this tokenizer does not have.
        path = next(Path(file) for file in files if file.endswith("tokenizer_config.json"))
        config = json.loads(path.read_text(encoding="utf-8"))
        config |= {"add_bos_token": self._add_bos_token, "add_eos_token": self._add_eos_token}
        path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
        return files


__all__ = ["PldrllmTokenizer"]
