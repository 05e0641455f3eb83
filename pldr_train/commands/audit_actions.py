"""The work of `pldr-train audit`: opens the model and its rows, measures, prints and writes."""

from __future__ import annotations

import argparse
import html
import json
from collections.abc import Iterator, Mapping
from typing import Any

from pldr_train.commands.audit import MARK
from pldr_train.commands.evaluate import STDOUT
from pldr_train.commands.evaluation import move_model, open_rows
from pldr_train.data.files import write_file_atomically
from pldr_train.models.auditing import MEASURES, AuditSettings, audit
from pldr_train.models.loading import find_checkpoint, load_model, suppress_ids_without_piece
from pldr_train.printing import log_to_terminal
from pldr_train.published import PUBLISHED_AUDITS, published_as
from pldr_train.recipe import Recipe
from pldr_train.training.quiet import quiet_libraries


def run_audit(options: argparse.Namespace, recipe: Recipe | None) -> None:
    """Measure, print a table, and write JSON and a page; `recipe`: whose validation rows to take."""
    quiet_libraries()
    log_to_terminal(stream="stderr")
    checkpoint = find_checkpoint(options.source)
    model = load_model(options.source) if checkpoint is None else checkpoint.load_model()
    options.context = min(options.context, int(model.config.max_position_embeddings))
    rows = open_rows(options, recipe, checkpoint, model)
    suppress_ids_without_piece(model, rows.pieces)
    device = move_model(model, options.device)
    settings = AuditSettings(
        prompts=options.rows,
        new_tokens=options.new_tokens,
        jacobian_rows=options.jacobian_rows,
        positions=options.positions,
        candidate_tokens=options.candidate_tokens,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    found = audit(model, rows.ids.to(device), settings)
    source = str(options.source)
    found["source"] = {
        "path": source,
        "step": None if checkpoint is None else checkpoint.step,
        "rows_of": rows.described,
        "device": str(device),
        "seed": options.seed,
        "parameters": sum(each.numel() for each in model.parameters()),
        "G": model.config.custom_G_type or "learned",
    }
    named = options.published or published_as(source)
    published = PUBLISHED_AUDITS.get(named or "", {})
    found["published"] = {"of": named if published else None, "values": dict(published)}
    text = json.dumps(found, indent=1) + "\n"
    if options.json == STDOUT:
        print(text, end="")
    else:
        print(audit_text(found))
        if options.json is not None:
            write_file_atomically(options.json, text.encode(), fix="name another file")
    if options.html is not None:
        write_file_atomically(options.html, audit_page(found).encode(), fix="name another file")


# -------------------------------------------------------------------------------------------------------------- shown


def audit_text(found: Mapping[str, Any]) -> str:
    """Return what an audit found, for people; ends with its judgements."""
    source, published = found["source"], found["published"]
    step = "" if source["step"] is None else f", step {source['step']:,}"
    lines = [
        f"model    {source['path']}{step}: {source['parameters']:,} parameters, G {source['G']}",
        f"texts    {found['prompts']} prompts of {_range(found['prompt_tokens'])} tokens; {source['rows_of']}",
        "",
        f"{'of layers, heads and prompts':<46} {'least':>10} {'median':>10} {'largest':>10}",
    ]
    for name, meaning in MEASURES.items():
        spread = found["spreads"][name]
        if spread is not None:
            lines.append(
                f"{meaning:<46} " + " ".join(f"{_number(spread[each]):>10}" for each in ("min", "median", "max"))
            )
            lines += _beside(published, name)
    lines += ["", *(line for name, text in _sentences(found) for line in (text, *_beside(published, name)))]
    return "\n".join(lines)


def _range(numbers: list[int]) -> str:
    least, most = min(numbers), max(numbers)
    return f"{least}" if least == most else f"{least} to {most}"


def _beside(published: Mapping[str, Any], name: str) -> list[str]:
    value = published["values"].get(name)
    return [] if value is None else [f"  published of {published['of']}: {value}"]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.4g}" if value == 0 or 1e-3 <= abs(value) < 1e6 else f"{value:.2e}"


