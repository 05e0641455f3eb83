"""Keys of earlier versions, and recipes that were saved before a key existed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pldr_train.recipe.yaml_text import Problem, show

if TYPE_CHECKING:
    from pldr_train.recipe.schema import TrainerSection

VALIDATION_BATCHES, VALIDATION_ROWS = "trainer.validation_batches", "trainer.validation_rows"
OLD_KEYS = (VALIDATION_BATCHES,)


def replace_old_keys(
    values: Mapping[str, Any], trainer_section: type[TrainerSection], overrides: Sequence[str] = ()
) -> tuple[dict[str, Any], list[Problem], list[str]]:
    """Return `values` with `trainer.validation_rows` in place of `trainer.validation_batches`.

    The old key counts micro-batches of the same values: without `trainer.micro_batch_size`, of one device's whole share
    of the batch.

    Args:
        values: nested plain values of a recipe.
        trainer_section: for the defaults of what `values` leave out.
        overrides: those that `values` hold already. An old key among them replaces the file's rows.

    Returns:
        The values; what is wrong with the old key; and a notice for the user for each key that was replaced.
    """
    trainer = values.get("trainer")
    if not isinstance(trainer, Mapping) or "validation_batches" not in trainer:
        return dict(values), [], []
    rest = {key: value for key, value in trainer.items() if key != "validation_batches"}
    batches = trainer["validation_batches"]
    shown = f"{VALIDATION_BATCHES}={show(batches)}"
    named = {override.partition("=")[0].strip() for override in overrides}
    if "validation_rows" in rest and (VALIDATION_BATCHES not in named or VALIDATION_ROWS in named):
        text = f"{shown}: replaced by {VALIDATION_ROWS}={show(rest['validation_rows'])}, which is set too; remove it"
        return {**values, "trainer": rest}, [Problem((VALIDATION_BATCHES,), text)], []
    if not _is_positive(batches):
        text = f"{shown}: must be a whole number of at least 1; better set {VALIDATION_ROWS}, which counts rows"
        return {**values, "trainer": rest}, [Problem((VALIDATION_BATCHES,), text)], []
    micro_batch_size = _micro_batch_size(rest, trainer_section)
    if micro_batch_size is None:  # what is wrong with the batch is said by itself
        return {**values, "trainer": rest}, [], []
    rows = batches * micro_batch_size
    notice = (
        f"{shown} counts micro-batches, here of {micro_batch_size} rows: read as {VALIDATION_ROWS}={rows}, which "
        "replaces it, so that a validation does not depend on the micro-batch"
    )
    return {**values, "trainer": rest | {"validation_rows": rows}}, [], [notice]


def _micro_batch_size(trainer: Mapping[str, Any], section: type[TrainerSection]) -> int | None:
    names = ("micro_batch_size", "batch_size", "devices", "num_nodes")
    given = {name: trainer.get(name, section.model_fields[name].default) for name in names}
    micro_batch_size = given.pop("micro_batch_size")
    if micro_batch_size is not None:
        return micro_batch_size if _is_positive(micro_batch_size) else None
    if not all(map(_is_positive, given.values())):
        return None
    return max(1, int(given["batch_size"]) // (int(given["devices"]) * int(given["num_nodes"])))


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
