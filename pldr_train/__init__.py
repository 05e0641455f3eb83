"""pldr_train: pretraining of PLDR-LLMs and the study of their DAG loss.

Importing the package registers PLDR-LLM with transformers' Auto classes, so that `AutoModelForCausalLM`,
`AutoTokenizer` and `pipeline` load it.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType

__version__ = "0.1.0"


class _RegisterWithTransformers:
    """A finder of modules: imports `pldr_train.model`, which registers the classes, right after transformers.

    The model needs torch and transformers, which take seconds to import. A program that uses neither, such as
    `pldr-train --help`, does not pay for them. The Auto classes take only classes that are imported.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the usual spec of transformers with a loader that registers afterwards; None for other modules."""
        if name != "transformers":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            self._register_after(spec.loader)
        return spec

    def _register_after(self, loader: Loader) -> None:
        execute = loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            sys.meta_path.remove(self)
            importlib.import_module("pldr_train.model")

        loader.exec_module = execute_and_register  # type: ignore[method-assign]


def __getattr__(name: str) -> ModuleType:
    """Import `pldr_train.model` when it is first used."""
    if name == "model":
        return importlib.import_module("pldr_train.model")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if "transformers" in sys.modules:
    importlib.import_module("pldr_train.model")
else:
    sys.meta_path.insert(0, _RegisterWithTransformers())
