"""Power law graph attention (PLGA): queries -> metric -> energy-curvature tensor G_LM -> attention.

The stages and letters follow the PLDR-LLM papers (arXiv 2410.16703 and 2502.13502): the Gram matrix of a head's
queries passes through a residual metric learner (A), becomes a positive metric A_LM, its elementwise power A_P, and the
curvature G_LM = a A_P + b_a; attention is then softmax(q G_LM k^T / sqrt(d)) v.

All deductive tensors have the shape (B, ..., H, d, d): between batch and heads there may be further axes, and
nothing here depends on how many.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .casting import CastsWeights, Groups, Linear, LinearStack, groups_of
from .causal_gram import ChunkPlan, chunk_grams, curve_queries, of_last_chunk
from .configuration_pldrllm import PldrllmConfig
from .refining import Sizes, is_at_once, refine
from .rotary import at_least_fp32, rotate

# Keeps A_LM off zero, where its power would lose its gradient (the papers' constant).
METRIC_FLOOR = 1e-9


@dataclass(frozen=True)
class DeductiveOutputs:
    """The deductive outputs of one layer, each (B, ..., H, d, d).

    With a predefined G only `curvature` exists, as (1, H, d, d); the others are `None`.
    """

    metric: Tensor | None
    """A: output of the residual metric learner."""
    positive_metric: Tensor | None
    """A_LM = iSwiGLU(W A + b) + 1e-9, fp32."""
    potential: Tensor | None
    """A_P = A_LM ** P elementwise, fp32."""
    curvature: Tensor
    """G_LM = a A_P + b_a, the energy-curvature tensor, fp32."""

    def map(self, change: Callable[[Tensor], Tensor]) -> DeductiveOutputs:
        """Return the same change applied to every tensor that is there."""

        def change_if_there(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else change(tensor)

        return DeductiveOutputs(
            change_if_there(self.metric),
            change_if_there(self.positive_metric),
            change_if_there(self.potential),
            change(self.curvature),
        )

    def tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
        """Return the tensors in the order of the fields."""
        return self.metric, self.positive_metric, self.potential, self.curvature


class GatedLinearUnit(LinearStack):
    """down(silu(gate(x)) * up(x)), (..., width) -> (..., width)."""

    stack = ("gate", "up")

    def __init__(self, width: int, inner_width: int, bias: bool) -> None:
        super().__init__()
        self.gate = Linear(width, inner_width, bias=bias)
        self.up = Linear(width, inner_width, bias=bias)
        self.down = Linear(inner_width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the unit over the last axis."""
        gate, up = self.project(x)
        out: Tensor = self.down(F.silu(gate) * up)
        return out


class ResidualMetricUnit(nn.Module):
    """LayerNorm(GLU_n(... GLU_1(A)) + A) over the rows of A, (..., d) -> (..., d)."""

    def __init__(self, config: PldrllmConfig) -> None:
        super().__init__()
        self.gated_units = nn.ModuleList(
            GatedLinearUnit(config.head_dim, config.A_dff, config.glu_bias) for _ in range(config.num_denseA)
        )
        self.unit_norm = nn.LayerNorm(config.head_dim, eps=config.layer_norm_eps)

    def forward(self, metric: Tensor) -> Tensor:
        """Refine the metric once."""
        update = metric
        for unit in self.gated_units:
            update = unit(update)
        refined: Tensor = self.unit_norm(update + metric)
        return refined


def whole_gram(queries: Tensor, token_mask: Tensor | None) -> Tensor:
    """Gram matrix q^T q over all positions, the papers' definition.

    Args:
        queries: (B, H, S, d), rotated.
        token_mask: (B, S), nonzero for real tokens; padded positions add nothing.

    Returns:
        (B, H, d, d), at least fp32.
    """
    with torch.autocast(queries.device.type, enabled=False):
        full = at_least_fp32(queries)
        masked = full if token_mask is None else full * token_mask[:, None, :, None].to(full.dtype)
        return masked.transpose(-1, -2) @ full


def learner_sizes(config: PldrllmConfig) -> Sizes:
    """Return the sizes of a metric learner."""
    return Sizes(config.head_dim, config.A_dff, config.num_denseA, config.num_reslayerA, config.glu_bias)


