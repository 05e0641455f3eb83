"""PLDR-LLM with heads for classification of sequences and tokens and for extractive question answering."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import can_return_tuple

from .configuration_pldrllm import PldrllmConfig
from .modeling_pldrllm import PldrllmModel, PldrllmPreTrainedModel
from .outputs import (
    PldrllmModelOutput,
    PldrllmQuestionAnsweringOutput,
    PldrllmSequenceClassifierOutput,
    PldrllmTokenClassifierOutput,
)


class _PldrllmWithHead(PldrllmPreTrainedModel):
    """The decoder under a small head."""

    def __init__(self, config: PldrllmConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.decoder = PldrllmModel(config)

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.decoder.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding."""
        self.decoder.embed_tokens = value

    def _decode(self, **inputs: Any) -> Any:
        # By name even with config.return_dict=False, which the decoder would follow too.
        return self.decoder(**inputs, return_dict=True)


class PldrllmForSequenceClassification(_PldrllmWithHead):
    """Classifies a sequence from the decoder's output at its last token.

    `config.problem_type` chooses the loss as everywhere in transformers: regression, single_label_classification or
    multi_label_classification; unset, it follows from `num_labels` and the labels' type.
    """

    def __init__(self, config: PldrllmConfig) -> None:
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> PldrllmSequenceClassifierOutput:
        """Scores (B, num_labels), and the loss if `labels` (B,) or (B, num_labels) are given.

        `attention_mask` marks the padding, on either side; without one (and without a cache) `config.pad_token_id` in
        `input_ids` does. The other arguments are those of `PldrllmModel.forward`. `num_items_in_batch`, as `Trainer`
        passes it, makes every kind of loss a part of the mean over that many labels.

        Raises:
            ValueError: several sequences, and nothing marks where each one ends.
        """
        is_token = self._tokens(input_ids, inputs_embeds, attention_mask)
        if attention_mask is None and past_key_values is None:
            # Unlike a causal attention alone, a learned G would take in padding that follows the last token.
            attention_mask = is_token.long()
        outputs = self._decode(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        rows, columns = (torch.arange(size, device=hidden_states.device) for size in hidden_states.shape[:2])
        last = (is_token.to(hidden_states.device) * columns).argmax(-1)
        logits = self.score(hidden_states[rows, last])
        loss = None if labels is None else self._loss(logits, labels, **kwargs)
        return PldrllmSequenceClassifierOutput(loss=loss, logits=logits, **_passed_on(outputs))

    def _loss(self, logits: Tensor, labels: Tensor, num_items_in_batch: Any = None, **kwargs: Any) -> Tensor:
        loss: Tensor = self.loss_function(
            labels=labels,
            pooled_logits=logits,
            config=self.config,
            num_items_in_batch=num_items_in_batch,
            **kwargs,
        )
        if num_items_in_batch is None or self.config.problem_type == "single_label_classification":
            return loss
        # transformers' other losses leave the number out: they are means over this micro-batch.
        items = torch.as_tensor(num_items_in_batch, device=loss.device)
        scaled: Tensor = loss * (labels.numel() / items)
        return scaled

    def _tokens(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, attention_mask: Tensor | None) -> Tensor:
        """(B, S), which positions of this call hold tokens."""
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None:
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        batch, length = given.shape[:2]
        pad = self.config.pad_token_id
        if attention_mask is not None and attention_mask.dim() == 2:
            return attention_mask[:, -length:].ne(0)
        if input_ids is not None and pad is not None:
            return input_ids.ne(pad)
        if batch == 1:
            return torch.ones(1, length, dtype=torch.bool, device=given.device)
        raise ValueError(
            f"a batch of {batch} sequences needs an attention_mask (batch, positions), or input_ids and "
            "config.pad_token_id, to tell where each one ends"
        )


class PldrllmForTokenClassification(_PldrllmWithHead):
    """Classifies every token from the decoder's output at it."""

    def __init__(self, config: PldrllmConfig) -> None:
        super().__init__(config)
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", None) or 0.0)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> PldrllmTokenClassifierOutput:
        """Scores (B, S, num_labels), and the mean cross-entropy if `labels` (B, S, -100 ignored) are given.

        The other arguments are those of `PldrllmModel.forward`.
        """
        outputs = self._decode(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None if labels is None else self.loss_function(logits, labels, self.config, **kwargs)
        return PldrllmTokenClassifierOutput(loss=loss, logits=logits, **_passed_on(outputs))


class PldrllmForQuestionAnswering(_PldrllmWithHead):
    """Marks the start and the end of the answer in a text."""

    def __init__(self, config: PldrllmConfig) -> None:
        super().__init__(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> PldrllmQuestionAnsweringOutput:
        """Scores (B, S) of each position as start and as end, and the loss if both positions (B,) are given.

        Positions beyond the sequence are ignored. The other arguments are those of `PldrllmModel.forward`.
        """
        outputs = self._decode(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions, **kwargs)
        return PldrllmQuestionAnsweringOutput(
            loss=loss, start_logits=start_logits, end_logits=end_logits, **_passed_on(outputs)
        )


def _passed_on(outputs: PldrllmModelOutput) -> dict[str, Any]:
    return {
        "past_key_values": outputs.past_key_values,
        "hidden_states": outputs.hidden_states,
        "attentions": outputs.attentions,
        "pldr_attentions": outputs.pldr_attentions,
        "deductive_outputs": outputs.deductive_outputs,
    }


__all__ = ["PldrllmForQuestionAnswering", "PldrllmForSequenceClassification", "PldrllmForTokenClassification"]
