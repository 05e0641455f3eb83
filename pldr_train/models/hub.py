"""Models of the Hugging Face Hub: `hub:OWNER/NAME[@REVISION]` as a folder on this disk.

Weights in safetensors, configuration and tokenizer are fetched and nothing else, so no code of a repository is ever
here. A revision is resolved to a commit. The SHA-256 of every file is kept: the same commit with other bytes, now or at
any later time, is an error. Without the Hub, a model that was fetched before is taken from the cache.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars

from pldr_train.checkpoint.manifest import describe_file
from pldr_train.data.downloading import free_bytes
from pldr_train.data.files import write_file_atomically
from pldr_train.data.sources.hub_http import HTTP_ERRORS, endpoint, refusal, transient
from pldr_train.errors import DataError, UserError, first_line
from pldr_train.models import HUB_MARK as MARK
from pldr_train.models import is_hub_name
from pldr_train.printing import can_show_a_bar
from pldr_train.untrusted import read_json

_log = logging.getLogger(__name__)

RECORD_FILE = "source.json"
"""Where an imported folder says what it was made of."""
_COMMITS_FILE = "commits.json"
_KEPT_FIX = "free some space, or set HF_HOME"
_NAME = re.compile(r"(?:[\w.-]+/)?[\w.-]+", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CONFIG = "config.json"
_WANTED = {
    _CONFIG, "generation_config.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "model.safetensors.index.json",
}  # fmt: skip
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_TOKEN_FIX = "log in with `hf auth login`, or set HF_TOKEN to a token that may read it"


@dataclass(frozen=True)
class HubSource:
    """Which files of which repository a folder was made of."""

    repository: str
    revision: str | None
    """As it was asked for; None: the default branch."""
    commit: str
    files: Mapping[str, str]
    """File -> SHA-256."""

    def as_json(self) -> str:
        """Return the text of `RECORD_FILE`."""
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def read(cls, folder: Path) -> HubSource | None:
        """Return what an imported folder was made of; None if it does not say."""
        try:
            values = read_json(folder / RECORD_FILE)
            return cls(values["repository"], values["revision"], values["commit"], dict(values["files"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None


@dataclass(frozen=True)
class HubModel:
    """A model of the Hub, fetched."""

    folder: Path
    """In huggingface_hub's cache."""
    source: HubSource


def local_model(source: Path) -> Path:
    """Return the folder of a model: `source` itself, or where a model of the Hub was fetched to. Raises DataError."""
    return fetch_model(source).folder if is_hub_name(source) else source


def fetch_model(source: str | Path) -> HubModel:
    """Fetch a model of the Hub, unless it is in the cache already.

    Where HF_HUB_OFFLINE forbids the Hub or it does not answer, it is what was fetched before under this name.

    Args:
        source: `hub:OWNER/NAME`, or `hub:OWNER/NAME@REVISION` with a branch, a tag or a commit.

    Raises:
        DataError: there is no such model or revision, no weights in safetensors, no network, no permission, no room; or
            a file is not what the repository lists, or not what the same commit had before.
    """
    repository, _, named = str(source).removeprefix(MARK).partition("@")
    revision = named or None
    if not _NAME.fullmatch(repository) or str(source).endswith("@"):
        raise DataError(f"{source}: no name of a model on the Hub; write {MARK}OWNER/NAME or {MARK}OWNER/NAME@REVISION")
    with hub_errors(str(source)):
        try:
            found = _fetch(str(source), repository, revision)
        except Exception as error:
            held = _held(str(source), repository, revision) if _is_unreachable(error) else None
            if held is None:
                raise
            return held
    _check_against_earlier(str(source), found.source)
    return found


def _is_unreachable(error: Exception) -> bool:
    return isinstance(error, OfflineModeIsEnabled) or transient(error) is not None


