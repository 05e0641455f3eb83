"""The papers' settings of a tokenizer, and settings in files."""

from __future__ import annotations

import difflib
import importlib.resources
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ruamel.yaml.error import MarkedYAMLError, YAMLError

from pldr_train.data.rows.split import Interval
from pldr_train.data.tokenizer.pieces import END_ID, PAD_ID, SPECIAL_PIECES, START_ID, UNK_ID
from pldr_train.errors import DataError
from pldr_train.recipe.yaml_text import parse_yaml, show
from pldr_train.untrusted import read_text

_EXAMPLE = Path("data/tokenizer.yaml")
PAPER_DOCUMENTS: Interval = (0, 2_000_000)
"""Documents of RefinedWeb."""
PAPER_SETTINGS: Mapping[str, Any] = MappingProxyType({
    "model_type": "unigram",
    "normalization_rule_name": "nmt_nfkc",
    "split_digits": True,
    "byte_fallback": True,
    "hard_vocab_limit": False,
    "input_sentence_size": 5_000_000,
    "shuffle_input_sentence": True,
    "max_sentence_length": 125_760,
    "pad_id": PAD_ID,
    "unk_id": UNK_ID,
    "bos_id": START_ID,
    "eos_id": END_ID,
    "pad_piece": SPECIAL_PIECES[PAD_ID],
    "unk_piece": SPECIAL_PIECES[UNK_ID],
    "bos_piece": SPECIAL_PIECES[START_ID],
    "eos_piece": SPECIAL_PIECES[END_ID],
    "user_defined_symbols": list(SPECIAL_PIECES[END_ID + 1 :]),
})  # fmt: skip
"""SentencePiece's settings by its own names. Others have SentencePiece's defaults."""

_LAYOUT = "the ids of special and byte pieces are published so, and models rely on them"
_FIXED = {key: _LAYOUT for key in PAPER_SETTINGS if key.endswith(("_id", "_piece", "_symbols"))} | {
    "model_type": "PLDR-LLM's tokenizers read no other model",
    "byte_fallback": _LAYOUT,
    "shuffle_input_sentence": "lines are always sampled from all documents",
}
_RULES = ("nmt_nfkc", "nmt_nfkc_cf", "nfkc", "nfkc_cf", "identity")


def _flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "must be true or false"


def _count(value: Any) -> str | None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return None if whole and value >= 1 else "must be a whole number, 1 or more"


def _share(value: Any) -> str | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return None if number and 0 < value <= 1 else "must be a number above 0 and at most 1"


def _rule(value: Any) -> str | None:
    return None if value in _RULES else f"must be one of {', '.join(_RULES)}"


def _interval(value: Any) -> str | None:
    if isinstance(value, list) and len(value) == 2 and not any(map(_whole_problem, value)) and value[0] < value[1]:
        return None
    return "must be an interval of document numbers, [start, stop) with start < stop, such as [0, 2_000_000]"


def _whole_problem(value: Any) -> bool:
    return isinstance(value, bool) or not isinstance(value, int) or value < 0


_FREE: dict[str, Callable[[Any], str | None]] = {
    "documents": _interval,
    "vocab_size": _count,
    "normalization_rule_name": _rule,
    "split_digits": _flag,
    "hard_vocab_limit": _flag,
    "input_sentence_size": _count,
    "max_sentence_length": _count,
    # Not in the papers' list. They have SentencePiece's defaults unless a file sets them.
    "character_coverage": _share,
    "seed_sentencepiece_size": _count,
    "shrinking_factor": _share,
    "num_sub_iterations": _count,
    "max_sentencepiece_length": _count,
    "split_by_unicode_script": _flag,
    "split_by_whitespace": _flag,
    "split_by_number": _flag,
}


@dataclass(frozen=True)
class TokenizerSettings:
    """Documents and settings for training a tokenizer. The defaults are the papers'."""

    documents: Interval = PAPER_DOCUMENTS
    vocab_size: int | None = None
    """The size that the settings were written for; None: any."""
    trainer: Mapping[str, Any] = field(default_factory=lambda: dict(PAPER_SETTINGS))
    """SentencePiece's settings."""


def load_settings(path: Path) -> TokenizerSettings:
    """Load the settings of a YAML file like data/tokenizer.yaml. Keys that it leaves out are the papers'.

    Raises DataError naming the file, the key, the value and the fix.
    """
    values = _read(path)
    for key, value in values.items():
        problem = _problem(key, value)
        if problem is not None:
            raise DataError(f"{path}: {key}={show(value)}: {problem}")
    chosen = dict(PAPER_SETTINGS) | {
        key: value for key, value in values.items() if key not in ("documents", "vocab_size")
    }
    start, stop = values.get("documents", PAPER_DOCUMENTS)
    return TokenizerSettings((start, stop), values.get("vocab_size"), chosen)


def _example_file() -> Path:
    """Return the file of the papers' settings, to be copied: the checkout's, or else the package's."""
    if _EXAMPLE.is_file():
        return _EXAMPLE
    return Path(str(importlib.resources.files("pldr_train") / _EXAMPLE))


def _read(path: Path) -> dict[str, Any]:
    if path == _EXAMPLE:
        path = _example_file()
    try:
        values = parse_yaml(read_text(path))
    except FileNotFoundError:
        raise DataError(f"--settings {path}: no such file; give a YAML file like {_example_file()}") from None
    except YAMLError as error:
        mark = error.problem_mark if isinstance(error, MarkedYAMLError) else None
        where = f" line {mark.line + 1}:" if mark else ""
        reason = (error.problem if isinstance(error, MarkedYAMLError) else None) or str(error).splitlines()[0]
        raise DataError(f"--settings {path}:{where} not valid YAML ({reason}); correct it") from None
    except (OSError, ValueError) as error:  # no UTF-8, or a value like an impossible date
        raise DataError(f"--settings {path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise DataError(f"--settings {path}: no mapping of keys to values; see {_example_file()}")
    return {str(key): value for key, value in values.items()}


def _problem(key: str, value: Any) -> str | None:
    if key in _FREE:
        return _with_fix(_FREE[key](value))
    if key in _FIXED:
        if type(value) is type(PAPER_SETTINGS[key]) and value == PAPER_SETTINGS[key]:
            return None
        return f"cannot be changed from {show(PAPER_SETTINGS[key])}: {_FIXED[key]}; remove the line"
    near = difflib.get_close_matches(key, [*_FREE, *_FIXED], n=1, cutoff=0.6)
    return f"unknown key; did you mean {near[0]}?" if near else f"unknown key; there are {', '.join(_FREE)}"


def _with_fix(problem: str | None) -> str | None:
    return problem and f"{problem}; correct it, or remove the line for the default"
