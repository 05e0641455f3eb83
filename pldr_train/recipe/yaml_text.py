"""Reading, overriding and writing recipe files, and the wording of what is wrong in them.

Knows YAML and pydantic's error records but not the recipe's schema: `pldr_train.recipe` hands in the known keys. Files
are read as YAML 1.2, so `1e-3` is a float and `no` is text.
"""

from __future__ import annotations

import datetime
import difflib
import importlib.resources
import io
import json
import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer, ComposerError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent
from ruamel.yaml.nodes import ScalarNode, SequenceNode
from ruamel.yaml.representer import SafeRepresenter

from pldr_train.errors import RecipeError, first_line
from pldr_train.untrusted import read_text

NO_NUL_PATTERN = r"^[^\x00]*$"
NAME_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9._-]*$"

_MAX_SHOWN_CHARACTERS = 80
_MOST_BYTES, _MOST_DEPTH, _MOST_NODES = 2**20, 50, 100_000
"""Of a recipe, and of all that its aliases stand for."""
_HALF = re.compile("[\ud800-\udfff]")
_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "model_type": "a section, a mapping of keys",
}
_TYPES: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (bool, "true or false"),  # before int, of which bool is a subclass
    (int, "a whole number"),
    (float, "a decimal number"),
    (str, "text"),
    ((list, tuple), "a list"),
    (dict, "a mapping"),
    (type(None), "null"),
    (datetime.date, "a date"),
)
_BOUNDS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}
_FIXED_TEXTS = {
    "finite_number": "must be a finite number; choose one, or null where the key may be empty",
    "string_unicode": "holds half of a character (a surrogate without its other half), or bytes that are no UTF-8; "
    "correct it",
    NAME_PATTERN: "may hold only letters, digits, '.', '_' and '-' and not start with '.' or '-', for it names a "
    "folder; rename it",
    NO_NUL_PATTERN: "holds a NUL character, which no name or path may; remove it",
}
"""By kind of error, or by pattern."""
# What other programs call some keys; used only to answer an unknown key.
_OTHER_NAMES = {
    "learning_rate": "lr",
    "max_lr": "lr",
    "d_model": "hidden_size",
    "seq_len": "context_length",
    "sequence_length": "context_length",
    "grad_clip": "clip_norm",
    "gradient_accumulation_steps": "micro_batch_size",
    "dtype": "precision",
}


@dataclass(frozen=True)
class Problem:
    """One thing wrong in a recipe: the dotted keys it concerns and the line shown to the user."""

    keys: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class FileKind:
    """A kind of YAML file of which some come along with the package, and the words for it."""

    noun: str
    folder: Path
    """Where such files lie, in the working directory and in the package."""
    needs: str
    """What an empty file lacks."""
    consists: str
    """What it is made of."""


RECIPE = FileKind(
    "recipe",
    Path("recipes"),
    "a recipe needs at least run.name, see recipes/README.md",
    "a recipe is made of sections such as `run:` with keys below them",
)


