"""PLDR-LLM on transformers: configuration, models and the published checkpoint layout."""

from .configuration_pldrllm import PldrllmConfig
from .modeling_pldrllm import (
    PldrllmCausalLMOutput,
    PldrllmForCausalLM,
    PldrllmModel,
    PldrllmModelOutput,
    PldrllmPreTrainedModel,
)
from .power_law_attention import DeductiveOutputs

__all__ = [
    "DeductiveOutputs",
    "PldrllmCausalLMOutput",
    "PldrllmConfig",
    "PldrllmForCausalLM",
    "PldrllmModel",
    "PldrllmModelOutput",
    "PldrllmPreTrainedModel",
]
