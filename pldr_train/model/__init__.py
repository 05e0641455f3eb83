"""PLDR-LLM on transformers; importing this registers its classes with transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)
from transformers.models.auto import tokenization_auto

from .cache import PldrllmDynamicCache, PldrllmStaticCache, cached_curvature
from .configuration_pldrllm import PldrllmConfig
from .modeling_heads import (
    PldrllmForQuestionAnswering,
    PldrllmForSequenceClassification,
    PldrllmForTokenClassification,
)
from .modeling_pldrllm import PldrllmForCausalLM, PldrllmModel, PldrllmPreTrainedModel
from .outputs import (
    PldrAttention,
    PldrllmCausalLMOutput,
    PldrllmModelOutput,
    PldrllmQuestionAnsweringOutput,
    PldrllmSequenceClassifierOutput,
    PldrllmTokenClassifierOutput,
)
from .power_law_attention import DeductiveOutputs
from .tokenization_pldrllm import PldrllmTokenizer
from .tokenization_pldrllm_fast import PldrllmTokenizerFast

AUTO_MODELS = {
    AutoModel: PldrllmModel,
    AutoModelForCausalLM: PldrllmForCausalLM,
    AutoModelForSequenceClassification: PldrllmForSequenceClassification,
    AutoModelForQuestionAnswering: PldrllmForQuestionAnswering,
    AutoModelForTokenClassification: PldrllmForTokenClassification,
}
"""The model that each Auto class makes."""

AutoConfig.register(PldrllmConfig.model_type, PldrllmConfig, exist_ok=True)
AutoTokenizer.register(
    PldrllmConfig, slow_tokenizer_class=PldrllmTokenizer, fast_tokenizer_class=PldrllmTokenizerFast, exist_ok=True
)
# The published folders name LlamaTokenizerFast, which cuts text otherwise than SentencePiece does. transformers keeps a
# list of architectures whose folders name a wrong class; it takes the registered class for them.
tokenization_auto.TOKENIZER_MAPPING_NAMES[PldrllmConfig.model_type] = PldrllmTokenizer.__name__
tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.add(PldrllmConfig.model_type)
for _auto_class, _model_class in AUTO_MODELS.items():
    _auto_class.register(PldrllmConfig, _model_class, exist_ok=True)

__all__ = [
    "AUTO_MODELS",
    "DeductiveOutputs",
    "PldrAttention",
    "PldrllmCausalLMOutput",
    "PldrllmConfig",
    "PldrllmDynamicCache",
    "PldrllmForCausalLM",
    "PldrllmForQuestionAnswering",
    "PldrllmForSequenceClassification",
    "PldrllmForTokenClassification",
    "PldrllmModel",
    "PldrllmModelOutput",
    "PldrllmPreTrainedModel",
    "PldrllmQuestionAnsweringOutput",
    "PldrllmSequenceClassifierOutput",
    "PldrllmStaticCache",
    "PldrllmTokenClassifierOutput",
    "PldrllmTokenizer",
    "PldrllmTokenizerFast",
    "cached_curvature",
]
