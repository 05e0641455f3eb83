"""The tokenizer of PLDR-LLMs on the tokenizers library; with a tokenizer.json it needs no sentencepiece."""

from __future__ import annotations

import base64
import importlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .sentencepiece_text import (
    SPACE_PIECE,
    SPECIAL_PIECES,
    CharsMap,
    CharsMapNormalizer,
    load_model_file,
    pieces_to_text,
)

_WRITTEN_OUT_BYTE = Regex("<(?=0x[0-9A-F]{2}>)")
"""The beginning of a text like "<0x0A>". The library finds byte pieces in texts, SentencePiece does not: a cut behind
the first character prevents it."""


class PldrllmTokenizerFast(PreTrainedTokenizerFast):
    """SentencePiece's unigram tokenization in the tokenizers library, with offsets into the text.

    Normalization is SentencePiece's own (see `sentencepiece_text`). The saved tokenizer.json holds the library's
    version of it instead, for programs that read that file without this class.

    Args:
        vocab_file: a SentencePiece `.model` file, needed where there is no tokenizer.json.
        tokenizer_file: a tokenizer.json that this class saved. One of another class, such as those of the published
            folders, cuts text otherwise; the `.model` file beside it is read instead.
        add_bos_token: put [START] before each sequence; `None`: as saved, otherwise no.
        add_eos_token: put [END] after each sequence; `None`: as saved, otherwise no.
        kwargs: other special tokens, `padding_side` ("left" unless set) and what every tokenizer takes.

    Raises:
        ValueError: neither file is there, or one is not what it should be.
        ImportError: a `.model` file without sentencepiece and protobuf installed.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model", "tokenizer_file": "tokenizer.json"}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012
    padding_side = "left"

    def __init__(
        self,
        vocab_file: str | None = None,
        tokenizer_file: str | None = None,
        add_bos_token: bool | None = None,
        add_eos_token: bool | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs.pop("tokenizer_object", None)
        backend = _from_tokenizer_json(tokenizer_file, vocab_file)
        if backend is None:
            backend = _from_model_file(vocab_file)
        self._portable_normalizer = backend.normalizer
        if backend.pre_tokenizer is None:
            backend.pre_tokenizer = pre_tokenizers.Split(_WRITTEN_OUT_BYTE, "merged_with_previous")
        added = {"add_bos_token": add_bos_token, "add_eos_token": add_eos_token}
        _fill_from_template(added, backend)
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        super().__init__(tokenizer_object=backend, vocab_file=vocab_file, **(SPECIAL_PIECES | kwargs | added))
        self._install_normalizer()

    @classmethod
    def convert_to_native_format(cls, **kwargs: Any) -> dict[str, Any]:
        """Return the arguments as they are: the constructor reads both kinds of file itself."""
        kwargs.pop("trust_remote_code", None)
        return kwargs

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join pieces to text, as SentencePiece decodes them."""
        return pieces_to_text(tokens, special=self._special_strings())

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Copy the SentencePiece model beside tokenizer.json, if it is known."""
        source = getattr(self, "vocab_file", None)
        if source is None or not Path(source).is_file():
            return ()
        name = f"{filename_prefix}-" if filename_prefix else ""
        target = Path(save_directory) / f"{name}{self.vocab_files_names['vocab_file']}"
        if not target.exists() or not target.samefile(source):
            shutil.copyfile(source, target)
        return (str(target),)

    def train_new_from_iterator(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported: train a SentencePiece model instead.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "a PLDR-LLM's tokenizer is trained by SentencePiece (pldr_train.data.tokenizer.training.train_tokenizer); "
            "build this class from the .model file"
        )

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        return self.convert_tokens_to_string(self.convert_ids_to_tokens(ids, skip_special_tokens=skip_special_tokens))

    def _special_strings(self) -> set[str]:
        return {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}

    def _install_normalizer(self) -> None:
        charsmap = _charsmap_of(self._portable_normalizer)
        if charsmap is not None:
            exact = normalizers.Normalizer.custom(CharsMapNormalizer(CharsMap(charsmap)))
            self._tokenizer.normalizer = normalizers.Sequence([exact, *_space_normalizers()])

    @contextmanager
    def _portable(self) -> Iterator[None]:
        """With the library's own normalizer in place, which alone can be written out."""
        exact = self._tokenizer.normalizer
        self._tokenizer.normalizer = self._portable_normalizer
        try:
            yield
        finally:
            self._tokenizer.normalizer = exact

    def _save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> tuple[str, ...]:
        with self._portable():
            files: tuple[str, ...] = super()._save_pretrained(save_directory, *args, **kwargs)
        prefix = kwargs.get("filename_prefix")
        return files + self.save_vocabulary(str(save_directory), prefix)

    def __getstate__(self) -> dict[str, Any]:
        with self._portable():
            backend = self._tokenizer.to_str()
        return self.__dict__ | {"_tokenizer": backend, "_portable_normalizer": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        backend = Tokenizer.from_str(state["_tokenizer"])
        self.__dict__.update(state | {"_tokenizer": backend, "_portable_normalizer": backend.normalizer})
        self._install_normalizer()


def _from_tokenizer_json(path: str | None, vocab_file: str | None) -> Tokenizer | None:
    """Return the tokenizer in a tokenizer.json; `None` if there is none or the `.model` file is to be read instead."""
    if path is None or not Path(path).is_file():
        return None
    backend = Tokenizer.from_file(str(path))
    spaces = [json.loads(each.__getstate__()) for each in _space_normalizers()]
    if _normalizer_parts(backend.normalizer)[-len(spaces) :] == spaces:
        return backend
    if vocab_file is None or not Path(vocab_file).is_file():
        raise ValueError(
            f"tokenizer_file={path} was written by another tokenizer class and cuts text otherwise than the model was "
            "trained with; put the SentencePiece tokenizer.model beside it"
        )
    return None


def _from_model_file(path: str | None) -> Tokenizer:
    processor = load_model_file(path)
    try:
        sentencepiece_model_pb2: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    except ImportError as error:
        raise ImportError(f"vocab_file={path}: reading it needs protobuf; pip install protobuf") from error
    proto: Any = sentencepiece_model_pb2.ModelProto.FromString(processor.serialized_model_proto())
    spec = proto.normalizer_spec
    if not (spec.add_dummy_prefix and spec.remove_extra_whitespaces and spec.escape_whitespaces):
        raise ValueError(
            f"vocab_file={path}: it was trained with other whitespace settings than PLDR-LLMs' (add_dummy_prefix, "
            "remove_extra_whitespaces, escape_whitespaces all true); use PldrllmTokenizer"
        )
    unigram, is_unigram = proto.trainer_spec, proto.trainer_spec.model_type == 1
    if not is_unigram:
        raise ValueError(f"vocab_file={path}: not a unigram model; use PldrllmTokenizer")
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    backend = Tokenizer(models.Unigram(pieces, unk_id=unigram.unk_id, byte_fallback=unigram.byte_fallback))
    table = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    backend.normalizer = normalizers.Sequence([*table, *_space_normalizers()])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE_PIECE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(piece, normalized=False) for piece in SPECIAL_PIECES.values()])
    return backend


