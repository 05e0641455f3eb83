"""Configuration of a PLDR-LLM, with the published keys and defaults."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

PREDEFINED_G_TYPES = ("identity", "random", "external")
RANDOM_DISTRIBUTIONS = ("uniform", "normal")
_POSITIVE_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "num_reslayerA",
    "num_denseA",
    "A_dff",
)


class PldrllmConfig(PreTrainedConfig):
    """Sizes and switches of a PLDR-LLM; the defaults are the published 110M-parameter model.

    Args:
        vocab_size: number of tokens the embedding and the output head know.
        hidden_size: width D of the residual stream; must equal `num_attention_heads * head_dim`.
        intermediate_size: inner width of the feed-forward GLU; `None` means floor(8/3 * hidden_size).
        num_hidden_layers: number of decoder layers.
        num_attention_heads: number of heads H.
        head_dim: width d of a head; `None` means hidden_size / num_attention_heads. Must be even (rotary pairs).
        num_reslayerA: residual units of the metric learner.
        num_denseA: gated linear units in each residual unit.
        A_dff: inner width of those gated linear units; `None` means floor(8/3 * head_dim).
        custom_G_type: `None` learns G_LM from the queries; `"identity"`, `"random"` and `"external"` replace it by a
            constant (H, d, d) per layer, and the metric learner does not exist.
        random_distribution: with `custom_G_type="random"`, what the entries of G are drawn from: `"uniform"` in [0, 1),
            or the standard `"normal"` of the original code's runs.
        reference_rope: `True` rotates interleaved pairs (0,1), (2,3), ... as the papers do; `False` rotates halves.
        gram_chunk_size: `None` sums the Gram over the whole sequence, as the papers do; an integer C makes it causal:
            queries of each chunk of C tokens use the G of the chunks before it. Experimental, not of the papers.
        cache_first_G: cache the G of the batch's first sample only and use it for all samples after the first pass.
        output_pldr_attentions: return the published tuple of deductive outputs and parameters of every layer.
        classifier_dropout: dropout before the head of token classification; `None` is 0.
        rope_theta: the rotary base, 10,000 unless set; the same as `rope_parameters["rope_theta"]`, and stored as both.
        rope_scaling: `None`; a scaled rotary embedding is not supported.
        initializer_range: a published key without effect; the initialisation is the papers'.
        max_position_embeddings, layer_norm_eps, attention_bias, glu_bias, final_bias, attention_dropout,
            hidden_act, use_cache, and the special ids: as everywhere in transformers.

    Raises:
        ValueError: sizes that are no positive integers or do not fit each other, an odd `head_dim`, an unknown
            `custom_G_type` or `random_distribution`, a `gram_chunk_size` that is no positive integer or stands beside a
            predefined G or `cache_first_G`, a scaled RoPE, two different rotary bases, another activation, tied
            embeddings.
    """

    model_type = "pldrllm"
    keys_to_ignore_at_inference = ["past_key_values", "pldr_attentions", "deductive_outputs"]  # noqa: RUF012

    # A size of None is replaced by its derived value in __post_init__.
    vocab_size: int = 32000
    hidden_size: int = 896
    intermediate_size: int = None  # type: ignore[assignment]
    num_hidden_layers: int = 5
    num_attention_heads: int = 14
    head_dim: int = None  # type: ignore[assignment]
    hidden_act: str = "silu"
    max_position_embeddings: int = 1024
    layer_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 2
    eos_token_id: int | list[int] | None = 3
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = True
    glu_bias: bool = True
    final_bias: bool = True
    attention_dropout: int | float | None = 0.0
    reference_rope: bool = True
    num_reslayerA: int = 8
    num_denseA: int = 2
    A_dff: int = None  # type: ignore[assignment]
    custom_G_type: str | None = None
    random_distribution: str = "uniform"
    gram_chunk_size: int | None = None
    cache_first_G: bool = False
    output_pldr_attentions: bool = False
    classifier_dropout: float | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_rope(kwargs.get("rope_theta"), kwargs.get("rope_scaling"))
        if self.head_dim is None:
            self._check_positive(("hidden_size", "num_attention_heads"))
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads="
                    f"{self.num_attention_heads}; change one of them"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = 8 * self.hidden_size // 3
        if self.A_dff is None:
            self.A_dff = 8 * self.head_dim // 3
        super().__post_init__(**kwargs)
        self._check_positive(_POSITIVE_SIZES)
        self._check_sizes()
        self._check_choices()
        self._check_gram()

    def _check_positive(self, keys: tuple[str, ...]) -> None:
        for key in keys:
            value = getattr(self, key)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{key}={value!r} must be a positive integer")

    def _check_sizes(self) -> None:
        if self.hidden_size != self.num_attention_heads * self.head_dim:
            raise ValueError(
                f"hidden_size={self.hidden_size} must equal num_attention_heads * head_dim = "
                f"{self.num_attention_heads} * {self.head_dim} = {self.num_attention_heads * self.head_dim}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary embeddings rotate pairs")

    def _check_choices(self) -> None:
        if self.custom_G_type is not None and self.custom_G_type not in PREDEFINED_G_TYPES:
            raise ValueError(
                f"custom_G_type={self.custom_G_type!r} is unknown; use None (learned) or one of {PREDEFINED_G_TYPES}"
            )
        if self.random_distribution not in RANDOM_DISTRIBUTIONS:
            raise ValueError(
                f"random_distribution={self.random_distribution!r} is unknown; use one of {RANDOM_DISTRIBUTIONS}"
            )
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act={self.hidden_act!r} is not supported; PLDR-LLM uses 'silu'")
        if self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings=True is not supported; PLDR-LLM has an output head of its own")

    def _check_rope(self, theta: Any, scaling: Any) -> None:
        """Refuse what would otherwise be dropped without a word: a scaled RoPE, and a second base beside the first."""
        for name, value in (("rope_scaling", scaling), ("rope_parameters", self.rope_parameters)):
            if value is not None and not isinstance(value, dict):
                raise ValueError(f"{name}={value!r} is not supported: PLDR-LLM's RoPE is not scaled; set it to None")
            parameters: dict[str, Any] = value or {}
            kind = parameters.get("rope_type", parameters.get("type", "default"))
            if kind != "default":
                raise ValueError(f"{name}.rope_type={kind!r} is not supported; PLDR-LLM uses 'default'")
            others = sorted(parameters.keys() - {"rope_type", "type", "rope_theta"})
            if others and parameters[others[0]] is not None:
                raise ValueError(
                    f"{name}.{others[0]}={parameters[others[0]]!r} is not supported: PLDR-LLM's RoPE has no parameter "
                    "but rope_theta; remove it"
                )
            base = parameters.get("rope_theta")
            if theta is not None and base is not None and base != theta:
                raise ValueError(f"rope_theta={theta!r} contradicts {name}.rope_theta={base!r}; set both to the same")

    def to_dict(self) -> dict[str, Any]:
        """Return all keys, also the published ones that transformers 5 keeps within `rope_parameters` alone.

        The original code reads `rope_theta`, and takes 10,000 where it is missing.
        """
        values: dict[str, Any] = super().to_dict()
        return values | {"rope_theta": self.rope_theta, "rope_scaling": None}

    def _check_gram(self) -> None:
        if self.gram_chunk_size is None:
            return
        self._check_positive(("gram_chunk_size",))
        if self.custom_G_type is not None:
            raise ValueError(
                f"gram_chunk_size={self.gram_chunk_size} has no effect with custom_G_type={self.custom_G_type!r}: a "
                "predefined G is made from no Gram matrix; set gram_chunk_size=None"
            )
        if self.cache_first_G:
            raise ValueError(
                f"cache_first_G=True contradicts gram_chunk_size={self.gram_chunk_size}: with a causal Gram every "
                "sample needs its own G; set one of them to its default"
            )

    @property
    def rope_theta(self) -> float:
        """The rotary base; setting it sets that of `rope_parameters`."""
        return float((self.rope_parameters or {}).get("rope_theta", 10000.0))

    @rope_theta.setter
    def rope_theta(self, value: float) -> None:
        self.rope_parameters = {"rope_type": "default", "rope_theta": float(value)}


__all__ = ["PREDEFINED_G_TYPES", "RANDOM_DISTRIBUTIONS", "PldrllmConfig"]
