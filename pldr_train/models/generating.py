"""Continuing prompts with a trained model: text as it comes, speed, and a summary of G."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from transformers import TextStreamer

from pldr_train.errors import DataError, first_line
from pldr_train.models.exporting import DTYPES
from pldr_train.models.extract_g import load_with_tokenizer


@dataclass(frozen=True)
class Settings:
    """How to continue a prompt; `temperature` 0 is greedy, `top_k` 0 is no limit."""

    max_new_tokens: int = 100
    temperature: float = 1.0
    top_p: float = 0.8
    top_k: int = 0
    num_beams: int = 1
    num_return_sequences: int = 1
    seed: int = 0
    use_cache: bool = True
    show_deductive: bool = False

    def options(self) -> dict[str, Any]:
        """Return the settings as `generate` takes them."""
        options: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "num_beams": self.num_beams,
            "num_return_sequences": self.num_return_sequences,
            "use_cache": self.use_cache,
            "do_sample": self.temperature > 0,
        }
        if self.temperature > 0:
            options |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return options


@dataclass(frozen=True)
class Continuation:
    """What came of a prompt."""

    texts: tuple[str, ...]
    """Prompt and continuation, one a returned sequence."""
    prompt_tokens: int
    new_tokens: int
    """Of all returned sequences together."""
    seconds: float
    deductive: str = ""

    def summary(self) -> str:
        """Return one line for people: tokens and tokens/s."""
        speed = self.new_tokens / self.seconds if self.seconds > 0 else float("inf")
        return (
            f"{self.prompt_tokens} prompt tokens, {self.new_tokens} new in {self.seconds:.2f} s, {speed:.1f} tokens/s"
        )


class Generator:
    """A loaded model and its tokenizer.

    Args:
        source: a run, a checkpoint, or a folder in transformers' format.
        device: auto (CUDA if there is one), or a torch device.
        dtype: fp32, bf16 or fp16.

    Raises:
        CheckpointError, DataError: no model or tokenizer there, they do not fit, or the device does not exist.
    """

    def __init__(self, source: Path, device: str = "auto", dtype: str = "fp32") -> None:
        model, self.tokenizer = load_with_tokenizer(source)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.model = model.to(device=device, dtype=DTYPES[dtype])
        except (RuntimeError, AssertionError) as error:
            raise DataError(f"--device {device}: {first_line(error)}; use cpu") from error

    @torch.no_grad()
    def continue_prompt(self, prompt: str, settings: Settings, stream: TextIO | None = None) -> Continuation:
        """Continue one prompt.

        Args:
            prompt: the text.
            settings: how.
            stream: written to as the tokens come, or at the end where there are several sequences.

        Raises:
            DataError: the prompt fills the model's context.
        """
        encoded = self.tokenizer([prompt], return_tensors="pt").to(self.model.device)
        if encoded["input_ids"].shape[1] == 0:
            # A document begins after the END of the one before; the model never saw a START.
            encoded = self.tokenizer([self.tokenizer.eos_token], return_tensors="pt").to(self.model.device)
        length, context = encoded["input_ids"].shape[1], self.model.config.max_position_embeddings
        if length >= context:
            raise DataError(
                f"the prompt has {length} tokens, and this model's context is {context}; shorten it to at most "
                f"{context - 1}"
            )
        one_by_one = stream is not None and settings.num_beams == settings.num_return_sequences == 1
        streamer = _StreamTo(self.tokenizer, stream) if one_by_one and stream is not None else None
        torch.manual_seed(settings.seed)
        start = time.perf_counter()
        generated = self.model.generate(**encoded, **settings.options(), streamer=streamer)
        if generated.is_cuda:
            torch.cuda.synchronize(generated.device)
        seconds = time.perf_counter() - start
        texts = tuple(self.tokenizer.batch_decode(generated, skip_special_tokens=True))
        if stream is not None and streamer is None:
            print("\n---\n".join(texts), file=stream, flush=True)
        deductive = self._summarise_g(encoded) if settings.show_deductive else ""
        # After its end a sequence of several is filled with padding.
        new = int((generated[:, length:] != self.model.config.pad_token_id).sum())
        return Continuation(texts, length, new, seconds, deductive)

    def _summarise_g(self, encoded: Any) -> str:
        outputs = self.model(**encoded, use_cache=False, logits_to_keep=1, output_deductive_outputs=True)
        return summarise_curvature([layer.curvature for layer in outputs.deductive_outputs])


def summarise_curvature(layers: list[Tensor]) -> str:
    """Return a table of G (B or 1, ..., H, d, d) of each layer: spread, extremes, log-determinant and distance from
    identity.

    The log-determinant is the mean over heads of log10 |det G|, the distance ||G - I|| / ||I|| in the Frobenius norm.
    """
    header = f"{'layer':>5} {'mean':>12} {'std':>12} {'min':>12} {'max':>12} {'log10|det|':>12} {'|G-I|/|I|':>12}"
    lines = ["G_LM of the prompt", header]
    for index, layer in enumerate(layers):
        curvature = layer.double()
        identity = torch.eye(curvature.shape[-1], dtype=curvature.dtype, device=curvature.device)
        log_determinant = torch.linalg.slogdet(curvature).logabsdet.mean() / torch.log(torch.tensor(10.0))
        distance = torch.linalg.matrix_norm(curvature - identity) / torch.linalg.matrix_norm(identity)
        values = (curvature.mean(), curvature.std(), curvature.min(), curvature.max(), log_determinant, distance.mean())
        lines.append(f"{index:>5} " + " ".join(f"{float(value):>12.4g}" for value in values))
    return "\n".join(lines)


class _StreamTo(TextStreamer):
    """Writes text to a stream as its tokens come."""

    def __init__(self, tokenizer: Any, stream: TextIO) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self._stream = stream

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write a piece of text, and a line's end after the last one."""
        print(text, end="\n" if stream_end else "", file=self._stream, flush=True)