def _space_normalizers() -> list[Any]:
    """Return what SentencePiece does to spaces after its table: one between words, one before the first, none at the
    end.
    """
    return [
        normalizers.Replace(Regex(" {2,}"), " "),
        normalizers.Replace(Regex("^ +| +$"), ""),
        normalizers.Prepend(" "),
        normalizers.Replace(" ", SPACE_PIECE),
        normalizers.Replace(Regex(f"{SPACE_PIECE}+$"), ""),
    ]


def _normalizer_parts(normalizer: Any) -> list[dict[str, Any]]:
    """Return the normalizers within a sequence of them, as tokenizer.json describes them."""
    state = {} if normalizer is None else json.loads(normalizer.__getstate__())
    parts: list[dict[str, Any]] = state.get("normalizers", [])
    return parts


def _charsmap_of(normalizer: Any) -> bytes | None:
    """Return the replacement table inside the library's normalizer."""
    parts = _normalizer_parts(normalizer)
    encoded = next((part["precompiled_charsmap"] for part in parts if part["type"] == "Precompiled"), None)
    return None if encoded is None else base64.b64decode(encoded)


def _fill_from_template(added: dict[str, bool | None], backend: Tokenizer) -> None:
    """Complete the flags from what a saved tokenizer.json adds around an empty text."""
    template = backend.encode("", add_special_tokens=True).tokens
    saved = {
        "add_bos_token": template[:1] == [SPECIAL_PIECES["bos_token"]],
        "add_eos_token": template[-1:] == [SPECIAL_PIECES["eos_token"]],
    }
    for name, value in saved.items():
        if added[name] is None:
            added[name] = value


__all__ = ["PldrllmTokenizerFast"]
