"""The recipe: everything that decides a training run.

`schema` has its sections and keys, `checks` what must hold between keys, `reading` files, overrides and resuming,
`yaml_text` YAML and the wording of errors, `explaining` what each key means, `old_keys` keys of earlier versions.
"""

from pldr_train.recipe.reading import (
    compare_for_resume,
    dump_recipe,
    load_recipe,
    may_change_on_resume,
    name_without_seed,
    recipe_from_dict,
    recipe_json_schema,
    recipe_to_dict,
    refused_resume,
    without_seed,
)
from pldr_train.recipe.schema import (
    FOLLOW_LENGTH,
    LEAST_TEMPERATURE,
    PATH_KEYS,
    CheckpointSection,
    DataSection,
    EarlyStopSection,
    JudgedSection,
    ModelSection,
    MonitorSection,
    OptimSection,
    Recipe,
    SampleSection,
    recipe_keys,
    strategy_in_force,
)

__all__ = [
    "FOLLOW_LENGTH", "LEAST_TEMPERATURE", "PATH_KEYS", "CheckpointSection", "DataSection", "EarlyStopSection",
    "JudgedSection", "ModelSection", "MonitorSection", "OptimSection", "Recipe", "SampleSection",
    "compare_for_resume", "dump_recipe", "load_recipe", "may_change_on_resume", "name_without_seed",
    "recipe_from_dict", "recipe_json_schema", "recipe_keys", "recipe_to_dict", "refused_resume", "strategy_in_force",
    "without_seed",
]  # fmt: skip
