"""The page of a sweep, in the style of the run report: one HTML file that needs nothing else."""

from __future__ import annotations

import time
from typing import Any

from pldr_train import __version__
from pldr_train.report.page import assemble_page
from pldr_train.sweeps.summary import Summary

_SCRIPTS, _STYLES = ("format.js", "sweep.js"), ("page.css", "sweep.css")


def render_sweep(summary: Summary, live: bool = False, tag: str = "") -> str:
    """Return the whole page with its data.

    Args:
        summary: of the sweep.
        live: whether the page is to load itself again when the tag at /tag changes.
        tag: of this content.
    """
    content: dict[str, Any] = summary.as_plain()
    content |= {"version": __version__, "made_s": time.time(), "live": live, "tag": tag}
    title = f"{summary.spec.name} - pldr_train sweep"
    return assemble_page("sweep.html", title, _SCRIPTS, _STYLES, {"DATA": content}, connects=live)
