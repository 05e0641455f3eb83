"""List the files of a repository of the Hub that a (config, split) or a pattern names, at a commit."""

from __future__ import annotations

import json
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import PurePosixPath
from typing import Any, NamedTuple, TypeVar

from huggingface_hub import HfApi, RepoFile
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pldr_train.data.sources.hub_http import (
    HTTP_ERRORS,
    TransientError,
    endpoint,
    library_tries_once,
    refusal,
    refuse_offline,
    with_retries,
)
from pldr_train.data.sources.local_files import JSONL_SUFFIXES, PARQUET_SUFFIXES
from pldr_train.data.sources.manifest import Manifest, SourceFile
from pldr_train.errors import DataError, first_line
from pldr_train.recipe import DataSection

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

HUB_JSONL_SUFFIXES = (*JSONL_SUFFIXES, ".json")
"""JSON lines on the Hub are often called .json."""
_PATHS_AT_ONCE = 500
_SHOWN = 10
_TRY_AGAIN = "run the same command again"


class _DataSet(NamedTuple):
    """What the recipe names, and the commit that its revision means."""

    repository: str
    revision: str | None
    config: str | None
    split: str
    data_files: str | None
    commit: str = ""

    @property
    def place(self) -> str:
        return f"{self.repository} at {self.commit[:10]}"


def hub_manifest(data: DataSection) -> Manifest:
    """List the files of the data set on the Hub that a recipe names, at the commit that `data.revision` means now.

    Raises:
        DataError: the files do not exist, may not be read, are neither Parquet nor JSON lines, or cannot be reached.
    """
    refuse_offline()
    repository, revision, data_files = data.repository, data.revision, data.data_files
    data_set = _DataSet(repository, revision, data.config, data.split, data_files)
    api = HfApi(endpoint=endpoint())
    ask = partial(_ask, data_set, data.retries)
    info = ask(lambda: api.dataset_info(repository, revision=revision, expand=["sha"]))  # not its long list of files
    data_set = data_set._replace(commit=str(info.sha))
    resolved, names = ask(
        lambda: _of_data_files(data_set, data_files) if data_files is not None else _of_split(data_set)
    )
    _check_kinds(names, data_set)
    files: list[SourceFile] = []
    for first in range(0, len(names), _PATHS_AT_ONCE):
        files += ask(partial(_described, api, data_set, names[first : first + _PATHS_AT_ONCE]))
    size = sum(file.size_bytes for file in files)
    _log.info(f"{data_set.place}: {len(files):,} files, {size / 1e6:,.1f} MB")
    origin = {"kind": "hub", "repository": repository, "revision": revision, "commit": data_set.commit}
    origin |= {"config": resolved, "split": data.split} if data_files is None else {"data_files": data_files}
    return Manifest(origin, data.text_column, tuple(files), {"repository": repository, "revision": data_set.commit})


def _ask(data_set: _DataSet, retries: int, action: Callable[[], _T]) -> _T:
    """Call what makes the libraries send requests, each once, and explain what they raise."""

    def once() -> _T:
        with library_tries_once():
            return action()

    page = f"{endpoint()}/datasets/{data_set.repository}"
    key = f"data.repository={data_set.repository}"
    try:
        return with_retries(once, f"listing {data_set.repository}", page, retries, fix=_TRY_AGAIN)
    except GatedRepoError as error:
        raise DataError(
            f"{key}: a gated data set; accept its terms on {page}, then set HF_TOKEN to your token"
        ) from error
    except RepositoryNotFoundError as error:
        raise DataError(
            f"{key}: no such data set on {endpoint()}, or a private one; check the name, or set HF_TOKEN to a token "
            "that may read it"
        ) from error
    except HFValidationError as error:
        raise DataError(f"{key}: not the name of a data set ({error}); write owner/name") from error
    except RevisionNotFoundError as error:
        raise DataError(
            f"data.revision={data_set.revision}: no such revision of {data_set.repository}{_refs(data_set)}"
        ) from error
    except HTTP_ERRORS as error:
        raise refusal(error, key, page) from error
    except json.JSONDecodeError as error:
        raise DataError(f"{endpoint()}: what answers there is no Hugging Face Hub; check HF_ENDPOINT") from error


def _refs(data_set: _DataSet) -> str:
    """Return the revisions that there are, for a message, if they can be listed."""
    with suppress(*HTTP_ERRORS, TransientError), library_tries_once():
        refs = HfApi(endpoint=endpoint()).list_repo_refs(data_set.repository, repo_type="dataset")
        return f"; it has {_listed([ref.name for ref in (*refs.branches, *refs.tags)])}; or give a commit"
    return "; give a branch, a tag or a commit"