def recipe_error(source: str, problems: Sequence[Problem], kind: FileKind = RECIPE) -> RecipeError:
    """Build the one error that lists every problem of the recipe called `source`, one a line."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    lines = [f"{source}: {count} in the {kind.noun}:", *(f"  {problem.text}" for problem in problems)]
    return RecipeError("\n".join(lines))


# ---------------------------------------------------------------------------------------------------- YAML in and out


class _Composer(Composer):
    """Composes a document within limits, before anything is built of it; joins halves of characters.

    An alias stands for all that it names: ten lines of aliases to aliases are more than fits into memory.
    """

    _depth, _nodes = 0, 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Return the next node; raises ComposerError beyond the limits."""
        event = self.parser.peek_event()
        before, weights = self._nodes, vars(self).setdefault("_weights", {})
        alias = event.anchor if isinstance(event, AliasEvent) else None
        if alias in self.anchors:
            # One that is not finished yet holds itself.
            self._nodes += weights.get(alias, _MOST_NODES)
        self._nodes += 1
        self._depth += 1
        if self._depth > _MOST_DEPTH or self._nodes > _MOST_NODES:
            reason = (
                f"nested more than {_MOST_DEPTH} deep"
                if self._depth > _MOST_DEPTH
                else (f"more than {_MOST_NODES:,} values, or an alias within itself")
            )
            raise ComposerError(None, None, reason, event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if alias is None and event.anchor is not None:
            weights[event.anchor] = self._nodes - before
        return node

    def compose_scalar_node(self, anchor: Any) -> Any:
        """Return a single value, with the two halves that JSON writes for an emoji joined."""
        node = super().compose_scalar_node(anchor)
        if _HALF.search(node.value):
            try:
                node.value = node.value.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
            except UnicodeDecodeError:
                reason = "half of a character (a surrogate without its other half)"
                raise ComposerError(None, None, reason, node.start_mark) from None
        return node


def parse_yaml(text: str) -> Any:
    """Parse one YAML 1.2 document into plain Python values.

    Raises:
        YAMLError: ruamel's; it is none, has duplicate keys, or more values or depth than the limits.
        ValueError: a value looks like a date or a number and is none.
    """
    # pure=True: the C parser reads YAML 1.1, where 1e-3 is text and `no` is false.
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = _Composer
    try:
        return yaml.load(text)
    except (TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError, AssertionError) as error:
        # The library's own: a tag on a value of another kind, a list as a key, an exponent beyond all numbers.
        raise ValueError(f"{type(error).__name__}: {first_line(error)}") from None


def read_recipe_file(path: Path, kind: FileKind = RECIPE) -> dict[str, Any]:
    """Read the mapping in the YAML file `path`; raises RecipeError with the file, the line and the fix.

    Where there is no such file, the name "quickstart" and the path "recipes/quickstart.yaml" mean that recipe of the
    working directory's folder recipes/, or of the package. Other kinds of files lie in other folders.
    """
    try:
        # From a pipe as well: `pldr-train fit <(...)`.
        text = read_text(path, _MOST_BYTES, regular=False)
    except FileNotFoundError:
        named = _named_file(path, kind)
        if named is None:
            raise RecipeError(_not_found_text(path, kind)) from None
        return read_recipe_file(named, kind)
    except IsADirectoryError:
        listing = _listing(_files_in(path))
        raise RecipeError(f"{path} is a folder; name a {kind.noun} file in it{listing}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not a UTF-8 text file (byte {error.start}); is it a {kind.noun}?") from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    except ValueError as error:
        raise RecipeError(f"{path} is no {kind.noun}: {error}; name a YAML file") from None
    try:
        values = parse_yaml(text)
    except YAMLError as error:
        raise RecipeError(f"{path}{_yaml_error_text(error)}") from None
    except ValueError as error:  # a scalar that looks like a date or number and is none, such as 2024-99-99
        raise RecipeError(f"{path} holds a value that YAML cannot read ({error}); put it in quotes") from None
    if values is None:
        raise RecipeError(f"{path} is empty; {kind.needs}")
    if not isinstance(values, dict):
        raise RecipeError(f"{path} holds {type_in_words(values)}, not a mapping; {kind.consists}")
    return values


class _Representer(SafeRepresenter):
    """Writes lists on one line, as the shipped recipes do."""

    def represent_list(self, data: list[Any]) -> SequenceNode:
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)

    def represent_text(self, data: str) -> ScalarNode:
        # ruamel leaves some texts bare that it then reads as something else (`?0` in a list is a mapping).
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if _BARE_TEXT.fullmatch(data) else '"')


_BARE_TEXT = re.compile(r"[A-Za-z_/][A-Za-z0-9_./-]*")
_Representer.add_representer(list, _Representer.represent_list)
_Representer.add_representer(str, _Representer.represent_text)


