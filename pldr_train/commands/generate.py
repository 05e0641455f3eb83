"""`pldr-train generate`: continue prompts, from the command line or one after another."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pldr_train.commands import EXIT_CODES, importing_much
from pldr_train.commands.evaluate import MODEL_HELP, fetch_models
from pldr_train.commands.options import (
    device,
    natural,
    positive_int,
    readable_text,
    seed,
    share,
    temperature,
    whole_number,
)
from pldr_train.errors import DataError

if TYPE_CHECKING:
    from pldr_train.models.generating import Generator, Settings

_MOST_SEQUENCES = 1024


def build_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        prog="pldr-train generate",
        description="Continue prompts with a trained model, K, V and G cached. Without a prompt, each line typed (or "
        "piped in) is continued by itself, until an empty line or the end.",
        epilog=EXIT_CODES,
    )
    parser.add_argument("source", metavar="MODEL", type=Path, help=MODEL_HELP)
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", type=readable_text, help="texts to continue")
    parser.add_argument(
        "--max-new-tokens", type=positive_int, default=100, metavar="N", help="at most so many (default 100)"
    )
    parser.add_argument("--temperature", type=temperature, default=1.0, help="0 is greedy (default 1)")
    parser.add_argument(
        "--top-p", type=share, default=0.8, help="share of the probability to sample from (default 0.8)"
    )
    parser.add_argument("--top-k", type=natural, default=0, help="likeliest tokens to sample from; 0: all (default)")
    parser.add_argument(
        "--num-beams",
        type=whole_number(1, _MOST_SEQUENCES),
        default=1,
        help="beam search over so many (default 1: none)",
    )
    parser.add_argument(
        "--num-return-sequences",
        type=whole_number(1, _MOST_SEQUENCES),
        default=1,
        metavar="N",
        help="continuations of each prompt",
    )
    parser.add_argument("--seed", type=seed, default=0, help="of the sampling (default 0)")
    parser.add_argument("--device", type=device, default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="to compute in (default fp32)"
    )
    parser.add_argument("--no-cache", action="store_true", help="recompute everything, and learn G anew, at each token")
    parser.add_argument("--show-deductive", action="store_true", help="summarise G of each layer for the prompt")
    return parser


def run(options: argparse.Namespace) -> int:
    """Generate, and say how fast."""
    if options.num_return_sequences > 1 and options.num_beams == 1 and options.temperature == 0:
        raise DataError(
            f"--num-return-sequences {options.num_return_sequences} with --temperature 0: greedy decoding has one "
            "continuation; raise the temperature or --num-beams"
        )
    if options.num_return_sequences > options.num_beams > 1:
        raise DataError(
            f"--num-return-sequences {options.num_return_sequences} with --num-beams {options.num_beams}: beam search "
            "returns at most its beams; raise --num-beams, or ask for fewer sequences"
        )
    fetch_models(options)
    # Imported here: torch takes seconds, which --help and a mistake in the command should not cost.
    with importing_much():
        from pldr_train.models.generating import Generator, Settings  # noqa: PLC0415

    generator = Generator(options.source, options.device, options.dtype)
    settings = Settings(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        num_beams=options.num_beams,
        num_return_sequences=options.num_return_sequences,
        seed=options.seed,
        use_cache=not options.no_cache,
        show_deductive=options.show_deductive,
    )
    if options.prompts:
        for prompt in options.prompts:
            _continue(generator, prompt, settings)
        return 0
    _read_prompts(generator, settings)
    return 0


def _continue(generator: Generator, prompt: str, settings: Settings) -> None:
    result = generator.continue_prompt(prompt, settings, stream=sys.stdout)
    print(f"[{result.summary()}]", file=sys.stderr)
    if result.deductive:
        print(result.deductive, file=sys.stderr)


def _read_prompts(generator: Generator, settings: Settings) -> None:
    """Continue each line; a line is a prompt by itself, nothing of the earlier ones is kept."""
    interactive = sys.stdin.isatty()
    if interactive:
        print("Type a prompt; an empty line ends.", file=sys.stderr)
    while True:
        if interactive:
            print("> ", end="", file=sys.stderr, flush=True)
        line = _next_line()
        prompt = line.rstrip("\n")
        if not line or (interactive and not prompt):
            return
        if not prompt:
            continue
        try:
            _continue(generator, prompt, settings)
        except DataError as error:
            if not interactive:
                raise
            print(f"error: {error}", file=sys.stderr)


def _next_line() -> str:
    """Return the next line of standard input; empty at its end. Raises DataError."""
    try:
        return readable_text(sys.stdin.readline())
    except (UnicodeDecodeError, argparse.ArgumentTypeError) as error:
        raise DataError(
            f"standard input: no text in {sys.stdin.encoding} ({error}); convert it, for instance with "
            "`iconv -f latin1 -t utf-8`"
        ) from None
