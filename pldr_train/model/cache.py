"""Caches that hold a layer's deductive outputs beside its keys and values.

G lives in the cache, never in a module: two generations that share a model do not disturb each other, and what
reorders, repeats or crops keys and values does the same to G. Any `DynamicCache` or `StaticCache` of transformers works
with a PLDR-LLM: at its first use its layers are replaced by those defined here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache, StaticLayer

from .configuration_pldrllm import PldrllmConfig
from .power_law_attention import DeductiveOutputs


class _DeductiveLayer:
    """What a cache layer holds beside K and V; mixed into transformers' layers.

    With the whole-sequence Gram that is the deductive outputs of the first pass. With a causal Gram it is those of the
    chunk of the newest token, that chunk's number, and the rotated queries of all positions: every Gram follows from
    them, so cropping them crops the Gram. All this stays on the device when K and V are offloaded.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.deductive: DeductiveOutputs | None = None
        """(B or 1, H, d, d), with a causal Gram (B, 1, H, d, d); a batch of 1 serves every sample."""
        self.chunk: Tensor | None = None
        """(B,) number of the chunk that `deductive` belongs to; causal Gram only."""
        self.queries: Tensor | None = None
        """(B, H, T, d) rotated queries of the cached positions; causal Gram only."""

    @property
    def holds_curvature(self) -> bool:
        """Whether a first pass has left its G here."""
        return self.deductive is not None

    @property
    def capacity(self) -> int | None:
        """Number of positions that `queries` always has, or `None` if it grows."""
        return None

    def hold(self, deductive: DeductiveOutputs, chunk: Tensor | None = None) -> None:
        """Keep the deductive outputs (and the number of their chunk) for the following passes."""
        self.deductive, self.chunk = deductive, chunk

    def append_queries(self, queries: Tensor) -> Tensor:
        """Add rotated queries (B, H, S, d); returns all, (B, H, T, d). Call before K and V are updated."""
        self.queries = queries if self.queries is None else torch.cat((self.queries, queries), dim=-2)
        return self.queries

    def _select(self, select: Callable[[Tensor], Tensor]) -> None:
        """Apply `select` over the batch; what serves the whole batch stays as it is."""
        if self.deductive is not None:
            self.deductive = self.deductive.map(lambda tensor: tensor if tensor.shape[0] == 1 else select(tensor))
        if self.chunk is not None and self.chunk.shape[0] > 1:
            self.chunk = select(self.chunk)
        if self.queries is not None:
            self.queries = select(self.queries)

    def reset(self) -> None:
        """Forget everything, for another batch of prompts."""
        super().reset()  # type: ignore[misc]
        self.deductive = self.chunk = self.queries = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let each sample go on from the beam that `beam_idx` (B,) names."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._select(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sample."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._select(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some samples."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._select(lambda tensor: tensor[indices])


class PldrllmDynamicLayer(_DeductiveLayer, DynamicLayer):
    """K, V and G of one layer; K and V grow."""

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens, `tokens_to_remove` < 0; a G whose every token is dropped goes with them."""
        super().crop(tokens_to_remove)
        length = self.get_seq_length()
        if length == 0:
            self.deductive = self.chunk = self.queries = None
        elif self.queries is not None:
            self.queries = self.queries[..., :length, :]


class PldrllmStaticLayer(_DeductiveLayer, StaticLayer):
    """K, V and G of one layer at fixed addresses, as compiled decoding needs them."""

    cumulative_length: Tensor
    max_cache_len: int

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._holds = False

    @property
    def holds_curvature(self) -> bool:
        """Whether a first pass has left its G here."""
        return self._holds

    @property
    def capacity(self) -> int | None:
        """Number of positions that `queries` always has."""
        return self.max_cache_len

    def hold(self, deductive: DeductiveOutputs, chunk: Tensor | None = None) -> None:
        """Copy the deductive outputs (and the number of their chunk) to where the following passes read them."""
        if self.deductive is None:
            self.deductive, self.chunk = deductive.map(_fixed), None if chunk is None else _fixed(chunk)
        else:
            pairs = zip((*self.deductive.tensors(), self.chunk), (*deductive.tensors(), chunk), strict=True)
            for held, value in pairs:
                if held is not None and value is not None:
                    held.copy_(value)
        self._holds = True

    def append_queries(self, queries: Tensor) -> Tensor:
        """Add rotated queries (B, H, S, d); returns the whole store (B, H, max_cache_len, d), zero where unused."""
        if self.queries is None:
            batch, heads, _, width = queries.shape
            self.queries = _fixed(queries.new_zeros(batch, heads, self.max_cache_len, width))
        places = torch.arange(queries.shape[-2], device=queries.device) + self.cumulative_length.to(queries.device)
        self.queries.index_copy_(2, places, queries)
        return self.queries

    def reset(self) -> None:
        """Forget everything but the storage, which compiled code holds on to."""
        StaticLayer.reset(self)
        if self.queries is not None:
            self.queries.zero_()
        self._holds = False


class PldrllmDynamicCache(DynamicCache):
    """A cache of K, V and G that grows; what `generate` and the models use by default."""

    def __init__(self, config: PldrllmConfig, offloading: bool = False) -> None:
        super().__init__(config=config, offloading=offloading)
        carry_curvature(self, config.num_hidden_layers)


class PldrllmStaticCache(StaticCache):
    """A cache of K, V and G of fixed size, for compiled decoding."""

    def __init__(self, config: PldrllmConfig, max_cache_len: int, offloading: bool = False) -> None:
        super().__init__(config=config, max_cache_len=max_cache_len, offloading=offloading)
        carry_curvature(self, config.num_hidden_layers)


def carry_curvature(cache: Cache, num_layers: int) -> None:
    """Let every layer of a cache hold G beside K and V (safe to call again).

    Raises:
        ValueError: the cache already holds keys without their G, or its layers are of a kind that cannot hold G.
    """
    if cache.layer_class_to_replicate is DynamicLayer:
        # Such a cache makes its layers when K and V come; G comes before them.
        cache.layer_class_to_replicate = PldrllmDynamicLayer
        cache.layers.extend(PldrllmDynamicLayer() for _ in range(num_layers - len(cache.layers)))
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, _DeductiveLayer):
            cache.layers[index] = _with_deductive(layer)


def cached_curvature(cache: Cache) -> Tensor | None:
    """G of all layers, (L, B or 1, H, d, d), causal Gram (L, B, 1, H, d, d); `None` where no pass has been made."""
    held = [layer.deductive for layer in cache.layers if isinstance(layer, _DeductiveLayer) and layer.holds_curvature]
    if not held or len(held) < len(cache.layers):
        return None
    return torch.stack([deductive.curvature for deductive in held if deductive is not None])


def _with_deductive(layer: Any) -> _DeductiveLayer:
    kinds: dict[type, Callable[[], _DeductiveLayer]] = {
        DynamicLayer: PldrllmDynamicLayer,
        StaticLayer: lambda: PldrllmStaticLayer(layer.max_cache_len),
    }
    if type(layer) not in kinds:
        raise ValueError(
            f"a cache of {type(layer).__name__} cannot hold G, which this model learns from the prompt; use "
            "cache_implementation='dynamic' or 'static', or a model with a predefined G (custom_G_type)"
        )
    if layer.is_initialized and int(layer.get_seq_length()) > 0:
        raise ValueError(
            "past_key_values holds keys and values but no G: this model did not fill it; pass an empty cache, or one "
            "that a pass of this model returned"
        )
    carrying = kinds[type(layer)]()
    vars(carrying).update(vars(layer))
    return carrying


def _fixed(tensor: Tensor) -> Tensor:
    """Return a copy whose address compiled code may rely on."""
    copy = tensor.detach().clone()
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(copy)
    return copy


__all__ = [
    "PldrllmDynamicCache",
    "PldrllmDynamicLayer",
    "PldrllmStaticCache",
    "PldrllmStaticLayer",
    "cached_curvature",
    "carry_curvature",
]