class MetricLearner(CastsWeights):
    """From a Gram matrix to the metric tensor A; one network shared by a layer's heads.

    Where there is a kernel for it, a training step under autocast takes all units at once (`refining.py`).
    """

    def __init__(self, config: PldrllmConfig) -> None:
        super().__init__()
        self.gram_norm = nn.LayerNorm(config.head_dim, eps=config.layer_norm_eps)
        self.residual_units = nn.ModuleList(ResidualMetricUnit(config) for _ in range(config.num_reslayerA))
        self.recomputes = False
        """Whether a training step computes the units again in the backward instead of keeping what is inside them."""
        self.sizes = learner_sizes(config)

    def groups(self) -> Groups | None:
        """Return the weights of all units: gate and up of each GLU, their biases, down of each, their biases.

        None where there is no kernel for them, a part was replaced, or a hook waits for the call of a part.
        """
        device = self.gram_norm.weight.device
        if not is_at_once(device, torch.get_autocast_dtype(device.type), self.sizes):
            return None
        units: Any = self.residual_units
        glus = [glu for unit in units for glu in unit.gated_units]
        inner = groups_of([part for glu in glus for part in (glu.gate, glu.up)])
        outer = groups_of([glu.down for glu in glus])
        hooks = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
        waits = any(getattr(part, name) for part in units.modules() for name in hooks)
        return None if inner is None or outer is None or waits else [*inner, *outer]

    def forward(self, gram: Tensor) -> Tensor:
        """Gram matrices (B, ..., H, d, d), at least fp32 -> A of the same shape."""
        metric: Tensor = self.gram_norm(gram.to(self.gram_norm.weight.dtype))
        if self.recomputes and self.training and torch.is_grad_enabled():
            # The units draw no random numbers, whose state need not be kept.
            again: Tensor = checkpoint(self._refine, metric, self._cast, use_reentrant=False, preserve_rng_state=False)
            return again
        return self._refine(metric, self._cast)

    def _refine(self, metric: Tensor, cast: Any) -> Tensor:
        """Take A through the units, with cast weights where there are some; `_cast` is gone in the backward."""
        if cast is None:
            for unit in self.residual_units:
                metric = unit(metric)
            return metric
        inner_weight, inner_bias, outer_weight, outer_bias = cast
        glus, inner, d = self.sizes.units * self.sizes.depth, self.sizes.inner, self.sizes.d
        norms: list[Any] = [unit.unit_norm for unit in self.residual_units]
        return refine(
            metric,
            inner_weight.view(glus, 2, inner, d),
            None if inner_bias is None else inner_bias.view(glus, 2, inner),
            outer_weight.view(glus, d, inner),
            None if outer_bias is None else outer_bias.view(glus, d),
            torch.stack([norm.weight for norm in norms]).to(metric.dtype),
            torch.stack([norm.bias for norm in norms]).to(metric.dtype),
            norms[0].eps,
        )


