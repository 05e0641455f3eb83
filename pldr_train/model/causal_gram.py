"""The causal Gram (`gram_chunk_size`): a token's G is learned from the chunks before its own.

The tokens of a sample are cut in chunks of C, padding left out. Queries of chunk c use the G of the Gram summed over
the chunks before c; the first chunk sees the zero Gram. So a token's logits depend on no later token. This variant is
experimental and not of the papers, whose Gram sums over the whole sequence (arXiv 2410.16703).

Shapes: B batch, H heads, S new positions, T all positions (cached and new), d head width, N chunks of all positions,
K chunks that the new positions touch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .rotary import at_least_fp32


@dataclass(frozen=True)
class ChunkPlan:
    """Where the tokens of one call lie in the grid of chunks; the same for all layers.

    A grid has room for whole chunks: place p is token p % C of chunk p // C. A place equal to the grid's size means
    "nowhere", for padding.
    """

    chunk_size: int
    num_chunks: int
    """N."""
    span: int
    """K."""
    places: Tensor | None
    """(B, T) place of each position in the grid of N chunks; `None`: position p is at place p."""
    new_places: Tensor | None
    """(B, S) place of each new position in the grid of the K chunks; `None`: the same as above."""
    first: Tensor
    """(B,) number of the first chunk that the new positions touch."""
    last: Tensor
    """(B,) number of the last one."""
    reuse: bool
    """The cache holds the G of the only chunk touched, for every sample."""

    def to(self, device: torch.device) -> ChunkPlan:
        """Return the same plan for a layer on another device."""
        if self.first.device == device:
            return self
        places, new_places = (None if each is None else each.to(device) for each in (self.places, self.new_places))
        return replace(
            self, places=places, new_places=new_places, first=self.first.to(device), last=self.last.to(device)
        )

    def local_chunks(self) -> Tensor:
        """(B, K) numbers of the touched chunks; past a sample's last, that is repeated."""
        steps = torch.arange(self.span, device=self.first.device)
        return torch.minimum(self.first[:, None] + steps, self.last[:, None])


