"""What the PLDR-LLM classes return.

Shapes: B batch, S positions of this call, T positions attended to (cached ones included), D hidden size, V vocabulary,
H heads, d head width, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import ModelOutput

from .power_law_attention import DeductiveOutputs

PldrAttention = tuple[Tensor | None, ...]
"""The published tuple of one layer (`output_pldr_attentions=True`), in this order: A, A_LM, P, a, b_a, G_LM and the
attention weights. A, A_LM and G_LM are (B, H, d, d), with `gram_chunk_size` (B, N, H, d, d) over the N chunks that this
call ran through; the learned exponents P, couplings a and their biases b_a are (H, d, d); the weights are (B, H, S, T).
With a predefined G, A, A_LM and G_LM are the checkpoint's (1, H, d, d) and the learned parameters are `None`."""


@dataclass
class PldrllmModelOutput(ModelOutput):
    """What the decoder returns."""

    last_hidden_state: Tensor | None = None
    """(B, S, D), the output of the last layer; there is no norm after it."""
    past_key_values: Any = None
    """The cache of K, V and G, with `use_cache=True`."""
    hidden_states: tuple[Tensor, ...] | None = None
    """L + 1 of (B, S, D): the normalised embedding and each layer's output, with `output_hidden_states=True`."""
    attentions: tuple[Tensor, ...] | None = None
    """L of (B, H, S, T), softmax weights, with `output_attentions=True`."""
    pldr_attentions: tuple[PldrAttention, ...] | None = None
    """L of `PldrAttention`, with `output_pldr_attentions=True`."""
    deductive_outputs: tuple[DeductiveOutputs, ...] | None = None
    """L of `DeductiveOutputs`, with `output_deductive_outputs=True`: what the DAG loss takes."""


@dataclass
class PldrllmCausalLMOutput(ModelOutput):
    """What the language model returns; fields not described here are those of `PldrllmModelOutput`."""

    loss: Tensor | None = None
    """(), mean next-token cross-entropy, with labels; the sum times `loss_factor`, with targets."""
    logits: Tensor | None = None
    """(B, S, V), or the last `logits_to_keep` positions of it; none with targets."""
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    pldr_attentions: tuple[PldrAttention, ...] | None = None
    deductive_outputs: tuple[DeductiveOutputs, ...] | None = None
    cross_entropy_sum: Tensor | None = None
    """(), nats in fp32, over the scored targets and without a graph, with targets."""
    correct: Tensor | None = None
    """(), how many targets are the likeliest token, with targets."""


@dataclass
class PldrllmSequenceClassifierOutput(ModelOutput):
    """What sequence classification returns; fields not described here are those of `PldrllmModelOutput`."""

    loss: Tensor | None = None
    """(), with labels."""
    logits: Tensor | None = None
    """(B, num_labels), read at each sample's last token."""
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    pldr_attentions: tuple[PldrAttention, ...] | None = None
    deductive_outputs: tuple[DeductiveOutputs, ...] | None = None


@dataclass
class PldrllmTokenClassifierOutput(ModelOutput):
    """What token classification returns; fields not described here are those of `PldrllmModelOutput`."""

    loss: Tensor | None = None
    """(), with labels."""
    logits: Tensor | None = None
    """(B, S, num_labels)."""
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    pldr_attentions: tuple[PldrAttention, ...] | None = None
    deductive_outputs: tuple[DeductiveOutputs, ...] | None = None


@dataclass
class PldrllmQuestionAnsweringOutput(ModelOutput):
    """What extractive question answering returns; fields not described here are those of `PldrllmModelOutput`."""

    loss: Tensor | None = None
    """(), mean of the start's and the end's cross-entropy, with both positions given."""
    start_logits: Tensor | None = None
    """(B, S)."""
    end_logits: Tensor | None = None
    """(B, S)."""
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    pldr_attentions: tuple[PldrAttention, ...] | None = None
    deductive_outputs: tuple[DeductiveOutputs, ...] | None = None


__all__ = [
    "PldrAttention",
    "PldrllmCausalLMOutput",
    "PldrllmModelOutput",
    "PldrllmQuestionAnsweringOutput",
    "PldrllmSequenceClassifierOutput",
    "PldrllmTokenClassifierOutput",
]