def _sentences(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, sentence) of what is not a spread."""
    decoding, suffix, gap = found["decoding"], found["suffix"], found["gap"]
    candidates, row_map = found["candidates"], found["row_map"]
    if row_map is not None:
        verdict = "collapsed" if row_map["collapsed"] else "not collapsed"
        yield (
            "criterion",
            (
                f"row map    {verdict}: the smallest median Jacobian norm of a layer is "
                f"{_number(row_map['least_median'])}, the threshold {row_map['threshold']:g}"
            ),
        )
    if decoding["steps"]:
        yield (
            "decoding",
            (
                f"cache      over {decoding['steps']} greedy steps a recomputed G lies at most "
                f"{_number(decoding['g_moved'])} of its size from the cached one, logits at most "
                f"{_number(decoding['logits_moved'])}; {decoding['same_choice']:.0%} of the choices are the same, "
                f"{decoding['safe']:.0%} certain to be (least margin {_number(decoding['margin'])})"
            ),
        )
    yield (
        "suffix",
        (
            f"suffix     another second half moves G by at most {_number(suffix['g_moved'])} of its size, and logits "
            f"of the first half by at most {_number(suffix['logits_moved'])}"
        ),
    )
    if gap is not None:
        yield (
            "gap",
            (
                f"gap        sequential NLL {gap['sequential_nll']:.6f}, block {gap['block_nll']:.6f} nat/token; "
                f"mean difference {_number(gap['mean'])}, at most {_number(gap['largest'])} for one of "
                f"{gap['targets']:,} targets"
            ),
        )
    yield (
        "candidates",
        (
            f"candidate  scored in one pass over prompt and candidate, a token gains "
            f"{_number(candidates['mean_per_token'])} nat on average, at most "
            f"{_number(candidates['largest_per_token'])}"
        ),
    )


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #1b1f24 }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .75rem; text-align: right; border-bottom: 1px solid #d8dee4 }
th:first-child, td:first-child, caption { text-align: left }
caption { font-weight: 600 }
.wide { overflow-x: auto }
@media (prefers-color-scheme: dark) { body { background: #0d1117; color: #e6edf3 } th, td { border-color: #30363d } }
"""


def audit_page(found: Mapping[str, Any]) -> str:
    """Return what an audit found as an HTML page of its own: the table, the judgements, and every layer."""
    source = found["source"]
    title = html.escape(f"Audit of {source['path']}")
    parts = [
        f"<!doctype html><!-- {MARK} --><html lang=en><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width'>",
        f"<title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>",
        f"<p>{source['parameters']:,} parameters, G {html.escape(source['G'])}; {found['prompts']} prompts, "
        f"{html.escape(source['rows_of'])}.</p>",
        _html_table("Of layers, heads and prompts", ("", "least", "median", "largest", "published"), _rows(found)),
        *(f"<p>{html.escape(text)}</p>" for _, text in _sentences(found)),
        "<h2>Layers</h2>",
        *_layer_tables(found),
    ]
    return "\n".join(parts) + "\n"


def _rows(found: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for name, meaning in MEASURES.items():
        spread = found["spreads"][name]
        if spread is not None:
            numbers = (_number(spread[each]) for each in ("min", "median", "max"))
            yield (meaning, *numbers, found["published"]["values"].get(name, ""))


def _layer_tables(found: Mapping[str, Any]) -> Iterator[str]:
    for name, meaning in MEASURES.items():
        spread = found["spreads"][name]
        if spread is not None:
            rows = (
                (f"layer {index}", *(_number(each[key]) for key in ("min", "median", "max")))
                for index, each in enumerate(spread["layers"])
            )
            yield _html_table(meaning, ("", "least", "median", "largest"), rows)


def _html_table(caption: str, head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    cells = "".join(f"<th>{html.escape(each)}</th>" for each in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(each)}</td>" for each in row) + "</tr>" for row in rows)
    return f"<div class=wide><table><caption>{html.escape(caption)}</caption><tr>{cells}</tr>{body}</table></div>"
