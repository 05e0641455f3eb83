"""An exported model on its way to the Hugging Face Hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from pldr_train.data.sources.hub_http import endpoint
from pldr_train.errors import DataError
from pldr_train.models.hub import hub_errors
from pldr_train.models.loading import RunCheckpoint
from pldr_train.untrusted import read_text

_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_REFUSED = (401, 403)
_MOST_TEXT_BYTES = 2**28


def check_push(repository: str, public: bool) -> None:
    """Check that a model can be pushed, before the work of an export.

    Args:
        repository: OWNER/NAME; it need not exist.
        public: whether all may see it.

    Raises:
        DataError: there is no token, no network or no such owner's permission, or the repository is there and is not as
            visible as asked for.
    """
    if not _NAME.fullmatch(repository):
        raise DataError(f"--push {repository}: no name of a model; write OWNER/NAME")
    api = HfApi(endpoint=endpoint())
    with _push_errors(repository):
        api.whoami()
        try:
            is_private = bool(api.model_info(repository).private)
        except RepositoryNotFoundError:
            return
    if not (is_private or public):
        raise DataError(
            f"--push {repository}: is public, so that all would see this model; pass --public, or name another one"
        )
    if is_private and public:
        raise DataError(
            f"--push {repository}: is private, and --public was given; make it public on its page at {endpoint()}, or "
            "leave --public out"
        )


def push(folder: Path, checkpoint: RunCheckpoint, repository: str, public: bool) -> str:
    """Upload an exported folder as one commit; the repository is made if there is none. Returns the page's address.

    Raises:
        DataError: the Hub refuses, or a text file of the folder holds a path of this machine.
    """
    _check_no_paths(folder, checkpoint)
    api = HfApi(endpoint=endpoint())
    with _push_errors(repository):
        url = api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=f"Step {checkpoint.step:,} of run {checkpoint.recipe.run.name}",
            ignore_patterns=["__pycache__/*"],
        )
    return str(url)


@contextmanager
def _push_errors(repository: str) -> Iterator[None]:
    what = f"--push {repository}"
    with hub_errors(what):
        try:
            yield
        except HfHubHTTPError as error:
            response: Any = error.response
            if response.status_code not in _REFUSED or isinstance(error, RepositoryNotFoundError):
                raise
            raise DataError(
                f"{what}: HTTP {response.status_code}: the token may not write there; log in with `hf auth login`, or "
                f"set HF_TOKEN to a token with write access to {repository.partition('/')[0]}"
            ) from error


def _check_no_paths(folder: Path, checkpoint: RunCheckpoint) -> None:
    recipe = checkpoint.recipe
    named = (
        recipe.data.path,
        recipe.data.tokenizer,
        recipe.model.init_from,
        recipe.model.custom_G_path,
        recipe.run.dir,
    )
    places = {checkpoint.run, checkpoint.run.resolve(), folder.resolve(), *(Path(each) for each in named if each)}
    paths = [str(place) for place in places if place.is_absolute() and len(place.parts) > 2]
    for file in sorted(each for each in folder.iterdir() if each.suffix in (".json", ".md")):
        text = read_text(file, _MOST_TEXT_BYTES)
        found = next((path for path in paths if path in text), None)
        if found is not None:
            raise DataError(f"{file}: names {found}, a path of this machine; take it out before the folder is pushed")
