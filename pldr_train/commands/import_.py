"""`pldr-train import`: files of the original PLDR-LLM code as ours."""

from __future__ import annotations

import argparse
from pathlib import Path

from pldr_train.commands import EXIT_CODES
from pldr_train.commands.options import whole_number
from pldr_train.errors import DataError
from pldr_train.models import is_hub_name

_MOST_CONTEXT = 2**24


def build_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        prog="pldr-train import",
        description="Turn a checkpoint of the original PLDR-LLM code (.pth, or a folder of torch's distributed "
        "checkpoints) or a published model, in a folder or on the Hub, into a model folder of ours, or its .pkl with a "
        "predefined G into a safetensors file. Nothing in them is executed.",
        epilog=EXIT_CODES,
    )
    parser.add_argument(
        "source", metavar="SOURCE", type=Path,
        help="a .pth checkpoint, a folder of torch.distributed.checkpoint, a model folder with config.json, "
        "hub:OWNER/NAME[@REVISION], or a .pkl with a predefined G",
    )  # fmt: skip
    parser.add_argument("target", metavar="TARGET", type=Path, help="folder of the model, or the safetensors file of G")
    parser.add_argument("--tokenizer", metavar="FILE", type=Path, help="SentencePiece .model to put beside the model")
    parser.add_argument(
        "--g", metavar="FILE", type=Path, help="predefined G (.pkl or safetensors) of a .pth that does not hold it"
    )
    parser.add_argument(
        "--config", metavar="FILE", type=Path,
        help="config.json, or its folder, with what the weights do not say: context, rotary embedding, special ids",
    )  # fmt: skip
    parser.add_argument(
        "--context-length", type=whole_number(1, _MOST_CONTEXT), metavar="TOKENS", help="of the model (default 1024)"
    )
    parser.add_argument(
        "--rope", choices=("interleaved", "halves"),
        help="pairing of the rotary embedding (default interleaved, as in the original code)",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace a model or file that is there already")
    return parser


def run(options: argparse.Namespace) -> int:
    """Import, and say what was found."""
    # Imported here, and so is the rest: these take seconds, which --help and a mistake should not cost.
    fetched, source = None, options.source
    if is_hub_name(source):
        from pldr_train.models.hub import fetch_model  # noqa: PLC0415

        fetched = fetch_model(source)
        source = fetched.folder
    if not source.exists():
        raise DataError(
            f"{source}: no such file; name a .pth checkpoint, a model's folder, a .pkl with a predefined G, or "
            "hub:OWNER/NAME"
        )
    from pldr_train.models.importing import ImportOptions, import_curvature, import_model, is_model_checkpoint  # noqa: PLC0415
    from pldr_train.training.quiet import quiet_libraries  # noqa: PLC0415

    quiet_libraries()
    if not is_model_checkpoint(source):
        shape = import_curvature(source, options.target, options.overwrite)
        print(f"G           {shape}: layers, heads, head width, head width")
        print(f"file        {options.target}")
        print(f"use         model.custom_G_type=external model.custom_G_path={options.target}")
        return 0
    config = import_model(
        source,
        options.target,
        ImportOptions(
            context_length=options.context_length,
            reference_rope=None if options.rope is None else options.rope == "interleaved",
            config_file=options.config,
            tokenizer_file=options.tokenizer,
            curvature_file=options.g,
            overwrite=options.overwrite,
            origin=None if fetched is None else fetched.source,
        ),
    )
    if fetched is not None:
        print(f"source      hub:{fetched.source.repository} at commit {fetched.source.commit}")
    sizes = f"{config.num_hidden_layers} layers x {config.num_attention_heads} heads x {config.head_dim}"
    print(f"model       {sizes}, vocabulary {config.vocab_size:,}, G {config.custom_G_type or 'learned'}")
    print(f"folder      {options.target}")
    if not (options.target / "tokenizer.model").is_file():
        print("tokenizer   none; give one with --tokenizer FILE")
    return 0
