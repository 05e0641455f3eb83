"""What generation with a learned G needs beyond transformers' `GenerationMixin`."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import GenerationMixin
from transformers.utils import logging

logger = logging.get_logger(__name__)


class PldrllmGenerationMixin(GenerationMixin):
    """Generation that keeps G a function of the prompt alone, and stays within the context."""

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Return the inputs of one pass; arguments as in transformers, which looks for `inputs_embeds` among their
        names.

        With a static cache transformers hands the model a prepared 4D mask, which does not show padding. Where
        the Gram is still to be taken, the mask of the tokens goes along.
        """
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        prepared, tokens = inputs.get("attention_mask"), kwargs.get("attention_mask")
        if self.config.custom_G_type is None and prepared is not tokens and tokens is not None:
            cache = inputs.get("past_key_values")
            empty = cache is None or int(cache.get_seq_length()) == 0
            # Not in other passes: it grows by a token each time, for which compiled code would be compiled again.
            if empty or self.config.gram_chunk_size is not None:
                inputs["token_mask"] = tokens
        return inputs

    def _prepare_generated_length(self, generation_config: Any, **kwargs: Any) -> Any:
        """Refuse a prompt that fills the context, and end generation where the context ends."""
        config = super()._prepare_generated_length(generation_config, **kwargs)
        context, prompt = self.config.max_position_embeddings, kwargs["inputs_tensor"].shape[1]
        if prompt >= context:
            raise ValueError(
                f"the prompt has {prompt} tokens, which leaves no room in this model's context of "
                f"max_position_embeddings={context}; shorten it to at most {context - 1}"
            )
        # With inputs_embeds and no ids, max_length counts the new tokens alone.
        limit = context - (prompt - kwargs["input_ids_length"])
        if config.max_length > limit:
            logger.warning_once(
                f"generation ends at this model's context of {context} tokens: {context - prompt} new ones after a "
                f"prompt of {prompt}"
            )
            config.max_length = limit
        return config

    def _prefill(self, input_ids: Tensor, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the first pass over the prompt."""
        if generation_config.prefill_chunk_size is not None and self._learns_g_of_prompt():
            raise ValueError(
                f"prefill_chunk_size={generation_config.prefill_chunk_size}: this model learns G from the whole "
                "prompt, which one pass must see; set prefill_chunk_size=None"
            )
        return super()._prefill(input_ids, generation_config, *args, **kwargs)

    def _assisted_decoding(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """Assisted generation whose G is the prompt's.

        Its first pass runs over the prompt and the assistant's proposals, which must not enter G. So a pass over the
        prompt alone comes first, of which the cache keeps only G.
        """
        cache = kwargs.get("past_key_values")
        if cache is not None and self._learns_g_of_prompt() and int(cache.get_seq_length()) == 0:
            model_kwargs = {name: kwargs[name] for name in _MODEL_INPUTS if kwargs.get(name) is not None}
            inputs = self.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **model_kwargs)
            self(**inputs, logits_to_keep=1)
            held = [layer.deductive for layer in cache.layers]
            cache.crop(-cache.get_seq_length())
            for layer, deductive in zip(cache.layers, held, strict=True):
                layer.hold(deductive)
        return super()._assisted_decoding(input_ids, **kwargs)

    def _learns_g_of_prompt(self) -> bool:
        return self.config.custom_G_type is None and self.config.gram_chunk_size is None


_MODEL_INPUTS = ("attention_mask", "position_ids", "inputs_embeds", "past_key_values", "use_cache", "cache_first_G")
