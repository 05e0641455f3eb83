"""PLDR-LLM on transformers: configuration, models and the published checkpoint layout."""

from .cache import PldrllmDynamicCache, PldrllmStaticCache, cached_curvature
from .configuration_pldrllm import PldrllmConfig
from .modeling_pldrllm import PldrllmForCausalLM, PldrllmModel, PldrllmPreTrainedModel
from .outputs import PldrAttention, PldrllmCausalLMOutput, PldrllmModelOutput
from .power_law_attention import DeductiveOutputs

__all__ = [
    "DeductiveOutputs",
    "PldrAttention",
    "PldrllmCausalLMOutput",
    "PldrllmConfig",
    "PldrllmDynamicCache",
    "PldrllmForCausalLM",
    "PldrllmModel",
    "PldrllmModelOutput",
    "PldrllmPreTrainedModel",
    "PldrllmStaticCache",
    "cached_curvature",
]