class PowerLaw(nn.Module):
    """From the metric A to the positive metric, the potential and the curvature; parameters are (H, d, d)."""

    def __init__(self, config: PldrllmConfig) -> None:
        super().__init__()
        shape = (config.num_attention_heads, config.head_dim, config.head_dim)
        self.metric_weight = nn.Parameter(torch.empty(shape))
        self.metric_bias = nn.Parameter(torch.empty(shape))
        self.power_exponent = nn.Parameter(torch.empty(shape))
        self.coupling = nn.Parameter(torch.empty(shape))
        self.coupling_bias = nn.Parameter(torch.empty(shape))

    def forward(self, metric: Tensor) -> DeductiveOutputs:
        """Apply W, iSwiGLU, the power P and the coupling a to A: (B, ..., H, d, d).

        Runs in fp32 under every precision: the power amplifies differences in the last bits.
        """
        with torch.autocast(metric.device.type, enabled=False):
            field = at_least_fp32(self.metric_weight) @ at_least_fp32(metric) + at_least_fp32(self.metric_bias)
            positive_metric = field * F.silu(field) + METRIC_FLOOR
            potential = positive_metric ** at_least_fp32(self.power_exponent)
            curvature = at_least_fp32(self.coupling) @ potential + at_least_fp32(self.coupling_bias)
        return DeductiveOutputs(metric, positive_metric, potential, curvature)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out, for comparison and for attention weights; shapes as transformers' interface."""
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(at_least_fp32(scores), dim=-1).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class PowerLawAttention(LinearStack):
    """Multi-head power law graph attention of one layer, with learned or predefined G."""

    stack = ("query", "key", "value")

    def __init__(self, config: PldrllmConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        # Not `layer_idx`: transformers' flash attention reads that if it is there, and compiled code would be made anew
        # for each layer.
        self.place = layer_idx
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        width, bias = config.hidden_size, config.attention_bias
        self.query = Linear(width, width, bias=bias)
        self.key = Linear(width, width, bias=bias)
        self.value = Linear(width, width, bias=bias)
        self.output = Linear(width, width, bias=bias)
        if config.custom_G_type is None:
            self.metric_learner = MetricLearner(config)
            self.power_law = PowerLaw(config)

    def forward(
        self,
        hidden_states: Tensor,
        rotary: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        token_mask: Tensor | None = None,
        chunk_plan: ChunkPlan | None = None,
        predefined_curvature: Tensor | None = None,
        past_key_values: Any = None,
        write_out_weights: bool = False,
        cache_first_G: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, DeductiveOutputs]:
        """Attend with q G_LM k^T.

        Args:
            hidden_states: (B, S, D).
            rotary: cos and sin from `rotary_cos_sin`.
            attention_mask: the backend's causal mask; `None` lets it use its own causal path.
            token_mask: (B, S), nonzero for real tokens, or `None`.
            chunk_plan: where the tokens lie in chunks, with a causal Gram.
            predefined_curvature: constant G (H, d, d) when `custom_G_type` is set.
            past_key_values: cache to read and extend; with learned G its layers hold G.
            write_out_weights: attend step by step, whatever the backend, so that there are weights to return; the mask
                must then be one for that.
            cache_first_G: leave the G of the first sample alone in the cache.

        Returns:
            The layer's output (B, S, D), attention weights if the backend makes them, and the deductive outputs.
        """
        batch, length, width = hidden_states.shape
        split = (batch, length, -1, self.head_dim)
        query, key, value = (each.view(split).transpose(1, 2) for each in self.project(hidden_states))
        query = rotate(query, *rotary, interleaved=self.config.reference_rope)
        key = rotate(key, *rotary, interleaved=self.config.reference_rope)

        if chunk_plan is not None:
            # What spreads a model over devices moves tensors to a layer's own, but not those inside a dataclass.
            chunk_plan = chunk_plan.to(query.device)
        if predefined_curvature is not None:
            deductive = DeductiveOutputs(None, None, None, predefined_curvature[None])
        else:
            holder = None if past_key_values is None else past_key_values.layers[self.place]
            deductive = self.deduce(query, token_mask, chunk_plan, holder, cache_first_G)
        if chunk_plan is not None:
            query = curve_queries(query, deductive.curvature.to(query.dtype), chunk_plan)
        elif self.config.custom_G_type != "identity":
            query = query @ deductive.curvature.to(query.dtype)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.place)

        backend = "eager" if write_out_weights else self.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(backend, eager_attention)
        dropout = self.config.attention_dropout if self.training else 0.0
        mixed, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.output(mixed.reshape(batch, length, width)), weights, deductive

    def deduce(
        self,
        queries: Tensor,
        token_mask: Tensor | None,
        chunk_plan: ChunkPlan | None,
        holder: Any,
        cache_first_G: bool = False,
    ) -> DeductiveOutputs:
        """Learned G of rotated queries (B, H, S, d), or the one that the cache layer `holder` holds, if any."""
        if chunk_plan is not None:
            return self._deduce_by_chunk(queries, chunk_plan, holder)
        if holder is not None and holder.holds_curvature:
            held: DeductiveOutputs = holder.deductive
            return held
        deductive: DeductiveOutputs = self.power_law(self.metric_learner(whole_gram(queries, token_mask)))
        if holder is not None:
            holder.hold(deductive.map(lambda tensor: tensor[:1]) if cache_first_G else deductive)
        return deductive

    def _deduce_by_chunk(self, queries: Tensor, plan: ChunkPlan, holder: Any) -> DeductiveOutputs:
        """(B, K, H, d, d) of the K chunks that the new queries touch."""
        if holder is not None:
            queries = holder.append_queries(queries)
            if plan.reuse:
                held: DeductiveOutputs = holder.deductive
                return held
        deductive: DeductiveOutputs = self.power_law(self.metric_learner(chunk_grams(queries, plan)))
        if holder is not None:
            holder.hold(deductive.map(lambda tensor: of_last_chunk(tensor, plan)), plan.last)
        return deductive
