"""What every key of a recipe means, read off the schema, for `pldr-train explain` and docs/recipe-keys.md."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pldr_train.errors import RecipeError
from pldr_train.recipe import Recipe, may_change_on_resume, recipe_json_schema
from pldr_train.recipe.yaml_text import show, unknown_key_text

_TYPES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}
_MAY_CHANGE = " \\*"
_BOUNDS = (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))


@dataclass(frozen=True)
class Key:
    """One key of a recipe, in words."""

    name: str
    """section.key"""
    meaning: str
    values: str
    """Type, bounds and choices."""
    default: str
    may_change: bool
    """Whether a resumed run may have another value."""


def describe_keys() -> dict[str, tuple[str, list[Key]]]:
    """Return the meaning of each section and its keys, in the order of the schema."""
    schema = recipe_json_schema()
    sections: dict[str, tuple[str, list[Key]]] = {}
    for section, field in Recipe.model_fields.items():
        assert isinstance(field.annotation, type)
        definition = schema["$defs"][field.annotation.__name__]
        keys = list(_keys(section, definition, schema["$defs"], section))
        sections[section] = (" ".join(definition["description"].split()), keys)
    return sections


def _keys(prefix: str, definition: Mapping[str, Any], definitions: Mapping[str, Any], key: str) -> Iterator[Key]:
    """Yield the keys of a mapping; after a mapping in it, or a list of them, the keys of those."""
    required = definition.get("required", [])
    for name, properties in definition["properties"].items():
        dotted = f"{prefix}.{name}"
        yield Key(
            dotted,
            " ".join(properties["description"].split()),
            _values(properties),
            "required" if name in required else show(properties["default"]),
            may_change_on_resume(key if key != prefix else dotted),
        )
        for inner, mark in ((properties.get("items", {}), "[]"), *((each, "") for each in properties.get("anyOf", ()))):
            entry = inner.get("$ref", "").rpartition("/")[2]
            if entry:
                yield from _keys(f"{dotted}{mark}", definitions[entry], definitions, dotted)


def section_names() -> list[str]:
    """Return the names of a recipe's sections."""
    return list(Recipe.model_fields)


def explain(name: str | None = None) -> str:
    """Return what a key or a section means; without a name the list of all sections.

    Raises:
        RecipeError: there is no such key or section; the message has the nearest one.
    """
    sections = describe_keys()
    if name is None:
        width = max(map(len, sections))
        return "\n".join(f"{section:<{width}}  {meaning}" for section, (meaning, _) in sections.items())
    if name in sections:
        meaning, keys = sections[name]
        return "\n\n".join([f"{name}: {meaning}", *map(_text, keys)])
    found = [
        key
        for _, keys in sections.values()
        for key in keys
        if name in (key.name, key.name.partition(".")[2], key.name.partition("[].")[0])
    ]
    if found:
        return "\n\n".join(map(_text, found))
    raise RecipeError(f"{name}: {unknown_key_text(name, [key.name for _, keys in sections.values() for key in keys])}")


def keys_as_markdown() -> str:
    """Return the page docs/recipe-keys.md."""
    return "\n".join(_page()) + "\n"


def _page() -> Iterator[str]:
    yield "# Keys of a recipe"
    yield ""
    yield "Made from the schema by `pldr-train explain --markdown`. `pldr-train explain KEY` shows one key, and"
    yield "`pldr-train explain SECTION` a section. A key marked with \\* may differ when a run is resumed."
    for section, (meaning, keys) in describe_keys().items():
        yield f"\n## {section}\n\n{meaning}\n"
        yield "| key | meaning | values | default |"
        yield "|---|---|---|---|"
        for key in keys:
            name = f"`{key.name}`" + (_MAY_CHANGE if key.may_change else "")
            yield f"| {name} | {key.meaning} | {key.values} | `{key.default}` |"


def _text(key: Key) -> str:
    resume = "may differ when a run is resumed" if key.may_change else "stays as it is when a run is resumed"
    return "\n".join(
        [
            key.name,
            textwrap.fill(key.meaning, 100, initial_indent="  ", subsequent_indent="  "),
            f"  values   {key.values}",
            f"  default  {key.default}",
            f"  resume   {resume}",
        ]
    )


def _values(properties: Mapping[str, Any]) -> str:
    """Type, bounds and choices in words."""
    if "anyOf" in properties:
        return " or ".join("null" if each.get("type") == "null" else _values(each) for each in properties["anyOf"])
    if "$ref" in properties:
        return "mapping"
    if "enum" in properties or "const" in properties:
        return ", ".join(map(str, properties.get("enum") or [properties["const"]]))
    if properties["type"] == "array":
        if "prefixItems" in properties:
            return f"[{', '.join(map(_values, properties['prefixItems']))}]"
        return "list of " + ("mappings" if "$ref" in properties["items"] else _values(properties["items"]))
    bounds = [f"{sign} {properties[name]:,}" for name, sign in _BOUNDS if name in properties]
    return " ".join([_TYPES[properties["type"]], " and ".join(bounds)]).strip()