def to_yaml(values: Mapping[str, Any]) -> str:
    """Write plain values as YAML 1.2 in the mapping's order; `parse_yaml` gives back equal values."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    # A folded line loses a blank beside an escape.
    yaml.width = sys.maxsize
    # ruamel writes these as they are although it reads some of them as line breaks; as escapes they survive.
    yaml.allow_unicode = not any(mark in json.dumps(values, ensure_ascii=False) for mark in "\x85\u2028\u2029\ufeff")
    stream = io.StringIO()
    yaml.dump(dict(values), stream)
    return stream.getvalue()


# ------------------------------------------------------------------------------------------------------- overrides


def apply_overrides(
    values: Mapping[str, Any], overrides: Sequence[str], known_keys: Sequence[str]
) -> tuple[dict[str, Any], list[Problem]]:
    """Return `values` with each `section.key=value` set, and the overrides that cannot be set or come twice."""
    merged = {key: dict(section) if isinstance(section, dict) else section for key, section in values.items()}
    problems: list[Problem] = []
    first: dict[str, str] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if equals and first.setdefault(key, override) is not override:
            problems.append(Problem((key,), f"{override}: set before, by {first[key]}; keep one of them"))
            continue
        if not equals:
            example = suggest_key(key, known_keys) or "optim.lr"
            problems.append(Problem((), f"{override}: not an override; write it as key=value, such as {example}=..."))
        elif key not in known_keys:
            problems.append(Problem((key,), f"{key}={text}: {unknown_key_text(key, known_keys)}"))
        else:
            problem = _set_override(merged, key, text)
            problems += [problem] if problem else []
    return merged, problems


def _set_override(values: dict[str, Any], key: str, text: str) -> Problem | None:
    """Set one known key in place, or say why its value cannot be read."""
    if not text.strip():
        return Problem((key,), f"{key}=: no value; write {key}=null for none or {key}='\"\"' for empty text")
    try:
        value = parse_yaml(text)
    except (YAMLError, ValueError) as error:
        reason = (getattr(error, "problem", None) or str(error)).splitlines()[0]
        return Problem((key,), f"{key}={text}: not a YAML value ({reason}); put text in quotes: {key}='\"...\"'")
    section, _, leaf = key.partition(".")
    target = values.setdefault(section, {})
    if isinstance(target, dict):  # otherwise the section itself is reported as wrong
        target[leaf] = value
    return None


# ---------------------------------------------------------------------------------------------------------- wording


def suggest_key(key: str, known_keys: Sequence[str]) -> str | None:
    """Return the known dotted keys nearest to a mistyped one ("a.b" or "a.b or c.b"), or None when none is near."""
    leaf = key.rpartition(".")[2]
    leaf = _OTHER_NAMES.get(leaf, leaf)
    same_leaf = [known for known in known_keys if known.rpartition(".")[2] == leaf]
    if same_leaf:
        return " or ".join(same_leaf)
    near = difflib.get_close_matches(key, known_keys, n=1, cutoff=0.75)
    if not near:
        leaves = {known.rpartition(".")[2]: known for known in known_keys}
        near = [leaves[match] for match in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.6)]
    return near[0] if near else None


def unknown_key_text(key: str, known_keys: Sequence[str]) -> str:
    """Say that a key or section is unknown and which one was probably meant."""
    sections = list(dict.fromkeys(known.partition(".")[0] for known in known_keys))
    section, dot, _ = key.partition(".")
    if key in sections:
        return f"a section, not a key; set one of its keys, such as {_keys_of(key, known_keys)[0]}"
    same_section = next(iter(difflib.get_close_matches(section, sections, n=1, cutoff=0.5)), None)
    near = suggest_key(key, known_keys)
    if section not in sections and (not near or (not dot and not near.endswith(f".{key}"))):
        near = same_section or near
    if near:
        return f"unknown {'key' if dot or '.' in near else 'section'}; did you mean {near}?"
    if section in sections:
        leaves = ", ".join(known.partition(".")[2] for known in _keys_of(section, known_keys))
        return f"unknown key; {section} has {leaves}"
    return f"unknown section; a recipe has {', '.join(sections)}"


def show(value: Any) -> str:
    """Write a value as one would in YAML, cut to one short line."""
    try:
        text = value if _is_plain_text(value) else json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):
        text = repr(value)
    return text if len(text) <= _MAX_SHOWN_CHARACTERS else f"{text[: _MAX_SHOWN_CHARACTERS - 3]}..."


def rephrase(
    error: ErrorDetails,
    values: Mapping[str, Any],
    known_keys: Sequence[str],
    entry_keys: Mapping[str, Sequence[str]] | None = None,
) -> Problem:
    """Turn one record of pydantic's ValidationError into a line that names key, value and fix.

    `values` is the mapping that was validated: errors inside a list show the list's key. `entry_keys` are the keys of
    the entries of lists of mappings.
    """
    names = [str(part) for part in error["loc"][:2]]
    key = ".".join(names)
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    index = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"][2:])
    wrong_entry = _wrong_entry_text(error, (entry_keys or {}).get(key, ()))
    if wrong_entry is not None:
        return Problem((key,), f"{key}{index}{wrong_entry}")
    if kind == "missing" and not index:
        return Problem((key,), f"{key}: missing; add it to the file or pass {key}=...")
    if kind in {"extra_forbidden", "invalid_key"}:
        shown = f"={show(value)}" if kind == "extra_forbidden" and not isinstance(value, dict) else ""
        return Problem((key,), f"{key}{shown}: {unknown_key_text(key, known_keys)}")
    if kind in {"missing", "too_long", "too_short"}:
        whole = values[names[0]][names[1]] if len(names) == 2 else value
        return Problem((key,), f"{key}={show(whole)}: must be a list of two; write it as [first, second]")
    return Problem((key,), f"{key}{index}={show(value)}: {_wrong_value_text(kind, value, context, error['msg'])}")


def _wrong_entry_text(error: ErrorDetails, keys: Sequence[str]) -> str | None:
    """Say what is wrong with a list of mappings that have `keys`, or with one of them; None: a value is."""
    kind, value = error["type"], error["input"]
    if not keys:
        return None
    texts = {
        "missing": ": missing; each entry needs it",
        "model_type": f"={show(value)}: must be a mapping; write it as {{{keys[0]}: {show(value)}}}",
        "too_short": f"={show(value)}: holds nothing; give it an entry",
        "too_long": f": holds more than {error.get('ctx', {}).get('max_length')} entries; shorten it",
    }
    if kind != "extra_forbidden":
        return texts.get(kind)
    near = difflib.get_close_matches(str(error["loc"][-1]), keys, n=1)
    return f"={show(value)}: unknown key; " + (f"did you mean {near[0]}?" if near else f"it has {', '.join(keys)}")


def _wrong_value_text(kind: str, value: Any, context: Mapping[str, Any], message: str) -> str:
    """Say what is wrong with a value of a known key, and the fix."""
    if kind in _EXPECTED:
        fix = _type_fix(kind, value)
        return f"must be {_EXPECTED[kind]}, not {type_in_words(value)}; {fix}"
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return f"must be {words} {context[name]:,}; choose another value"
    if kind == "literal_error":
        choices = str(context["expected"]).replace("'", "")
        near = difflib.get_close_matches(str(value), choices.replace(" or ", ", ").split(", "), n=1)
        return f"must be {choices}" + (f"; did you mean {near[0]}?" if near else "; choose one of them")
    if kind == "string_too_long":
        return f"has {len(value):,} characters; shorten it to {context['max_length']:,} at most"
    if kind == "value_error":
        return f"{context['error']}; choose another value"
    fixed = _FIXED_TEXTS.get(context.get("pattern", kind))
    return fixed or f"{message[:1].lower()}{message[1:]}; correct it"


def _type_fix(kind: str, value: Any) -> str:
    """Say what to write instead of a value of the wrong type."""
    word = str(value).lower()
    fix = "choose another value"
    if kind == "model_type":
        fix = "indent its keys below it, or remove the line"
    elif kind == "tuple_type":
        fix = f"write it as [{show(value)}]"
    elif value is None:
        fix = "give a value, or remove the line to take the default"
    elif kind == "string_type":
        fix = "put it in quotes"
    elif kind == "bool_type" and word in {"yes", "no", "on", "off", "0", "1", "true", "false"}:
        fix = f"write {'true' if word in {'yes', 'on', '1', 'true'} else 'false'}"
    elif kind == "int_type" and isinstance(value, float) and value.is_integer():
        fix = f"write {int(value)}"
    elif kind in {"int_type", "float_type"} and isinstance(value, str) and _is_number_text(value):
        fix = f"write {value} without quotes"
    return fix


def type_in_words(value: Any) -> str:
    """Say what kind of value something is, in YAML's terms."""
    for types, words in _TYPES:
        if isinstance(value, types):
            return words
    return f"a {type(value).__name__}"


