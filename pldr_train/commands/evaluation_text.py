"""The text of `pldr-train evaluate`."""

from __future__ import annotations

from typing import Any

_SMALL_NAT = 0.01
"""Gaps below it are shown with an exponent."""


def evaluation_text(found: dict[str, Any]) -> str:
    """What an evaluation found, for people; ends with the verdict on the gap."""
    lines = [*_head(found), "", *_likelihoods(found), "", *_positions(found["gap"]["by_position"])]
    if found["order_parameter"] is not None:
        lines += ["", *_order_parameter(found["order_parameter"])]
        lines += ["", *_differences(found)]
    gap = found["gap"]
    lines += [
        "",
        f"gap      {_interval(gap)} nat/token, sequential - block, 95 % interval",
        f"verdict  {_verdict(found)}",
    ]
    return "\n".join(lines)


def _head(found: dict[str, Any]) -> list[str]:
    model, rows, source = found["model"], found["rows"], found["source"]
    step = "" if source["step"] is None else f", step {source['step']:,}"
    gram = "" if model["gram_chunk_size"] is None else f", causal Gram of chunks of {model['gram_chunk_size']} tokens"
    return [
        f"model    {source['path']}{step}: {model['parameters']:,} parameters, G {model['G']}{gram}",
        f"rows     {rows['rows']:,} of {rows['context_length']:,} tokens and the next; {source['rows_of']}",
    ]


def _likelihoods(found: dict[str, Any]) -> list[str]:
    every = found["block_all_tokens"]
    rows = (
        ("block, all tokens", every["tokens"], every),
        ("block, sampled", found["gap"]["targets"], found["block"]),
        ("sequential, sampled", found["gap"]["targets"], found["sequential"]),
    )
    lines = [f"{'':<20} {'targets':>9} {'NLL':>10} {'perplexity':>12} {'accuracy':>9}"]
    for name, targets, values in rows:
        lines.append(
            f"{name:<20} {targets:>9,} {values['nll']:>10.4f} {_number(values['perplexity'], '>12,.2f', 12)} "
            f"{values['accuracy']:>9.1%}"
        )
    return lines


def _positions(bins: list[dict[str, Any]]) -> list[str]:
    lines = [f"{'positions':<20} {'targets':>9} {'block':>10} {'sequential':>12} {'gap':>31}"]
    for each in bins:
        span = f"{each['first_position']:,} - {each['last_position']:,}"
        lines.append(
            f"{span:<20} {each['targets']:>9,} {each['block_nll']:>10.4f} {each['sequential_nll']:>12.4f} "
            f"{_interval(each):>31}"
        )
    return lines


def _order_parameter(found: dict[str, Any]) -> list[str]:
    lines = [
        f"order parameter of {found['prompts']} prompts, {found['new_tokens']} new tokens each",
        f"{'':<8} {'RMSE12/|mean|':>14} {'RMSE1C/|mean|':>14} {'bounded 12':>12} {'bounded 1C':>12}",
    ]
    for name, values in found["tensors"].items():
        pairs = [values[pair] for pair in ("x1_x2", "xc_x1")]
        source = " ".join(_number(each["relative_rmse"], ">14.3e", 14) for each in pairs)
        bounded = " ".join(_number(each["bounded"], ">12.3e", 12) for each in pairs)
        lines.append(f"{name:<8} {source} {bounded}")
    return lines


def _differences(found: dict[str, Any]) -> list[str]:
    cache, padding = found["g_cache"], found["padding"]
    lines = [f"{'logit difference':<24} {'largest':>10} {'mean':>10}"]
    for name, values in (("with and without cache", cache), ("alone and left-padded", padding)):
        largest, mean = (values[f"{each}_logit_difference"] for each in ("largest", "mean"))
        more = (
            f"   same choice in {values['same_choice']:.0%} of {values['steps']:,} steps" if values.get("steps") else ""
        )
        lines.append(f"{name:<24} {_number(largest, '>10.2e', 10)} {_number(mean, '>10.2e', 10)}{more}")
    return lines


def _verdict(found: dict[str, Any]) -> str:
    text: str = found["gap"]["verdict_text"]
    return f"{text} (causal by its making)" if found["model"]["is_causal"] else text


def _interval(gap: dict[str, Any]) -> str:
    values = [gap[name] for name in ("mean", "low", "high") if gap[name] is not None]
    mean, *ends = (f"{value:{'+.4f' if max(map(abs, values)) >= _SMALL_NAT else '+.1e'}}" for value in values)
    return f"{mean} ({', '.join(ends) or 'no interval'})"


def _number(value: float | None, form: str, width: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{form}}"
