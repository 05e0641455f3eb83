"""Parameters, FLOPs and memory of a PLDR-LLM as closed formulas over plain integers.

Letters: L layers, H heads, d head_dim, D = H d, F intermediate_size, V vocab_size, S context_length, B sequences of a
micro-batch; the metric learner has N_res residual units of N_dense GLUs of inner width a = A_dff. A GLU from width m
to n and back holds 3 m n + 2 n + m parameters with its biases. A matrix product (p, q) x (q, r) costs 2 p q r FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from pldr_train.recipe import ModelSection, Recipe

TRAINING_FACTOR = 3
"""Forward, plus two products in the backward for each one in the forward."""

DAG_MATMULS = 43
"""Products of d x d matrices in one evaluation of ln(tr(exp(M o M))/d) on a device: 3 for the Taylor polynomial and a
fixed 40 squarings. (On the CPU each matrix is squared only as often as it needs.)"""

LOGITS_AT_ONCE = 2**25
"""Logits that the loss holds at most: it takes the positions in chunks (model/output_head.py)."""


@dataclass(frozen=True)
class FlopsPerToken:
    """FLOPs for each trained (or evaluated) token, by what they are spent on; `total` is their sum."""

    projections: float
    """Query, key, value and output projections."""
    feed_forward: float
    attention: float
    """q' k^T and weights v over all S positions."""
    gram: float
    """q^T q over the positions."""
    metric_learner: float
    power_stage: float
    """W A and a A_P."""
    query_times_g: float
    output_head: float
    dag_loss: float

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return sum(float(getattr(self, field.name)) for field in fields(self))


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device in a training step, by what they hold; `total` is their sum."""

    parameters: int
    gradients: int
    optimizer: int
    cast_weights: int
    """bf16 copies of the weights that autocast keeps during a step; 0 in fp32."""
    activations: int
    logits: int
    """Those of a chunk of positions, and the gradients that the loss keeps for its backward."""

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(int(getattr(self, field.name)) for field in fields(self))


def _glu_parameters(width: int, inner_width: int) -> int:
    return 3 * width * inner_width + 2 * inner_width + width


def count_parameters(model: ModelSection) -> int:
    """Count the parameters exactly.

    V D + 2 D (embedding, its LayerNorm) + V D + V (untied head with bias) + L * layer, where
    layer = 4 (D^2 + D) + glu(D, F) + 4 D  [+ 2 d + N_res (N_dense glu(d, a) + 2 d) + 5 H d^2  with learned G]:
    projections, feed-forward, two LayerNorms, the Gram's LayerNorm, the residual units, and W, b, P, a, b_a.
    """
    d, width, vocab = model.head_dim, model.width, model.vocab_size
    layer = 4 * (width**2 + width) + _glu_parameters(width, model.inner_width) + 4 * width
    if model.learned_g:
        unit = model.num_denseA * _glu_parameters(d, model.A_dff) + 2 * d
        layer += 2 * d + model.num_reslayerA * unit + 5 * model.num_attention_heads * d**2
    return vocab * width + 2 * width + vocab * width + vocab + model.num_hidden_layers * layer


def flops_per_token(
    model: ModelSection,
    context_length: int,
    *,
    training: bool = True,
    dag_tensors: int = 0,
    dag_matmuls: int = DAG_MATMULS,
) -> FlopsPerToken:
    """Count the FLOPs of all matrix products for one token of a packed row of `context_length` tokens.

    Forward, summed over the L layers:
    projections 8 D^2, feed-forward 6 D F, attention 4 S D, Gram 2 D d, q G 2 D d; once per sequence (with a causal Gram
    once per chunk) and so divided by S: metric learner H d rows * N_res N_dense 6 d a, power stage 4 H d^3. Then the
    head, 2 D V.

    Attention is counted in full, all S x S pairs, although it is causal: the convention of PaLM and of most published
    utilisation figures (a fused causal kernel executes about half of it). Elementwise work, norms and the embedding are
    not counted.

    Args:
        model: the recipe's section.
        context_length: S.
        training: times 3 for the backward, but for the DAG loss, whose gradient needs no product of matrices.
        dag_tensors: how many of A_LM, A_P, G_LM the DAG loss is taken of in a step (0 to 3).
        dag_matmuls: products of d x d matrices in one evaluation of the DAG loss.
    """
    assert 0 <= dag_tensors <= 3
    d, heads, width, layers = model.head_dim, model.num_attention_heads, model.width, model.num_hidden_layers
    learned = int(model.learned_g)
    rows_per_token = heads * d * model.num_grams(context_length) / context_length
    each = TRAINING_FACTOR if training else 1
    glus = model.num_reslayerA * model.num_denseA
    return FlopsPerToken(
        projections=each * layers * 8 * width**2,
        feed_forward=each * layers * 6 * width * model.inner_width,
        attention=each * layers * 4 * context_length * width,
        gram=each * layers * learned * 2 * width * d,
        metric_learner=each * layers * learned * rows_per_token * glus * 6 * d * model.A_dff,
        power_stage=each * layers * learned * rows_per_token * 4 * d**2,
        query_times_g=each * layers * 2 * width * d,
        output_head=each * 2 * width * model.vocab_size,
        dag_loss=layers * learned * dag_tensors * dag_matmuls * rows_per_token * 2 * d**2,
    )


def training_flops(recipe: Recipe) -> float:
    """Count the FLOPs of all steps of a resolved recipe, without what activation checkpointing computes again."""
    context = recipe.data.context_length
    flops = flops_per_token(recipe.model, context, dag_tensors=len(recipe.dag.trained)).total
    return flops * recipe.trainer.max_steps * recipe.trainer.batch_size * context


def memory_estimate(
    model: ModelSection,
    context_length: int,
    micro_batch_size: int,
    *,
    precision: str = "bf16",
    fused_attention: bool = True,
    dag_tensors: int = 0,
) -> MemoryEstimate:
    """Estimate the bytes of one device in a training step without activation checkpointing; no allocator slack.

    Weights, gradients and AdamW's two moments are fp32 under both precisions: 4 + 4 + 8 bytes a parameter. bf16 is
    autocast: 2 bytes more a parameter for the cast copies. Assumed of what autograd keeps, with T = B S tokens,
    c bytes a computed number (2 in bf16, 4 in fp32) and norms and residual sums always fp32:

    - a layer: 2 inputs of the projections and of the feed-forward, q, k, v, q' and the mixed values (7 T D c), the two
      residual sums before the norms (2 T D * 4), and in the feed-forward the gate, its silu, the up branch and their
      product (4 T F c);
    - fused attention one log-sum-exp a row (T H * 4), otherwise scores and weights of all pairs (B H S^2 (4 + c));
    - learned G, R = B H d rows (times the chunks of a causal Gram): the fp32 queries of the Gram (T D * 4), for each
      GLU its input and four inner tensors (R (d + 4 a) c), for each residual unit the sum before its norm (R d * 4),
      and 8 fp32 tensors of the Gram's norm and the power stage (8 R d * 4); for each tensor under the DAG loss one fp32
      exponential (R d * 4);
    - in bf16 each linear keeps its own cast of an fp32 input: 3 T D c a layer and R d c a residual unit more;
    - once: the embedding before its norm (T D * 4) and the input of the head (T D c);
    - the loss: a chunk's log-probabilities with two gradients of them (12 min(T V, 2^25)), and the gradients that it
      finds in the forward, of the hidden states (T D c) and of the head (V D * 4).
    """
    assert precision in {"bf16", "fp32"}
    computed = 2 if precision == "bf16" else 4
    parameters = count_parameters(model)
    tokens = micro_batch_size * context_length
    width, heads, d = model.width, model.num_attention_heads, model.head_dim
    layer = tokens * width * (7 * computed + 2 * 4) + 4 * tokens * model.inner_width * computed
    layer += tokens * heads * 4 if fused_attention else tokens * context_length * heads * (4 + computed)
    layer += 3 * tokens * width * computed if precision == "bf16" else 0
    if model.learned_g:
        rows = micro_batch_size * heads * d * model.num_grams(context_length)
        glu = rows * (d + 4 * model.A_dff) * computed
        layer += tokens * width * 4 + model.num_reslayerA * (model.num_denseA * glu + rows * d * 4)
        layer += (8 + dag_tensors) * rows * d * 4
        layer += model.num_reslayerA * rows * d * computed if precision == "bf16" else 0
    return MemoryEstimate(
        parameters=4 * parameters,
        gradients=4 * parameters,
        optimizer=8 * parameters,
        cast_weights=2 * parameters if precision == "bf16" else 0,
        activations=model.num_hidden_layers * layer + tokens * width * (4 + computed),
        logits=12 * min(tokens * model.vocab_size, LOGITS_AT_ONCE) + width * (tokens * computed + 4 * model.vocab_size),
    )


def model_flops_utilisation(tokens_per_s: float, flops_per_token: float, peak_flops: float) -> float:
    """Return the share of the hardware's peak that the model's own FLOPs reach: tokens/s * FLOPs/token / peak.

    `peak_flops` is in FLOPs per second, of all devices that `tokens_per_s` counts, in the precision computed in.
    """
    if peak_flops <= 0:
        raise ValueError(f"peak_flops={peak_flops} must be greater than 0")
    return tokens_per_s * flops_per_token / peak_flops
