"""A literal PLDR-LLM: the papers' formulas in plain torch, with nothing taken from `pldr_train`.

The tests compare the package with it and the benchmarks measure the package against it. It has the names of the
published checkpoints, so their weights load as they are, and it is written for reading: S x S attention scores with a
mask, einsum, and a DAG loss by `torch.linalg.matrix_exp` under autograd, which overflows where the formulas do.

Letters: B batch, S positions, H heads, d width of a head, D = H * d.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class OracleSizes:
    """Sizes and switches of an oracle; `curvature` (L, H, d, d) replaces the learned G of every layer."""

    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    vocab_size: int
    num_reslayerA: int = 8  # noqa: N815
    num_denseA: int = 2  # noqa: N815
    A_dff: int | None = None
    intermediate_size: int | None = None
    reference_rope: bool = True
    rope_theta: float = 10000.0
    layer_norm_eps: float = 1e-6
    curvature: Tensor | None = None

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.head_dim


@dataclass(frozen=True)
class OracleLayerOutputs:
    """Deductive outputs (B, H, d, d) and attention scores (B, H, S, S), scaled but before the mask, of a layer."""

    A: Tensor | None
    A_LM: Tensor | None
    A_P: Tensor | None
    G_LM: Tensor
    attention_scores_before_mask: Tensor


@dataclass(frozen=True)
class OracleOutputs:
    logits: Tensor
    decoder_output: Tensor
    layers: tuple[OracleLayerOutputs, ...]


class Glu(nn.Module):
    """W3(silu(W1 x) * (W2 x))."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gluw1 = nn.Linear(width, inner)
        self.gluw2 = nn.Linear(width, inner)
        self.gluw3 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.gluw3(F.silu(self.gluw1(x)) * self.gluw2(x))


class ResidualUnit(nn.Module):
    """LayerNorm(GLU_n(... GLU_1(A)) + A)."""

    def __init__(self, sizes: OracleSizes) -> None:
        super().__init__()
        inner = sizes.A_dff or 8 * sizes.head_dim // 3
        self.denseAs = nn.ModuleList(Glu(sizes.head_dim, inner) for _ in range(sizes.num_denseA))
        self.layernormA = nn.LayerNorm(sizes.head_dim, eps=sizes.layer_norm_eps)

    def forward(self, A: Tensor) -> Tensor:
        update = A
        for glu in self.denseAs:
            update = glu(update)
        return self.layernormA(update + A)


class PlgattLayer(nn.Module):
    """A -> A_LM, A_P, G_LM with (H, d, d) parameters W, b, P, a, b_a."""

    def __init__(self, sizes: OracleSizes) -> None:
        super().__init__()
        shape = (sizes.num_attention_heads, sizes.head_dim, sizes.head_dim)
        for name in ("Wlst", "blst", "pwlst", "alst", "balst"):
            setattr(self, name, nn.Parameter(torch.zeros(shape)))

    def forward(self, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        field = self.Wlst @ A + self.blst
        A_LM = field * F.silu(field) + 1e-9
        A_P = torch.pow(A_LM, self.pwlst)
        G_LM = self.alst @ A_P + self.balst
        return A_LM, A_P, G_LM


class Attention(nn.Module):
    """softmax(q G_LM k^T / sqrt(d) + mask) v of all heads, with G_LM learned from q or given."""

    def __init__(self, sizes: OracleSizes, layer: int) -> None:
        super().__init__()
        self.sizes = sizes
        self.G = None if sizes.curvature is None else sizes.curvature[layer]
        for name in ("wq", "wk", "wv", "dense"):
            setattr(self, name, nn.Linear(sizes.width, sizes.width))
        if self.G is None:
            self.layernorm1 = nn.LayerNorm(sizes.head_dim, eps=sizes.layer_norm_eps)
            self.reslayerAs = nn.ModuleList(ResidualUnit(sizes) for _ in range(sizes.num_reslayerA))
            self.plgatt_layer = PlgattLayer(sizes)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, OracleLayerOutputs]:
        batch, length, width = x.shape
        heads, head_dim = self.sizes.num_attention_heads, self.sizes.head_dim
        q, k, v = (w(x).view(batch, length, heads, head_dim) for w in (self.wq, self.wk, self.wv))
        q, k = rope(q, self.sizes), rope(k, self.sizes)

        A = A_LM = A_P = None
        if self.G is None:
            A = self.layernorm1(torch.einsum("bshi,bshj->bhij", q, q))
            for unit in self.reslayerAs:
                A = unit(A)
            A_LM, A_P, G_LM = self.plgatt_layer(A)
        else:
            G_LM = self.G[None].expand(batch, -1, -1, -1)

        scores = torch.einsum("bshi,bhij,bthj->bhst", q, G_LM.to(q.dtype), k) / math.sqrt(head_dim)
        weights = F.softmax(scores + mask, dim=-1)
        mixed = torch.einsum("bhst,bthj->bshj", weights, v.to(weights.dtype)).reshape(batch, length, width)
        return self.dense(mixed), OracleLayerOutputs(A, A_LM, A_P, G_LM, scores)


