"""`pldr-train schema`: the JSON Schema of recipes."""

from __future__ import annotations

import argparse
import json

from pldr_train.recipe import recipe_json_schema


def build_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    return argparse.ArgumentParser(
        prog="pldr-train schema", description="Print the JSON Schema of recipes, for editors that check YAML."
    )


def run(_: argparse.Namespace) -> int:
    """Print the schema."""
    print(json.dumps(recipe_json_schema(), indent=1))
    return 0
