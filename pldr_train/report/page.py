"""The page: one HTML file that needs nothing else, and lets nothing in its data run."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

_SCRIPTS = (
    "format.js", "curves.js", "chart.js", "tables.js", "samples.js", "health.js", "matrix.js", "rowmap.js",
    "heatmap.js", "page.js",
)  # fmt: skip
_STYLES = ("page.css", "heatmap.css")


def render_page(content: Mapping[str, Any], snapshots: Mapping[str, Any] | None = None) -> str:
    """The whole page with its data."""
    style = "\n".join(map(_packaged, _STYLES))
    script = "\n".join(map(_packaged, _SCRIPTS))
    connect = "'self'" if content["live"] else "'none'"
    # Only these two texts may act: whatever slipped into the page from a file would be refused by the browser.
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:; "
        f"connect-src {connect}; base-uri 'none'; form-action 'none'"
    )
    names = ", ".join(run["name"] for run in content["runs"][:3]) + (", ..." if len(content["runs"]) > 3 else "")
    parts = {
        "TITLE": html.escape(f"{names} - pldr_train report"),
        "POLICY": html.escape(policy, quote=True).replace("&#x27;", "'"),
        "STYLE": style,
        "DATA": data_text(content),
        "SNAPSHOTS": data_text(snapshots or {}),
        "SCRIPT": script,
    }
    page = []
    for number, piece in enumerate(_packaged("page.html").split("@@")):
        page.append(parts[piece] if number % 2 else piece)
    return "".join(page).encode("utf-8", errors="replace").decode("utf-8")


def data_text(content: Mapping[str, Any]) -> str:
    """JSON that can neither end the script element it stands in nor begin another."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _packaged(name: str) -> str:
    return resources.files("pldr_train.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