def _is_plain_text(value: Any) -> bool:
    """Return whether a value is text that YAML reads back as the same text without quotes."""
    if not isinstance(value, str) or not value.isprintable():
        return False
    try:
        return bool(parse_yaml(value) == value)
    except (YAMLError, ValueError):
        return False


def _is_number_text(text: str) -> bool:
    try:
        parsed = parse_yaml(text)
    except (YAMLError, ValueError):
        return False
    return isinstance(parsed, int | float) and not isinstance(parsed, bool)


def _keys_of(section: str, known_keys: Iterable[str]) -> list[str]:
    return [known for known in known_keys if known.startswith(f"{section}.")]


def _yaml_error_text(error: YAMLError) -> str:
    """Return " line N: reason; fix" for an error of the YAML parser."""
    if not isinstance(error, MarkedYAMLError):
        return f" is not valid YAML: {str(error).splitlines()[0]}"
    mark = error.problem_mark or error.context_mark
    where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    reason = (error.problem or error.context or "not valid YAML").splitlines()[0]
    begun = error.context_mark
    if mark and begun and begun.line != mark.line and "duplicate key" not in reason:
        reason += f" ({error.context or 'what is open'}, begun in line {begun.line + 1})"
    fix = "keep one of the two" if "duplicate key" in reason else "check indentation, colons and quotes near it"
    return f"{where}: {reason}; {fix}"


