"""Text samples of a model in training."""

from __future__ import annotations

from typing import Any

import torch

from pldr_train.data.tokenizer.pieces import END_ID
from pldr_train.model import PldrllmForCausalLM
from pldr_train.recipe import SampleSection
from pldr_train.training.attention import uncompiled


@torch.no_grad()
def sample_texts(
    model: PldrllmForCausalLM,
    tokenizer: Any,
    settings: SampleSection,
    seed: int,
    together: bool = False,
) -> list[str]:
    """Continue each prompt; the run's random generators are left as they were.

    Args:
        model: any mode; put back as it was.
        tokenizer: a SentencePieceProcessor.
        settings: the prompts, not empty, and how each is continued; never beyond the model's context.
        seed: of the sampling.
        together: all processes sample the same, and make equally many passes, as sharded weights need.

    Returns:
        Prompt and continuation, one text a prompt.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    # A vocabulary larger than the tokenizer has ids that stand for no text.
    without_piece = list(range(tokenizer.get_piece_size(), model.config.vocab_size)) or None
    texts = []
    try:
        with uncompiled(model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            for prompt in settings.prompts:
                # A document begins after the END of the one before; rows never hold a START.
                ids = tokenizer.encode(prompt) or [END_ID]
                room = model.config.max_position_embeddings - len(ids)
                if room <= 0:
                    texts.append(prompt)
                    continue
                sampling = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
                options = sampling if settings.temperature > 0 else {"do_sample": False}
                try:
                    generated = model.generate(
                        torch.tensor([ids], device=device),
                        max_new_tokens=min(settings.max_new_tokens, room),
                        suppress_tokens=without_piece,
                        synced_gpus=together,
                        **options,
                    )
                except RuntimeError as error:
                    if "probability tensor" not in str(error):
                        raise
                    texts.append(prompt)  # the logits are not finite; that is reported with the loss
                    continue
                texts.append(tokenizer.decode(generated[0].tolist()))
    finally:
        model.train(was_training)
    return texts