def rope(x: Tensor, sizes: OracleSizes) -> Tensor:
    """Rotate the pairs of x (B, S, H, d) by position / theta^(2i/d); angles in fp32."""
    frequencies = 1.0 / sizes.rope_theta ** (torch.arange(0, sizes.head_dim, 2, device=x.device) / sizes.head_dim)
    angles = torch.arange(x.shape[1], device=x.device)[:, None] * frequencies
    cos, sin = angles.cos()[None, :, None, :], angles.sin()[None, :, None, :]
    half = sizes.head_dim // 2
    first, second = (x[..., 0::2], x[..., 1::2]) if sizes.reference_rope else (x[..., :half], x[..., half:])
    rotated = (first * cos - second * sin, first * sin + second * cos)
    return torch.stack(rotated, dim=-1).flatten(-2) if sizes.reference_rope else torch.cat(rotated, dim=-1)


class DecoderLayer(nn.Module):
    """x = LN(attention + x); x = LN(GLU(x) + x)."""

    def __init__(self, sizes: OracleSizes, layer: int) -> None:
        super().__init__()
        self.mha1 = Attention(sizes, layer)
        self.ffn = Glu(sizes.width, sizes.intermediate_size or 8 * sizes.width // 3)
        self.layernorm1 = nn.LayerNorm(sizes.width, eps=sizes.layer_norm_eps)
        self.layernorm2 = nn.LayerNorm(sizes.width, eps=sizes.layer_norm_eps)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, OracleLayerOutputs]:
        attended, outputs = self.mha1(x, mask)
        x = self.layernorm1(attended + x)
        return self.layernorm2(self.ffn(x) + x), outputs


class Decoder(nn.Module):
    """x = LN(E[ids] * sqrt(D)), then the layers."""

    def __init__(self, sizes: OracleSizes) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sizes.vocab_size, sizes.width)
        self.layernorm1 = nn.LayerNorm(sizes.width, eps=sizes.layer_norm_eps)
        self.dec_layers = nn.ModuleList(DecoderLayer(sizes, i) for i in range(sizes.num_hidden_layers))

    def forward(self, input_ids: Tensor) -> tuple[Tensor, tuple[OracleLayerOutputs, ...]]:
        length = input_ids.shape[1]
        mask = torch.full((length, length), -torch.inf, device=input_ids.device).triu(1)
        x = self.layernorm1(self.embedding(input_ids) * math.sqrt(self.embedding.embedding_dim))
        outputs = []
        for layer in self.dec_layers:
            x, layer_outputs = layer(x, mask)
            outputs.append(layer_outputs)
        return x, tuple(outputs)


class Oracle(nn.Module):
    """The language model; load its weights with `load_state_dict`, names as published."""

    def __init__(self, sizes: OracleSizes) -> None:
        super().__init__()
        self.decoder = Decoder(sizes)
        self.final_layer = nn.Linear(sizes.width, sizes.vocab_size)

    def forward(self, input_ids: Tensor) -> OracleOutputs:
        hidden, layers = self.decoder(input_ids)
        return OracleOutputs(self.final_layer(hidden), hidden, layers)


def cross_entropy(logits: Tensor, targets: Tensor, ignored_id: int = 0) -> Tensor:
    """Mean over the targets (B, S) that are not the padding id."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=ignored_id)


def dag_term(matrices: list[Tensor]) -> Tensor:
    """Mean over layers, batch and heads of |ln(tr(exp(M o M)) / d)|, fp32 or fp64; inf where exp overflows."""
    with torch.autocast(matrices[0].device.type, enabled=False):
        stacked = torch.stack([matrix.to(torch.promote_types(matrix.dtype, torch.float32)) for matrix in matrices])
        exponential = torch.linalg.matrix_exp(stacked * stacked)
        trace = exponential.diagonal(dim1=-2, dim2=-1).sum(-1)
        return torch.log(trace / stacked.shape[-1]).abs().mean()


def dag_terms(outputs: OracleOutputs) -> dict[str, Tensor]:
    """The three terms of the DAG loss, by the name of their tensor."""
    return {name: dag_term([getattr(layer, name) for layer in outputs.layers]) for name in ("A_LM", "A_P", "G_LM")}


def total_loss(outputs: OracleOutputs, targets: Tensor, coefficients: tuple[float, float, float]) -> Tensor:
    """Cross-entropy plus the DAG terms of A_LM, A_P and G_LM, weighted in this order."""
    terms = dag_terms(outputs).values()
    return cross_entropy(outputs.logits, targets) + sum(c * t for c, t in zip(coefficients, terms, strict=True))
