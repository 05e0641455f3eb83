"""Names of the published checkpoints, and their translation to this package's names.

On disk a PLDR-LLM has the names of the author's code, so that published models load here and models saved here load
there. transformers applies these renames when it loads and, reversed, when it saves; `to_published` and
`from_published` do the same to plain state dicts.

Each rename is a pair of patterns with at most one group, the part of the key that stays. They are applied in order on
load, and in reverse order the other way round on save. A pattern is anchored at its start, for unanchored ones also
match inside longer names on saving, and has no closing `$`, for the reversed rename would write it into the key. The
decoder's prefix is optional, so that the same table serves the bare decoder and every model with a head.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

_LAYER_PARTS = (
    ("mha1.wq.", "attention.query."),
    ("mha1.wk.", "attention.key."),
    ("mha1.wv.", "attention.value."),
    ("mha1.dense.", "attention.output."),
    ("mha1.layernorm1.", "attention.metric_learner.gram_norm."),
    ("mha1.reslayerAs.", "attention.metric_learner.residual_units."),
    ("mha1.plgatt_layer.Wlst", "attention.power_law.metric_weight"),
    ("mha1.plgatt_layer.blst", "attention.power_law.metric_bias"),
    ("mha1.plgatt_layer.pwlst", "attention.power_law.power_exponent"),
    ("mha1.plgatt_layer.alst", "attention.power_law.coupling"),
    ("mha1.plgatt_layer.balst", "attention.power_law.coupling_bias"),
    ("ffn.", "feed_forward."),
    ("layernorm1.", "attention_norm."),
    ("layernorm2.", "feed_forward_norm."),
)
# Words deeper in a layer, renamed once the layer's own part has been.
_INNER_WORDS = (
    ("denseAs", "gated_units"),
    ("layernormA", "unit_norm"),
    ("gluw1", "gate"),
    ("gluw2", "up"),
    ("gluw3", "down"),
)

_DECODER = r"^(decoder\.|)"
_IN_LAYER = r"^(.*layers\.\d+\.)"
_DEEP_IN_LAYER = r"^(.*layers\.\d+\..*\.)"

RENAMES: tuple[tuple[str, str], ...] = (
    (r"^final_layer\.", r"^lm_head\."),
    (_DECODER + r"embedding\.", _DECODER + r"embed_tokens\."),
    (_DECODER + r"layernorm1\.", _DECODER + r"embed_norm\."),
    (_DECODER + r"past_G_values_status", _DECODER + r"predefined_is_set"),
    (_DECODER + r"past_G_values", _DECODER + r"predefined_outputs"),
    (_DECODER + r"dec_layers\.", _DECODER + r"layers\."),
    *((_IN_LAYER + re.escape(published), _IN_LAYER + re.escape(ours)) for published, ours in _LAYER_PARTS),
    *((_DEEP_IN_LAYER + published + r"\.", _DEEP_IN_LAYER + ours + r"\.") for published, ours in _INNER_WORDS),
)


def register_renames() -> None:
    """Tell transformers to load and save PLDR-LLMs with the published names (safe to call again)."""
    mapping = [WeightRenaming(published, ours) for published, ours in RENAMES]
    register_checkpoint_conversion_mapping("pldrllm", mapping, overwrite=True)


def from_published(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with this package's names, from one with the published names."""
    return {_rename(key, RENAMES): value for key, value in state_dict.items()}


def accept_published_names(module: nn.Module) -> None:
    """Let `load_state_dict` of a model take the published names as well as this package's, strictly.

    What loads saved files without transformers' `from_pretrained` (its `Trainer` on resuming, accelerate) passes the
    names as they are on disk.
    """
    module.register_load_state_dict_pre_hook(_rename_in_place)  # type: ignore[no-untyped-call]


def _rename_in_place(_: nn.Module, state_dict: dict[str, Any], prefix: str, *__: Any) -> None:
    for key in [key for key in state_dict if key.startswith(prefix)]:
        ours = prefix + _rename(key.removeprefix(prefix), RENAMES)
        # Beside the published names of a file, accelerate passes this package's with the values that the model has.
        if ours != key:
            state_dict[ours] = state_dict.pop(key)


def to_published(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with the published names, from one with this package's names."""
    reversed_renames = tuple((ours, published) for published, ours in reversed(RENAMES))
    return {_rename(key, reversed_renames): value for key, value in state_dict.items()}


def _rename(key: str, renames: tuple[tuple[str, str], ...]) -> str:
    for source, target in renames:
        replacement = re.sub(r"^\(.*?\)", lambda _: r"\1", target.removeprefix("^")).replace(r"\.", ".")
        key = re.sub(source, replacement, key, count=1)
    return key
