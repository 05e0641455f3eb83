"""Fixtures shared by the tests: the golden figures (see goldens/README.md)."""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Tiny tensors: more threads only wait for each other, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Else torch.compile starts processes that compile, which import torch first.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# A shell starts what it leaves in the background with Ctrl-C ignored, nohup with SIGHUP; children would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

import pytest
from hypothesis import settings

from tests.messages import LOGGER, collected
from tests.processes import adopt_orphans, end_descendants

if TYPE_CHECKING:
    from torch import Tensor

# Until all tests are collected: imports leave next to no garbage, and looking for it takes a fifth of their time.
gc.disable()

# A slow machine is no failure.
settings.register_profile("project", deadline=None)
settings.load_profile("project")


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Leave addresses of memory out of tests' names: the workers of pytest-xdist must find the same names."""
    for mark in metafunc.definition.iter_markers("parametrize"):
        if mark.kwargs.get("ids") is str:
            mark.kwargs["ids"] = lambda value: re.sub(" at 0x[0-9a-f]+", "", str(value))


def pytest_configure(config: pytest.Config) -> None:
    """Keep the order of `pytest_collection_modifyitems`; pytest-xdist would begin with the files of most tests."""
    config.option.loadscopereorder = False


class _Backwards(pytest.Dir):
    """A folder whose tests are collected in the reverse order."""

    def collect(self) -> Iterator[pytest.Item | pytest.Collector]:
        return reversed(list(super().collect()))


def pytest_collect_directory(path: Path, parent: pytest.Collector) -> pytest.Dir | None:
    """Begin at the other end in every second process of pytest-xdist.

    What one has compiled, with its asserts rewritten, another one takes from the disk. Tests are sorted afterwards.
    """
    worker = getattr(parent.config, "workerinput", {"workerid": "gw0"})["workerid"]
    return _Backwards.from_parent(parent, path=path) if int(worker.removeprefix("gw")) % 2 else None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    """Begin with the files of most slow tests, then of most tests: the quick ones fill the processes' last minutes."""
    # pytest groups tests by their fixtures in the order that it finds them in, see `pytest_collect_directory`.
    items.sort(key=lambda item: str(item.path))
    yield
    tests, slow = Counter(item.path for item in items), Counter(each.path for each in items if is_slow(each))
    items.sort(key=lambda item: (-slow[item.path], -tests[item.path], str(item.path)))


def pytest_collection_finish() -> None:
    """Look for garbage from now on, but not in all that was imported."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """Let the interpreter take down what was imported, else libraries report it as leaked."""
    gc.unfreeze()


def is_slow(item: pytest.Item) -> bool:
    return item.get_closest_marker("slow") is not None


GOLDENS = Path(__file__).parent / "goldens"


@dataclass(frozen=True)
class Golden:
    """One golden run: its settings (JSON) and its tensors by name."""

    name: str
    settings: dict[str, Any]
    tensors: dict[str, Tensor]

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key].clone()

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors below a prefix, named without it; a group that does not exist is an error."""
        found = {k.removeprefix(prefix + "/"): v.clone() for k, v in self.tensors.items() if k.startswith(prefix + "/")}
        assert found, f"golden {self.name} has nothing below {prefix}"
        return found

    @property
    def dag_coefficients(self) -> tuple[float, float, float]:
        a_lm, a_p, g_lm = self.settings["dag_coefficients"]
        return a_lm, a_p, g_lm

    def sizes(self) -> dict[str, Any]:
        """The settings that size a model, without those of training."""
        training = {"dag_coefficients", "lr", "warmup_steps", "total_steps", "lr_alpha", "seed"}
        return {key: value for key, value in self.settings.items() if key not in training}


def load_golden(name: str) -> Golden:
    from safetensors.torch import load_file

    settings = json.loads((GOLDENS / f"{name}.json").read_text())
    return Golden(name, settings, load_file(GOLDENS / f"{name}.safetensors"))


@pytest.fixture(scope="session", params=["tiny", "wide"])
def golden(request: pytest.FixtureRequest) -> Golden:
    return load_golden(request.param)


@pytest.fixture(scope="session", autouse=True)
def _orphans_are_ours() -> None:
    adopt_orphans()


@pytest.fixture(scope="module", autouse=True)
def _no_process_outlives_its_module(_orphans_are_ours: None) -> Iterator[None]:
    """A failed test may leave processes that wait for ever, and these would disturb all that follows."""
    yield
    end_descendants()


@pytest.fixture(autouse=True)
def _messages_go_nowhere_afterwards() -> Iterator[None]:
    """A command leaves its handler behind, which would print the messages of later tests."""
    yield
    LOGGER.handlers.clear()
    LOGGER.setLevel(logging.NOTSET)


@pytest.fixture
def said() -> Iterator[list[str]]:
    """The messages of the package, from the lowest level that a terminal shows."""
    with collected() as messages:
        yield messages


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small corpus in `corpus` and its tokenizer in `tokenizer.model`."""
    from tests.tiny import write_corpus, write_tokenizer

    folder = tmp_path_factory.mktemp("tiny")
    write_tokenizer(folder / "tokenizer.model", write_corpus(folder / "corpus"))
    return folder