def _fetch(source: str, repository: str, revision: str | None) -> HubModel:
    info: Any = HfApi(endpoint=endpoint()).model_info(repository, revision=revision, files_metadata=True)
    commit, listed = str(info.sha), {each.rfilename: each for each in info.siblings or ()}
    if not _COMMIT.fullmatch(commit):
        raise DataError(f"{source}: {endpoint()} names no commit; check HF_ENDPOINT")
    names = _names(source, list(listed))
    _check_room(source, sum(listed[name].size or 0 for name in names))
    _log.info(f"{source}: commit {commit}")
    if not can_show_a_bar(sys.stderr):
        disable_progress_bars()
    folder = Path(snapshot_download(repository, revision=commit, allow_patterns=list(names), endpoint=endpoint()))
    digests = {name: _checked_digest(source, folder / name, listed[name]) for name in names}
    return HubModel(folder, HubSource(repository, revision, commit, digests))


def _held(source: str, repository: str, revision: str | None) -> HubModel | None:
    """Return what was fetched before under a name, as it was then; None if nothing was, or it is not there any more."""
    commit = _commits(repository).get(revision or "")
    if commit is None and revision is not None and _COMMIT.fullmatch(revision):
        commit = revision
    before = None if commit is None else HubSource.read(_records(repository) / commit)
    if before is None:
        return None
    try:
        names = list(before.files)
        folder = Path(snapshot_download(repository, revision=commit, allow_patterns=names, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    for name, sha256 in before.files.items():
        file = folder / name
        if not file.exists():
            return None
        if describe_file(file.resolve())["sha256"] != sha256:
            raise DataError(
                f"{source}: {name} in the cache is not the file that was fetched; remove {file.resolve()}, and run the "
                "command again where the Hub can be reached"
            )
    _log.warning(f"{source}: {endpoint()} is not reached; commit {commit} is taken, as it was fetched before")
    return HubModel(folder, HubSource(repository, revision, str(commit), before.files))


def check_record(target: Path, found: HubSource) -> None:
    """Check that an imported folder, which is to be replaced, was made of the same files, if it says of which.

    Another commit of a branch that was not named may have come; one that was named by tag or commit is pinned.

    Raises:
        DataError: a revision moved, or the same commit has other bytes.
    """
    before = HubSource.read(target)
    if before is None or before.repository != found.repository:
        return
    if before.commit == found.commit:
        _compare(f"{MARK}{found.repository}", before, found, f"{target / RECORD_FILE}")
    elif found.revision is not None and found.revision == before.revision:
        raise DataError(
            f"{MARK}{found.repository}@{found.revision}: is commit {found.commit} now, and was {before.commit} when "
            f"{target} was imported. Name the commit that you want, or import into another folder"
        )


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Word what requests to the Hub raise for the user. Raises DataError instead.

    Args:
        what: is read or written, at the beginning of messages.
    """
    try:
        yield
    except UserError:
        raise
    except HFValidationError as error:
        raise DataError(f"{what}: no name of a model on the Hub ({first_line(error)}); write OWNER/NAME") from error
    except Exception as error:
        text = _text_of(error)
        if text is None:
            raise
        raise DataError(f"{what}: {text}") from error


_MEANINGS: tuple[tuple[type[Exception], str], ...] = (
    (LocalTokenNotFoundError, f"no token for the Hub; {_TOKEN_FIX}"),
    (
        OfflineModeIsEnabled,
        "HF_HUB_OFFLINE=1 forbids the Hub, and the cache does not have it; unset it, or name a folder on this disk",
    ),
    (GatedRepoError, f"its authors ask for consent: accept the terms on its page, and {_TOKEN_FIX}"),
    (RepositoryNotFoundError, f"no such model, or a private one; check the name, or {_TOKEN_FIX}"),
    (RevisionNotFoundError, "no such revision; name a branch, a tag or a commit that the model's page lists"),
)


def _text_of(error: Exception) -> str | None:
    """Return what an error of the Hub or the disk means and how to mend it; None for a fault of this program."""
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # what kept the library from the Hub
    address, passing = endpoint(), transient(error)
    text = next((meaning for kind, meaning in _MEANINGS if isinstance(error, kind)), None)
    if text is not None:
        return f"{text} ({address})"
    if "No space left" in str(error) or getattr(error, "errno", None) == errno.ENOSPC:
        return f"the disk of {constants.HF_HUB_CACHE} is full; free some space, or set HF_HOME to a folder with room"
    if passing is not None or isinstance(error, LocalEntryNotFoundError):
        reason = "the Hub does not answer" if passing is None else passing.reason
        return f"{reason} ({address}); try again when the network and the Hub are up, or name a local folder"
    if isinstance(error, HTTP_ERRORS):
        return str(refusal(error, "refused", address))
    return f"{error.strerror or first_line(error)} ({error.filename})" if isinstance(error, OSError) else None


def _names(what: str, listed: Sequence[str]) -> list[str]:
    """Return the files to fetch, of those that a repository has."""
    names = [name for name in listed if name in _WANTED or _WEIGHTS.fullmatch(name)]
    if not any(_WEIGHTS.fullmatch(name) for name in names):
        others = [name for name in listed if name.endswith((".bin", ".pth", ".pt", ".safetensors"))]
        has = f"it has {', '.join(others[:3])}" if others else "it has no weights"
        raise DataError(
            f"{what}: no model.safetensors there ({has}); other files of weights are not taken from the Hub. Download "
            "one that you trust yourself, and `pldr-train import` the file"
        )
    if _CONFIG not in names:
        raise DataError(f"{what}: no {_CONFIG} there, so it is no model that transformers loads; name another one")
    return sorted(names)


def _check_room(what: str, num_bytes: int) -> None:
    cache = Path(constants.HF_HUB_CACHE)
    free = free_bytes(cache)
    if num_bytes > free:
        raise DataError(
            f"{what}: {num_bytes / 1e9:,.2f} GB are to be fetched, and {free / 1e9:,.2f} GB are free for {cache}; free "
            "some space, or set HF_HOME to a folder with room"
        )


def _checked_digest(what: str, file: Path, listed: Any) -> str:
    """Return a fetched file's SHA-256, after a look at what the repository lists of it."""
    sha256 = str(describe_file(file.resolve())["sha256"])
    if listed.lfs is not None:
        same = listed.lfs.sha256 == sha256
    else:
        content = file.read_bytes()
        git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
        same = listed.blob_id in (None, git)
    if not same:
        raise DataError(
            f"{what}: {file.name} is not the file that the repository lists (SHA-256 {sha256}); remove "
            f"{file.resolve()} and run the command again"
        )
    return sha256


def _check_against_earlier(what: str, found: HubSource) -> None:
    """Compare a commit's files with those that it had at the first time, which are kept beside the cache."""
    kept = _records(found.repository) / found.commit
    before = HubSource.read(kept)
    if before is not None:
        _compare(what, before, found, str(kept / RECORD_FILE))
        found = HubSource(found.repository, found.revision, found.commit, {**before.files, **found.files})
    kept.mkdir(parents=True, exist_ok=True)
    write_file_atomically(kept / RECORD_FILE, found.as_json().encode(), fix=_KEPT_FIX)
    commits = _commits(found.repository) | {found.revision or "": found.commit}
    write_file_atomically(kept.parent / _COMMITS_FILE, json.dumps(commits, indent=1).encode(), fix=_KEPT_FIX)


def _records(repository: str) -> Path:
    return Path(constants.HF_HOME) / "pldr_train" / repository.replace("/", "--")


def _commits(repository: str) -> dict[str, str]:
    """Return the commits that revisions were when they were fetched last; of the default branch under ""."""
    try:
        values = read_json(_records(repository) / _COMMITS_FILE)
        return {str(name): str(commit) for name, commit in values.items() if _COMMIT.fullmatch(str(commit))}
    except (OSError, ValueError, AttributeError):
        return {}


def _compare(what: str, before: HubSource, found: HubSource, where: str) -> None:
    changed = [name for name, digest in found.files.items() if before.files.get(name, digest) != digest]
    if changed:
        raise DataError(
            f"{what}: commit {found.commit} has another {changed[0]} than before (SHA-256 "
            f"{found.files[changed[0]]}, it was {before.files[changed[0]]} by {where}). A commit never changes: do not "
            f"trust this copy; ask its authors, or remove {where} to take the new one"
        )