def _named_file(path: Path, kind: FileKind) -> Path | None:
    """Return the file that `path` names although there is no such file; None where there is none."""
    local = path if path.suffix else kind.folder / f"{path}.yaml"
    if local.parent != kind.folder or local.suffix != ".yaml":
        return None
    return local if local.is_file() else packaged_files(kind).get(local.stem)


def packaged_files(kind: FileKind) -> dict[str, Path]:
    """Return the files in the package by name; in a checkout its folder recipes/ is linked there."""
    folder = importlib.resources.files("pldr_train") / str(kind.folder)
    return {path.stem: path for path in _files_in(Path(str(folder)))}


def _not_found_text(path: Path, kind: FileKind) -> str:
    available: dict[str, str | Path] = {name: name for name in packaged_files(kind)}
    available |= {file.stem: file for file in _files_in(kind.folder)}
    near = difflib.get_close_matches(path.stem, available, n=1)
    if near:
        return f"{path}: no such {kind.noun} file; did you mean {available[near[0]]}?{_listing(available.values())}"
    return f"{path}: no such {kind.noun} file; give the path of a YAML file{_listing(available.values())}"


def _files_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.yaml"), key=lambda path: path.stem)


def _listing(files: Collection[str | Path]) -> str:
    return f" (there are: {', '.join(map(str, files))})" if files else ""
