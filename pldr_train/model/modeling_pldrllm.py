"""PLDR-LLM on transformers: the decoder and its causal language model."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple, is_flash_attention_requested, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .cache import PldrllmDynamicCache, carry_curvature
from .casting import weights_cast_together
from .causal_gram import ChunkPlan, plan_chunks
from .configuration_pldrllm import PldrllmConfig
from .generation import PldrllmGenerationMixin
from .output_head import OutputHead, chunked_cross_entropy
from .outputs import PldrAttention, PldrllmCausalLMOutput, PldrllmModelOutput
from .power_law_attention import (
    DeductiveOutputs,
    GatedLinearUnit,
    PowerLaw,
    PowerLawAttention,
)
from .predefined import CURVATURE_SLOT, initial_predefined
from .published_layout import accept_published_names, register_renames
from .rotary import rotary_cos_sin

logger = logging.get_logger(__name__)


class PldrllmDecoderLayer(GradientCheckpointingLayer):
    """Power law graph attention and a gated feed-forward network, each with a residual and a LayerNorm after it."""

    def __init__(self, config: PldrllmConfig, layer_idx: int) -> None:
        super().__init__()
        self.attention = PowerLawAttention(config, layer_idx)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = GatedLinearUnit(config.hidden_size, config.intermediate_size, config.glu_bias)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self._compiled_forward: Callable[..., Any] | None = None

    def compile(self, *arguments: Any, **options: Any) -> None:
        """Compile the layer, but for the casts of its weights: compiled code would launch each of them by itself.

        The arguments are those of `torch.compile`.
        """
        self._compiled_forward = torch.compile(self._forward, *arguments, **options)

    def __getstate__(self) -> dict[str, Any]:
        """Leave compiled code out of copies, as torch does: it is of this layer."""
        state: dict[str, Any] = super().__getstate__()
        return state | {"_compiled_forward": None}

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor | None, ...]:
        """(B, S, D) -> (B, S, D), attention weights and the fields of the deductive outputs.

        See `PowerLawAttention.forward`. A flat tuple, because what wraps layers (re-entrant checkpointing, FSDP) sees
        no tensor inside a dataclass and would drop its gradient.
        """
        if torch.compiler.is_compiling():  # a whole model
            return self._forward(hidden_states, **kwargs)
        with weights_cast_together(self, hidden_states.device.type, compiled=self._compiled_forward is not None):
            outputs: tuple[Tensor | None, ...] = (self._compiled_forward or self._forward)(hidden_states, **kwargs)
            return outputs

    def _forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor | None, ...]:
        attended, weights, deductive = self.attention(hidden_states, **kwargs)
        hidden_states = self.attention_norm(attended + hidden_states)
        hidden_states = self.feed_forward_norm(self.feed_forward(hidden_states) + hidden_states)
        return hidden_states, weights, *deductive.tensors()


class PldrllmPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation shared by all PLDR-LLM classes."""

    config_class = PldrllmConfig
    base_model_prefix = "decoder"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PldrllmDecoderLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": PldrllmDecoderLayer,
        "attentions": OutputRecorder(PowerLawAttention, index=1),
    }

    def __init__(self, config: PldrllmConfig) -> None:
        super().__init__(config)
        accept_published_names(self)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as the papers do: Xavier for weights (value projection included), zero for biases.

        Called for every module on construction and, after loading, for whatever the checkpoint did not hold, so it
        must fill every parameter and buffer.
        """
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        elif isinstance(module, PowerLaw):
            for weight in (module.metric_weight, module.power_exponent, module.coupling):
                init.xavier_normal_(weight)
            init.zeros_(module.metric_bias)
            init.zeros_(module.coupling_bias)
        elif isinstance(module, PldrllmModel) and module.config.custom_G_type is not None:
            outputs, is_set = initial_predefined(module.config, module.predefined_outputs.device)
            init.copy_(module.predefined_outputs, outputs)
            init.copy_(module.predefined_is_set, is_set)


class PldrllmModel(PldrllmPreTrainedModel):
    """The decoder: embedding, LayerNorm and the layers; there is no final norm (layers are post-norm)."""

    def __init__(self, config: PldrllmConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(PldrllmDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        if config.custom_G_type is not None:
            shape = (config.num_hidden_layers, 3, 1, config.num_attention_heads, config.head_dim, config.head_dim)
            self.register_buffer("predefined_outputs", torch.zeros(shape))
            self.register_buffer("predefined_is_set", torch.zeros(config.num_hidden_layers, dtype=torch.bool))
        self.gradient_checkpointing = False
        self._predefined_is_finite = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding."""
        self.embed_tokens = value

    @property
    def predefined_curvature(self) -> Tensor:
        """The constant G of a model with `custom_G_type`, (L, H, d, d)."""
        buffer: Tensor = self.predefined_outputs
        return buffer[:, CURVATURE_SLOT, 0]

    @torch.no_grad()
    def set_predefined_curvature(self, curvature: Tensor) -> None:
        """Set the constant G of every layer (`custom_G_type="external"`).

        Args:
            curvature: (L, H, d, d), finite.

        Raises:
            ValueError: the model learns its G, or the shape or the values do not fit.
        """
        if self.config.custom_G_type is None:
            raise ValueError("this model learns G (custom_G_type=None); a predefined G cannot be set")
        expected = tuple(self.predefined_curvature.shape)
        if tuple(curvature.shape) != expected:
            raise ValueError(
                f"predefined G has shape {tuple(curvature.shape)}; this model needs "
                f"(num_hidden_layers, num_attention_heads, head_dim, head_dim) = {expected}"
            )
        if not bool(torch.isfinite(curvature).all()):
            raise ValueError("predefined G holds values that are not finite")
        self.predefined_curvature.copy_(curvature)
        self.predefined_is_set.fill_(True)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        token_mask: Tensor | None = None,
        output_pldr_attentions: bool | None = None,
        output_deductive_outputs: bool = False,
        cache_first_G: bool | None = None,
        **kwargs: Any,
    ) -> PldrllmModelOutput:
        """Run the decoder over a batch of sequences.

        Args:
            input_ids: (B, S) token ids, or instead `inputs_embeds` (B, S, D) as they come from the embedding.
            attention_mask: (B, T), 1 for tokens and 0 for padding, cached positions first; padding enters neither
                attention nor the Gram matrix, and positions count the tokens alone. Or a prepared 4D mask.
            position_ids: (B, S) positions for the rotary embedding. Without a cache and an `attention_mask`, those that
                do not go up by one begin another document, which attention keeps apart.
            past_key_values: a `Cache`, empty or returned by an earlier pass, which is extended in place. With learned G
                the first pass leaves its G there and the following passes use it; with `gram_chunk_size` they use the
                same G as without a cache.
            use_cache: make a cache if none is given, and return it.
            token_mask: (B, T) as `attention_mask`, beside a 4D one.
            output_pldr_attentions: return the published tuple of every layer (`PldrAttention`).
            output_deductive_outputs: return one `DeductiveOutputs` a layer.
            cache_first_G: let the pass that fills the cache leave the G of the batch's first sample alone there, for
                all samples; `None`: as the configuration says.
            kwargs: `output_attentions`, `output_hidden_states` and what the attention backend takes. Attention weights
                exist under every backend: asked for, they are written out.

        Raises:
            ValueError: neither or both kinds of input, ids beyond the vocabulary, more positions than the context, a
                mask that does not cover the cached positions, a cache that cannot hold G or was not filled by this
                model, or an external G that was never set.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        embedded = self._embed(input_ids) if inputs_embeds is None else inputs_embeds
        hidden_states = self.embed_norm(embedded * math.sqrt(self.config.hidden_size))

        if past_key_values is None and use_cache:
            past_key_values = PldrllmDynamicCache(self.config)
        if token_mask is None and attention_mask is not None and attention_mask.dim() == 2:
            token_mask = attention_mask
        past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
        self._check_length(embedded.shape[1], past_length, token_mask)
        if output_pldr_attentions is None:
            output_pldr_attentions = self.config.output_pldr_attentions
        write_out = output_pldr_attentions or kwargs.pop("output_attentions", self.config.output_attentions)
        # Of positions that it is given, the mask reads whether they are of several documents; the host waits for that.
        given_positions = position_ids
        if position_ids is None:
            position_ids = _positions(embedded, past_length, token_mask)
        cache_first_G = self.config.cache_first_G if cache_first_G is None else cache_first_G
        if cache_first_G and self.config.gram_chunk_size is not None:
            raise ValueError(
                f"cache_first_G=True contradicts gram_chunk_size={self.config.gram_chunk_size}: with a causal Gram "
                "every sample needs its own G; leave it out"
            )
        by_flash = not write_out and is_flash_attention_requested(self.config)
        if by_flash and given_positions is not None and attention_mask is None and past_key_values is None:
            kwargs = _document_bounds(given_positions.expand(len(embedded), -1)) | kwargs
            given_positions = None  # which make no mask there
        causal_mask = create_causal_mask(
            config=_written_out(self.config) if write_out else self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=given_positions,
        )
        rotary = rotary_cos_sin(position_ids, self.config.head_dim, self.config.rope_theta, self.config.reference_rope)
        if past_key_values is not None and self.config.custom_G_type is None:
            carry_curvature(past_key_values, len(self.layers))
        chunk_plan = self._chunk_plan(embedded, past_length, token_mask, past_key_values)
        if token_mask is not None:
            token_mask = token_mask[:, -embedded.shape[1] :]

        deductive: list[DeductiveOutputs] = []
        attentions: list[Tensor | None] = []
        for layer, curvature in zip(self.layers, self._predefined_by_layer(), strict=True):
            hidden_states, weights, *outputs = layer(
                hidden_states,
                rotary=rotary,
                attention_mask=causal_mask,
                token_mask=token_mask,
                chunk_plan=chunk_plan,
                predefined_curvature=curvature,
                past_key_values=past_key_values,
                write_out_weights=bool(write_out),
                cache_first_G=cache_first_G,
                **kwargs,
            )
            deductive.append(DeductiveOutputs(*outputs))
            attentions.append(weights)
        return PldrllmModelOutput(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values if use_cache else None,
            pldr_attentions=self._pldr_attentions(deductive, attentions) if output_pldr_attentions else None,
            deductive_outputs=tuple(deductive) if output_deductive_outputs else None,
        )

    def _embed(self, input_ids: Tensor | None) -> Tensor:
        try:
            embedded: Tensor = self.embed_tokens(input_ids)
        except IndexError as error:
            # The CPU's own message names neither; a GPU would not say anything that can be caught.
            assert input_ids is not None
            raise ValueError(
                f"input_ids hold {int(input_ids.max())} (and {int(input_ids.min())}), but this model's vocabulary has "
                f"{self.embed_tokens.num_embeddings} tokens; use the tokenizer that the model was trained with"
            ) from error
        return embedded

    def _check_length(self, length: int, past_length: int | Tensor, token_mask: Tensor | None) -> None:
        if not isinstance(past_length, int):
            return  # a static cache knows its length on the device only
        context = self.config.max_position_embeddings
        if past_length + length > context:
            cached = f" after {past_length} cached ones" if past_length else ""
            raise ValueError(
                f"{length} positions{cached} are more than this model's context of max_position_embeddings={context}; "
                "shorten the input"
            )
        if token_mask is not None and token_mask.shape[1] != past_length + length:
            raise ValueError(
                f"attention_mask covers {token_mask.shape[1]} positions; it must cover the {past_length} cached ones "
                f"and the {length} new ones"
            )

    def _chunk_plan(
        self, embedded: Tensor, past_length: int | Tensor, token_mask: Tensor | None, cache: Any
    ) -> ChunkPlan | None:
        if self.config.gram_chunk_size is None:
            return None
        holder = None if cache is None else cache.layers[0]
        return plan_chunks(
            self.config.gram_chunk_size,
            batch=embedded.shape[0],
            new_length=embedded.shape[1],
            past_length=past_length,
            token_mask=token_mask,
            capacity=None if holder is None else holder.capacity,
            held_chunk=holder.chunk if holder is not None and holder.holds_curvature else None,
            device=embedded.device,
        )

    def _pldr_attentions(
        self, deductive: list[DeductiveOutputs], attentions: list[Tensor | None]
    ) -> tuple[PldrAttention, ...]:
        """Return the published tuples, see `PldrAttention`."""
        published: list[PldrAttention] = []
        learned: tuple[Tensor | None, ...]
        for index, (outputs, weights) in enumerate(zip(deductive, attentions, strict=True)):
            if self.config.custom_G_type is None:
                power: Any = self.layers[index].attention.power_law  # type: ignore[union-attr]
                learned = (power.power_exponent, power.coupling, power.coupling_bias)
                published.append((outputs.metric, outputs.positive_metric, *learned, outputs.curvature, weights))
            else:
                metric, positive_metric, curvature = self.predefined_outputs[index]
                published.append((metric, positive_metric, None, None, None, curvature, weights))
        return tuple(published)

    def _predefined_by_layer(self) -> list[Tensor | None]:
        if self.config.custom_G_type is None:
            return [None] * len(self.layers)
        self.check_predefined_once()
        return list(self.predefined_curvature.unbind(0))

    def check_predefined_once(self) -> None:
        """Refuse a predefined G that was never set: fused attention kernels may swallow its NaN and run on.

        Only the first call looks at the values, because looking makes the host wait for the device.

        Raises:
            ValueError: G is not finite.
        """
        if self.config.custom_G_type is None or self._predefined_is_finite:
            return
        if torch.compiler.is_compiling() or self.predefined_outputs.is_meta:
            return
        if not bool(torch.isfinite(self.predefined_curvature).all()):
            raise ValueError(
                f"custom_G_type={self.config.custom_G_type!r}, but G has not been set; load a checkpoint that holds it "
                "or call set_predefined_curvature"
            )
        self._predefined_is_finite = True


class PldrllmForCausalLM(PldrllmPreTrainedModel, PldrllmGenerationMixin):
    """The decoder with its (untied, biased) output head."""

    def __init__(self, config: PldrllmConfig) -> None:
        super().__init__(config)
        self.decoder = PldrllmModel(config)
        self.lm_head: nn.Linear = OutputHead(config.hidden_size, config.vocab_size, bias=config.final_bias)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """Return the output head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the output head."""
        self.lm_head = value

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
        token_mask: Tensor | None = None,
        output_pldr_attentions: bool | None = None,
        output_deductive_outputs: bool = False,
        cache_first_G: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        targets: Tensor | None = None,
        loss_factor: Tensor | float = 1.0,
        **kwargs: Any,
    ) -> PldrllmCausalLMOutput:
        """Next-token logits, and the mean cross-entropy if `labels` (B, S, -100 ignored) are given.

        The labels are shifted here, as everywhere in transformers: position s is scored against label s + 1.
        `logits_to_keep` asks for the logits of the last positions only. With `targets` (B, S, -100 ignored), which
        are not shifted, there are no logits: the loss is `loss_factor` times the summed cross-entropy, and
        `cross_entropy_sum` and `correct` are there. The other arguments are those of `PldrllmModel.forward`.

        Raises:
            ValueError: both `labels` and `targets`, or as the decoder does.
        """
        if labels is not None and targets is not None:
            raise ValueError("give labels for logits and their mean loss, or targets for the sum without logits")
        outputs = self.decoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            token_mask=token_mask,
            output_pldr_attentions=output_pldr_attentions,
            output_deductive_outputs=output_deductive_outputs,
            cache_first_G=cache_first_G,
            return_dict=True,  # whatever the configuration says: the fields are read here
            **kwargs,
        )
        logits = loss = cross_entropy_sum = correct = None
        if targets is not None:
            loss, cross_entropy_sum, correct = self._score(outputs.last_hidden_state, targets, loss_factor)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(outputs.last_hidden_state[:, kept])
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return PldrllmCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            pldr_attentions=outputs.pldr_attentions,
            deductive_outputs=outputs.deductive_outputs,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_entropy_sum=cross_entropy_sum,
            correct=correct,
        )

    def _score(self, hidden_states: Tensor, targets: Tensor, factor: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        head: Any = self.lm_head
        if isinstance(head, OutputHead):
            scores: tuple[Tensor, Tensor, Tensor] = head(hidden_states, targets, factor)
            return scores
        return chunked_cross_entropy(hidden_states, head.weight, head.bias, targets, factor)  # somebody else's


def _positions(embedded: Tensor, past_length: int | Tensor, token_mask: Tensor | None) -> Tensor:
    """Return the positions (B or 1, S) counting real tokens, so that a left-padded sample has the positions it has
    alone.
    """
    length = embedded.shape[1]
    if token_mask is None:
        return (torch.arange(length, device=embedded.device) + past_length)[None]
    return (token_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]


def _document_bounds(position_ids: Tensor) -> dict[str, Any]:
    """Return what FlashAttention takes to keep documents apart, all rows end to end: where each begins, and the end.

    transformers itself would look for documents in a batch of one row only. No document is longer than a row, so the
    row's length serves as the greatest one, which need not be read back.

    Args:
        position_ids: (B, S); a document begins at each row's start and where they do not go up by one.
    """
    begins = torch.diff(position_ids, prepend=position_ids[:, :1]) != 1
    bounds = F.pad(begins.flatten().nonzero().flatten(), (0, 1), value=begins.numel()).int()
    longest = position_ids.shape[1]
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def _written_out(config: PldrllmConfig) -> PldrllmConfig:
    """Return the configuration of a pass whose attention weights are written out: it needs a mask of that kind."""
    eager: PldrllmConfig = copy.copy(config)
    eager._attn_implementation = "eager"
    return eager


register_renames()

__all__ = ["PldrllmForCausalLM", "PldrllmModel", "PldrllmPreTrainedModel"]