def _of_split(data_set: _DataSet) -> tuple[str, list[str]]:
    """Return the name of the config and the names of the split's files, as the datasets library resolves them."""
    import datasets  # noqa: PLC0415 - takes a second; only a start that lists files needs it

    try:
        # An empty cache: the library would use a copy of any commit that it finds there.
        with tempfile.TemporaryDirectory() as empty:
            builder = datasets.load_dataset_builder(
                data_set.repository, data_set.config, revision=data_set.commit, cache_dir=empty
            )
    except (*HTTP_ERRORS, TransientError, ConnectionError, HFValidationError):
        raise
    except Exception as error:  # of any kind, since a repository's files and README may hold anything
        raise _explained(data_set, error) from error
    splits: dict[str, Sequence[str]] = builder.config.data_files or {}
    if data_set.split not in splits:
        raise DataError(
            f"data.split={data_set.split}: no such split of {data_set.place}, config {builder.config.name}; it has "
            f"{_listed(list(splits))}"
        )
    return str(builder.config.name), _relative(splits[data_set.split], data_set)


def _explained(data_set: _DataSet, error: Exception) -> DataError:
    """Return the error for a repository that the datasets library cannot read."""
    import datasets  # noqa: PLC0415 - see above

    names: list[str] = []
    if isinstance(error, ValueError):
        with suppress(Exception):  # it only completes the message
            names = datasets.get_dataset_config_names(data_set.repository, revision=data_set.commit)
    if data_set.config is not None and names and data_set.config not in names:
        return DataError(f"data.config={data_set.config}: no such config of {data_set.place}; it has {_listed(names)}")
    if data_set.config is None and len(names) > 1:
        return DataError(f"data.config is not set, and {data_set.place} has several: set one of {_listed(names)}")
    return DataError(
        f"data.repository={data_set.repository}: its files cannot be listed ({first_line(error)}); set data.data_files "
        "to a pattern of its Parquet or JSON lines files, such as data/*.parquet"
    )


def _of_data_files(data_set: _DataSet, pattern: str) -> tuple[None, list[str]]:
    """Return the names of the files that a pattern matches, as the datasets library resolves it."""
    from datasets.data_files import resolve_pattern  # noqa: PLC0415 - see above

    if "://" in pattern or PurePosixPath(pattern).is_absolute():
        raise DataError(f"data.data_files={pattern}: must be a pattern of names within the repository")
    try:
        return None, _relative(resolve_pattern(pattern, _root(data_set)), data_set)
    except HTTP_ERRORS:
        raise
    except FileNotFoundError as error:
        raise DataError(f"data.data_files={pattern}: matches no file of {data_set.place}; check the pattern") from error


def _root(data_set: _DataSet) -> str:
    return f"hf://datasets/{data_set.repository}@{data_set.commit}"


def _relative(addresses: Sequence[str], data_set: _DataSet) -> list[str]:
    names = []
    for address in addresses:
        name = address.removeprefix(_root(data_set) + "/")
        if name == address or ".." in PurePosixPath(name).parts:
            raise DataError(f"data.repository={data_set.repository}: lists {address}, which is not a file of its own")
        names.append(name)
    return names


def _check_kinds(names: Sequence[str], data_set: _DataSet) -> None:
    for suffixes in (PARQUET_SUFFIXES, HUB_JSONL_SUFFIXES):
        if all(name.endswith(suffixes) for name in names):
            return
    kinds = Counter("".join(PurePosixPath(name).suffixes[-2:]) or "no suffix" for name in names)
    found = _listed([f"{number:,} of {kind}" for kind, number in kinds.most_common()])
    key = (
        f"data.data_files={data_set.data_files}" if data_set.data_files is not None else f"data.split={data_set.split}"
    )
    raise DataError(
        f"{key}: the files of {data_set.place} must all be {PARQUET_SUFFIXES[0]}, or all JSON lines "
        f"({', '.join(HUB_JSONL_SUFFIXES)}), but it has {found}; set data.data_files to a pattern of files of one kind"
    )


def _described(api: HfApi, data_set: _DataSet, names: list[str]) -> list[SourceFile]:
    """Return sizes and digests of some files, in the order of the names."""
    found: dict[str, Any] = {}
    for info in api.get_paths_info(data_set.repository, names, revision=data_set.commit, repo_type="dataset"):
        if isinstance(info, RepoFile):
            found[info.path] = info
    missing = [name for name in names if name not in found]
    if missing:
        raise DataError(
            f"data.repository={data_set.repository}: {missing[0]} was listed at {data_set.commit} but is not there"
        )
    digests = {name: None if found[name].lfs is None else found[name].lfs.sha256 for name in names}
    return [SourceFile(name, found[name].size, digest=digests[name]) for name in names]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) or "none") + more