def plan_chunks(
    chunk_size: int,
    batch: int,
    new_length: int,
    past_length: int | Tensor,
    token_mask: Tensor | None,
    capacity: int | None,
    held_chunk: Tensor | None,
    device: torch.device,
) -> ChunkPlan:
    """Place the positions of a call in chunks.

    Args:
        chunk_size: C.
        batch: B.
        new_length: S.
        past_length: cached positions before them; a tensor () with a static cache.
        token_mask: (B, past + S), nonzero for real tokens; `None`: all are.
        capacity: length T of the query store if it is longer than past + S (static cache).
        held_chunk: (B or 1,) chunk whose G the cache holds.
        device: of the tensors made.

    Returns:
        The plan. Without a cache nothing here makes the host wait for the device; with one it waits once.
    """
    if isinstance(past_length, int) and past_length == 0 and token_mask is None and capacity is None:
        num_chunks = -(-new_length // chunk_size)
        zeros = torch.zeros(batch, dtype=torch.long, device=device)
        last = zeros + (num_chunks - 1)
        return ChunkPlan(chunk_size, num_chunks, num_chunks, None, None, zeros, last, reuse=False)

    total = capacity if capacity is not None else int(past_length) + new_length
    columns = torch.arange(total, device=device)
    if token_mask is None:
        is_token = (columns < past_length + new_length).expand(batch, total)
    else:
        is_token = torch.nn.functional.pad(token_mask.bool(), (0, total - token_mask.shape[1]))
    num_chunks = -(-total // chunk_size)
    ordinals = is_token.long().cumsum(-1) - 1
    places = torch.where(is_token, ordinals, num_chunks * chunk_size)

    seen = (is_token & (columns < past_length)).sum(-1)
    last_ordinal = torch.maximum(ordinals[:, -1], seen)
    first, last = seen // chunk_size, last_ordinal // chunk_size
    span, reuse = _span(first, last, chunk_size, new_length, past_length, held_chunk)

    new_columns = torch.arange(new_length, device=device) + past_length
    new_places = places[:, new_columns] - (first * chunk_size)[:, None]
    new_places = torch.where(is_token[:, new_columns], new_places, span * chunk_size)
    return ChunkPlan(chunk_size, num_chunks, span, places, new_places, first, last, reuse)


def _span(
    first: Tensor,
    last: Tensor,
    chunk_size: int,
    new_length: int,
    past_length: int | Tensor,
    held_chunk: Tensor | None,
) -> tuple[int, bool]:
    """Return how many chunks the new positions touch at most, and whether the cache holds the G of the only one."""
    bound = (new_length + chunk_size - 2) // chunk_size + 1
    if isinstance(past_length, int) and past_length == 0:
        return -(-new_length // chunk_size), False
    if torch.compiler.is_compiling():
        # A compiled graph cannot branch on what is held: it learns the G of the touched chunks every time.
        return bound, False
    span = 1 + (last - first).max()
    moved = torch.ones_like(span) if held_chunk is None else (held_chunk != first).any().to(span.dtype)
    span_value, has_moved = (int(value) for value in torch.stack((span, moved)).tolist())
    return span_value, span_value == 1 and not has_moved


def chunk_grams(queries: Tensor, plan: ChunkPlan) -> Tensor:
    """Gram matrices of the tokens before each touched chunk.

    Args:
        queries: (B, H, T, d) rotated queries of all positions.
        plan: of this call.

    Returns:
        (B, K, H, d, d), at least fp32.
    """
    with torch.autocast(queries.device.type, enabled=False):
        grid = _to_grid(at_least_fp32(queries), plan.places, plan.num_chunks, plan.chunk_size)
        of_chunks = (grid.transpose(-1, -2) @ grid).transpose(1, 2)
        # Exclusive sum over the chunks before; the sum is taken in order, so that caching does not change it.
        before = torch.nn.functional.pad(of_chunks[:, :-1].cumsum(1), (0, 0, 0, 0, 0, 0, 1, 0))
    if plan.places is None:
        return before
    index = plan.local_chunks()[:, :, None, None, None].expand(-1, -1, *before.shape[2:])
    return before.gather(1, index)


def curve_queries(queries: Tensor, curvature: Tensor, plan: ChunkPlan) -> Tensor:
    """q' = q G_c, each new query with the G of its own chunk.

    Args:
        queries: (B, H, S, d).
        curvature: (B, K, H, d, d) in the dtype of the queries.
        plan: of this call.
    """
    if plan.span == 1:
        return queries @ curvature[:, 0]
    grid = _to_grid(queries, plan.new_places, plan.span, plan.chunk_size)
    curved = (grid @ curvature.transpose(1, 2)).flatten(2, 3)
    if plan.new_places is None:
        return curved[:, :, : queries.shape[2]]
    # Padding has no place in the grid; any value will do for it, as nothing attends from there.
    index = plan.new_places.clamp(max=curved.shape[2] - 1)[:, None, :, None].expand(-1, *_inner(queries))
    return curved.gather(2, index)


def of_last_chunk(tensor: Tensor, plan: ChunkPlan) -> Tensor:
    """(B, 1, H, d, d) of each sample's last touched chunk, from (B, K, H, d, d)."""
    if plan.span == 1:
        return tensor
    index = (plan.last - plan.first)[:, None, None, None, None].expand(-1, 1, *tensor.shape[2:])
    return tensor.gather(1, index)


def _to_grid(tensor: Tensor, places: Tensor | None, num_chunks: int, chunk_size: int) -> Tensor:
    """(B, H, S, d) -> (B, H, num_chunks, chunk_size, d), zero where no token is."""
    size = num_chunks * chunk_size
    if places is None:
        grid = torch.nn.functional.pad(tensor, (0, 0, 0, size - tensor.shape[2]))
    else:
        batch, heads, _, width = tensor.shape
        index = places[:, None, :, None].expand(-1, *_inner(tensor))
        grid = tensor.new_zeros(batch, heads, size + 1, width).scatter(2, index, tensor)[:, :, :-1]
    return grid.reshape(tensor.shape[0], tensor.shape[1], num_chunks, chunk_size, tensor.shape[3])


def _inner(tensor: Tensor) -> tuple[int, int, int]:
    return tensor.shape[1], tensor.shape[2], tensor.shape[3]
