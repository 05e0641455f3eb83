"""The recipe: everything that decides a training run, as frozen, strictly typed sections.

Defaults are the papers' values (SOC and v51 models), so a recipe file lists only what differs. Strict means: `1.0` is
no whole number, `"1"` no number, `true` no 1; a whole number is accepted where a number is asked for. Lists in YAML
become tuples here. All problems of a recipe are reported in one RecipeError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WrapValidator,
    model_validator,
)

from pldr_train.metrics.catalog import DAG_TENSORS, MAX_GAP_NAT
from pldr_train.optimizers import OPTIMIZERS
from pldr_train.recipe.checks import cross_key_problems, default_warmup_steps
from pldr_train.recipe.yaml_text import (
    NAME_PATTERN,
    NO_NUL_PATTERN,
    Problem,
)

PATH_KEYS = (
    "run.dir", "model.custom_G_path", "model.init_from", "data.path", "data.tokenizer", "data.cache_dir",
    "parallel.offload_path", "parallel.deepspeed_config", "evaluate.tasks_dir",
)  # fmt: skip
"""Keys whose value is a path, in which `~` is the user's home."""


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _as_list(value: Any) -> Any:
    return (value,) if isinstance(value, str) else _as_tuple(value)


def _null_as_learned(value: Any) -> Any:
    return "learned" if value is None else value


def _bool_as_layers(value: Any) -> Any:
    return {True: "layers", False: "none"}[value] if isinstance(value, bool) else value


def _bool_as_compiled(value: Any) -> Any:
    return {True: "always", False: "never"}[value] if isinstance(value, bool) else value


def _known_optimizer(name: str) -> str:
    if name not in OPTIMIZERS:
        raise ValueError(f"no such optimizer; there are {', '.join(OPTIMIZERS)}")
    return name


def _gpu_as_cuda(value: Any) -> Any:
    return "cuda" if value == "gpu" else value


def _divides_logits(temperature: float) -> float:
    if 0 < temperature < LEAST_TEMPERATURE:
        raise ValueError(f"must be 0 (the likeliest token), or {LEAST_TEMPERATURE:g} and more")
    return temperature


def _null_as_derived(value: Any, validate: Callable[[Any], Any]) -> Any:
    return None if value is None else validate(value)


LEAST_TEMPERATURE = 1e-6
"""Logits divided by less overflow."""
GType = Literal["learned", "identity", "random", "external"]
Recomputed = Literal["none", "metric_learner", "layers"]
Compiled = Literal["never", "always", "auto"]
# The upper bounds are far above any run's values: what exceeds them is a slip, which would otherwise end in an overflow
# or a full memory somewhere else.
PositiveInt = Annotated[int, Field(ge=1, le=10**9)]
NonNegativeInt = Annotated[int, Field(ge=0, le=10**9)]
PositiveFloat = Annotated[float, Field(gt=0, le=1e9)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=1e9)]
Depth = Annotated[int, Field(ge=1, le=1000)]
Width = Annotated[int, Field(ge=1, le=2**20)]
Length = Annotated[int, Field(ge=1, le=2**24)]
Few = Annotated[int, Field(ge=0, le=10**6)]
Processes = Annotated[int, Field(ge=1, le=4096)]
Seconds = Annotated[float, Field(gt=0, le=30 * 86_400)]
"""30 days at most."""
Text = Annotated[str, Field(max_length=4096, pattern=NO_NUL_PATTERN)]
Prompt = Annotated[str, Field(max_length=100_000)]
Tag = Annotated[str, Field(min_length=1, max_length=64)]
"""W&B takes up to 64 characters."""
DocumentNumber = Annotated[int, Field(ge=0, le=2**53)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Steps = Annotated[tuple[PositiveInt, ...], BeforeValidator(_as_tuple)]
DerivedSteps = Annotated[
    int, Field(ge=1, le=10**9), WrapValidator(_null_as_derived, json_schema_input_type=PositiveInt | None)
]
"""A number that may be null, which `Recipe.resolved` replaces."""
DerivedWarmup = Annotated[
    int, Field(ge=0, le=10**9), WrapValidator(_null_as_derived, json_schema_input_type=NonNegativeInt | None)
]
DerivedStepList = Annotated[
    tuple[PositiveInt, ...],
    BeforeValidator(_as_tuple),
    WrapValidator(_null_as_derived, json_schema_input_type=Steps | None),
]
Patterns = Annotated[
    tuple[Annotated[str, Field(min_length=1, max_length=256)], ...],
    BeforeValidator(_as_list, json_schema_input_type=str | list[str]),
]
"""Names of sets of parameters (`pldr_train.parameter_sets.SETS`) or patterns over names; one alone needs no list."""
Interval = Annotated[tuple[DocumentNumber, DocumentNumber], BeforeValidator(_as_tuple)]


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys, no coercions, no infinities; docstrings describe the keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class RunSection(Section):
    """What the run is called and where it lives."""

    name: Annotated[str, Field(pattern=NAME_PATTERN, max_length=128)]
    """Name of the run; its files go to <run.dir>/<run.name>."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1234
    """Seed of the weights, of the data order and of sampling."""
    dir: Text = "runs"
    """Folder that holds the runs."""
    notes: Annotated[str, Field(max_length=100_000)] | None = None
    """What the run is for, in any words; shown in the report and on W&B."""
    tags: Annotated[tuple[Tag, ...], BeforeValidator(_as_tuple)] = ()
    """Words to find the run by on W&B, beside those that the recipe implies; shown in the report."""
    group: Annotated[str, Field(min_length=1, max_length=128, pattern=NO_NUL_PATTERN)] | None = None
    """What W&B groups the run under; null: the run's name without its seed, where it ends in that. Trials of a sweep
    have the sweep's name."""


class ModelSection(Section):
    """The PLDR-LLM's sizes and its operator G, under the published configuration's names."""

    num_hidden_layers: Annotated[int, Field(ge=1, le=10_000)] = 5
    """Decoder layers."""
    num_attention_heads: Width = 14
    """Heads H of each layer; G has a matrix for each."""
    head_dim: Width = 64
    """Width d of a head; even, for the rotary embedding turns pairs."""
    hidden_size: Width | None = None
    """num_attention_heads * head_dim; null derives it."""
    intermediate_size: Length | None = None
    """Width of the feed-forward GLU; null derives floor(8/3 * hidden_size)."""
    vocab_size: Length = 32000
    """Number of pieces of the tokenizer."""
    num_reslayerA: Depth = 8
    """Residual units of the metric learner."""
    num_denseA: Depth = 2
    """GLUs in each residual unit of the metric learner."""
    A_dff: Width = 170
    """Width of the metric learner's GLUs."""
    custom_G_type: Annotated[GType, BeforeValidator(_null_as_learned, json_schema_input_type=GType | None)] = "learned"
    """Where G_LM comes from: learned (null means the same), or a constant: identity, random or external."""
    random_distribution: Literal["uniform", "normal"] = "uniform"
    """With random only: the entries of G are uniform in [0, 1), or standard normal as in the original code's runs."""
    custom_G_path: Text | None = None
    """With external only: a safetensors file with the tensor "G" of shape (layers, heads, head_dim, head_dim), as
    `pldr-train extract-g` writes it, the original code's .pkl, the folder of a model with a predefined G, or a run's
    folder: G of its last snapshot."""
    gram_chunk_size: Length | None = None
    """Experimental, not of the papers: an integer C makes the Gram causal, each chunk of C tokens uses the G of the
    chunks before it; null sums it over the whole sequence. With learned G only."""
    reference_rope: bool = True
    """true turns interleaved pairs (0, 1), (2, 3), ...; false turns halves."""
    rope_theta: Annotated[float, Field(gt=0, le=1e15)] = 10000.0
    """Base of the rotary embedding's frequencies."""
    layer_norm_eps: Annotated[float, Field(gt=0, le=1000)] = 1e-6
    """Added to the variance in every LayerNorm."""
    attn_implementation: Literal[
        "sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4"
    ] = "sdpa"
    """How training attends. sdpa: torch's fused attention; eager: written out step by step, slower and with a matrix of
    all positions. On GPUs only, and without a matrix of all positions for data.document_mask: flex_attention, which
    torch compiles, and flash_attention_2, _3 and _4, with the package of that version and in bf16."""
    init_from: Text | None = None
    """What the run takes its initial weights from: a run (its newest whole checkpoint), a checkpoint, or a folder in
    transformers' format."""
    init_from_only: Patterns | None = None
    """Take these parameters alone from init_from, and draw the others as init says: generator, body, metric_learner,
    power_law, embedding, norms, biases, attention, feed_forward, output_head, or patterns over parameter names; null:
    all."""
    init: Literal["native", "legacy", "hf_port", "width_scaled"] = "native"
    """What initial weights are drawn from. native: the original code's present law; legacy: its W_v of before 2025-02;
    hf_port: that of its port to transformers; width_scaled: hf_port, scaled for comparing numbers of heads."""

    @property
    def width(self) -> int:
        """D = H d, the hidden size."""
        return self.num_attention_heads * self.head_dim

    @property
    def inner_width(self) -> int:
        """F, the feed-forward GLU's width."""
        return self.intermediate_size or 8 * self.width // 3

    @property
    def learned_g(self) -> bool:
        """Whether there are a metric learner and a power stage; a predefined G has neither."""
        return self.custom_G_type == "learned"

    def num_grams(self, context_length: int) -> int:
        """Return the Gram matrices of one head in a sequence of `context_length` tokens: 1, or its number of chunks."""
        return 1 if self.gram_chunk_size is None else -(-context_length // self.gram_chunk_size)


CoefficientSchedule = Literal["constant", "warmup", "decay", "window"]
LayerFactors = Annotated[tuple[Annotated[float, Field(ge=0, le=1e6)], ...], BeforeValidator(_as_tuple)]
StepInterval = Annotated[tuple[NonNegativeInt, PositiveInt], BeforeValidator(_as_tuple)]


class DagSection(Section):
    """Coefficients of the DAG loss on the deductive outputs, and their schedules; all 0: measured, not trained on."""

    A_LM: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """Coefficient of the DAG loss of the positive metric A_LM."""
    A_P: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """Coefficient of the DAG loss of the potential A_P."""
    G_LM: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """Coefficient of the DAG loss of the energy-curvature tensor G_LM."""
    every_steps: PositiveInt = 1
    """When all coefficients are 0: the losses are measured every so many steps."""
    A_LM_schedule: CoefficientSchedule = "constant"
    """The coefficient of A_LM over the steps: constant; warmup: from 0 up to it in the steps A_LM_steps; decay: from it
    down to 0; window: it in these steps, 0 outside."""
    A_P_schedule: CoefficientSchedule = "constant"
    """That of A_P."""
    G_LM_schedule: CoefficientSchedule = "constant"
    """That of G_LM."""
    A_LM_steps: StepInterval | None = None
    """[from, to) of the schedule of A_LM, in optimizer steps counted from 0; null with constant alone."""
    A_P_steps: StepInterval | None = None
    """That of A_P."""
    G_LM_steps: StepInterval | None = None
    """That of G_LM."""
    schedule_shape: Literal["linear", "cosine"] = "linear"
    """How warmup and decay go: in a straight line, or in half a cosine."""
    reduce: Literal["mean", "max"] = "mean"
    """What the loss has of the heads of a layer and sequence: their mean, as in the papers, or the largest one."""
    layer_factors: LayerFactors | None = None
    """A factor of each layer's DAG losses in the loss, in the order of the layers; null: 1 each. The losses are still
    divided by the number of layers."""

    def schedule(self, tensor: str) -> tuple[CoefficientSchedule, int, int]:
        """Return kind, first step and end of a tensor's schedule."""
        kind: CoefficientSchedule = getattr(self, f"{tensor}_schedule")
        start, stop = getattr(self, f"{tensor}_steps") or (0, 1)
        return kind, start, stop

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the tensors whose coefficient is not 0: empty where nothing is trained on."""
        return tuple(name for name in DAG_TENSORS if getattr(self, name))


class DataSection(Section):
    """The documents, the tokenizer and how token rows are packed from them."""

    source: Literal["quickstart", "hidden_class", "parquet", "jsonl", "text", "hub", "tokens"] = "parquet"
    """quickstart: a corpus built from Python's own documentation; hidden_class: one whose only uncertain word no causal
    model can predict; parquet, jsonl, text: local files; hub: a data set of the
    Hugging Face Hub, streamed; tokens: what `pldr-train data tokenize` wrote."""
    path: Text | None = None
    """Folder, file or glob of Parquet, JSONL or text files, or a folder of tokens; hub leaves it aside."""
    document_separator: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    """With text: what stands between two documents of a file, such as "\\n\\n" (a blank line) or "\\n" (each line is
    one); null: each file is one document."""
    repository: Text = "tiiuae/falcon-refinedweb"
    """With hub: the data set's name there."""
    revision: Text | None = None
    """With hub: branch, tag or commit; null is main. A run stays with the commit that it began with."""
    config: Text | None = None
    """With hub: the data set's configuration; null: its default."""
    split: Text = "train"
    """With hub: the data set's split."""
    data_files: Text | None = None
    """With hub: a pattern of file names in the repository, instead of what config and split name."""
    text_column: Text = "content"
    """Column or JSON key that holds the text; nothing else is read."""
    train_documents: Interval | None = None
    """[start, stop) of document numbers in the corpus's order; null: all."""
    validation_documents: Interval | None = None
    """[start, stop) of document numbers; null: data.validation_fraction of the training documents, which then do not
    train."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Share of the training documents that validates where data.validation_documents is null; one document at least."""
    validation_choice: Literal["spread", "last"] | None = None
    """Which of them: spread evenly over all, at places that a hash names, or the last ones in the order of the files.
    null: spread; a run that goes on keeps what it began with (last, if it was saved before there was this key)."""
    tokenizer: Text | None = None
    """SentencePiece .model file; null: the tokens' own, or one of model.vocab_size pieces trained at first use."""
    cache_dir: Text = "data/cache"
    """Folder for corpora that are built, tokenizers that are trained, and what is downloaded or copied."""
    context_length: Annotated[int, Field(ge=2, le=2**24)] = 1024
    """Tokens in a row."""
    packing: Literal["pack", "pad"] = "pack"
    """pack: documents end to end, as in the papers; pad: rows of one document each, the last filled up with id 0."""
    document_mask: bool = False
    """Not of the papers: attention and positions do not cross documents of a row. The Gram still sums over all."""
    min_document_tokens: PositiveInt | None = None
    """Shorter documents (EOS not counted) are left out; null: none."""
    max_document_tokens: PositiveInt | None = None
    """Longer documents are left out; null: none."""
    num_lanes: Width = 64
    """Independent streams that the corpus is cut into; decides the data order."""
    shuffle: bool = True
    """Documents in an order drawn from run.seed; false: in that of the files."""
    shuffle_window_documents: PositiveInt = 1000
    """Documents are permuted within windows of this many."""
    num_workers: Annotated[int, Field(ge=0, le=1024)] = 1
    """Loader processes of each device; 0 loads in the training process."""
    on_bad_shard: Literal["raise", "skip"] = "raise"
    """What cannot be read stops the run, or is left out, counted and listed."""
    retries: Annotated[int, Field(ge=0, le=1000)] = 8
    """With hub: how often a request is tried again, with growing pauses, before the run stops."""


class GroupSection(Section):
    """Parameters that are trained in a way of their own: one entry of optim.groups."""

    match: Annotated[Patterns, Field(min_length=1)]
    """What is in it, one of these or a list of them: a named set (generator, body, metric_learner, power_law,
    embedding, output_head, attention, feed_forward, norms, biases), or a pattern over parameter names such as
    "decoder.layers.0.*"."""
    name: Annotated[str, Field(pattern=NAME_PATTERN, max_length=64)] | None = None
    """What its metrics are called by; null: the named sets that it matches, or group_1, group_2, ..."""
    lr_factor: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    """Its learning rate is optim.lr times this, over the same schedule."""
    weight_decay: Annotated[float, Field(ge=0, le=1000)] | None = None
    """Its decoupled decay; null: optim.weight_decay."""
    betas: Annotated[tuple[Beta, Beta], BeforeValidator(_as_tuple)] | None = None
    """Its decay rates of the two moments; null: optim.betas."""
    eps: Annotated[float, Field(gt=0, le=1000)] | None = None
    """Its term in the denominator; null: optim.eps."""
    freeze: bool = False
    """Its parameters stay as they are: they get no gradient and no state of the optimizer."""


class OptimSection(Section):
    """The optimizer, the schedule of the learning rate, and clipping."""

    lr: Annotated[float, Field(gt=0, le=100)] = 1e-3
    """Peak learning rate."""
    betas: Annotated[tuple[Beta, Beta], BeforeValidator(_as_tuple)] = (0.9, 0.95)
    """AdamW's decay rates of the two moments."""
    eps: Annotated[float, Field(gt=0, le=1000)] = 1e-5
    """AdamW's term in the denominator."""
    weight_decay: Annotated[float, Field(ge=0, le=1000)] = 0.1
    """AdamW's decoupled decay, of all weights."""
    warmup_steps: DerivedWarmup = None  # type: ignore[assignment]
    """Steps over which the learning rate rises from 0 to its peak. null: 2,000 as in most of the papers' runs, but at
    most a tenth of trainer.max_steps."""
    final_lr_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Learning rate at trainer.max_steps as a fraction of the peak; constant leaves it aside."""
    clip_value: PositiveFloat | None = 1.0
    """Clamps every gradient entry to [-clip_value, clip_value], as the papers do; null: not."""
    clip_norm: PositiveFloat | None = None
    """Scales the gradient to at most this global norm; null: not. One of the two at most."""
    name: Annotated[str, AfterValidator(_known_optimizer)] = "adamw"
    """The optimizer. adamw: the papers'. muon: torch's Muon for weight matrices (embedding and output head aside), its
    rates matched to AdamW's by the root mean square of an update, and AdamW for all else."""
    momentum: Beta = 0.95
    """With muon: decay of the matrices' momentum."""
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    """The learning rate after the warm-up. cosine: half a cosine, as in the papers; linear: a straight line;
    wsd: at the peak until the last decay_fraction of the run, then a straight line; constant: at the peak."""
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.1
    """With wsd: the share of trainer.max_steps, at the end, in which the learning rate falls."""
    groups: Annotated[tuple[GroupSection, ...], BeforeValidator(_as_tuple), Field(max_length=100)] = ()
    """Parameters with a rate, a decay or moments of their own, or frozen ones; all others follow this section. No
    parameter may be in two of them."""


class JudgedSection(Section):
    """A metric by which validations are judged."""

    metric: Text = "val/cross_entropy"
    """A metric of validations."""
    mode: Literal["min", "max"] = "min"
    """Which of its values are the best."""

    @property
    def sign(self) -> int:
        """1 where the smaller of two values is the better one, -1 where the larger is."""
        return 1 if self.mode == "min" else -1


class EarlyStopSection(JudgedSection):
    """When a run ends before its last step: trainer.early_stop."""

    patience: PositiveInt = 5
    """The run ends after so many validations in a row without a better value than the best before them."""
    min_delta: NonNegativeFloat = 0.0
    """A value is better only if it is so by more than this."""


class TrainerSection(Section):
    """How many steps, how large a batch, on what, and validation."""

    max_steps: PositiveInt = 250_000
    """Optimizer steps; also the length of the schedule."""
    batch_size: Length = 32
    """Sequences of one optimizer step, over all processes."""
    micro_batch_size: Length | None = None
    """Sequences that one device computes at once; null: its whole share of the batch."""
    devices: Processes = 1
    """Processes on each machine, each with a device of its own; under torchrun or SLURM these say how many."""
    num_nodes: Annotated[int, Field(ge=1, le=100_000)] = 1
    """Machines."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16: autocast over fp32 weights."""
    accelerator: Annotated[
        Literal["auto", "cpu", "cuda"],
        BeforeValidator(_gpu_as_cuda, json_schema_input_type=Literal["auto", "cpu", "cuda", "gpu"]),
    ] = "auto"
    """What computes; auto: the GPU where there is one. gpu means cuda."""
    validate_every_steps: DerivedSteps = None  # type: ignore[assignment]
    """Steps between validations. null: about 21 in a run, every 12,000 steps of 250,000 as in the papers."""
    validation_rows: DerivedSteps = None  # type: ignore[assignment]
    """Rows of one validation, over all processes, whatever the micro-batch. null: one of 250 that the run trains on,
    the papers' 32,000 at 250,000 steps of 32, but 64 at least. Fewer where the validation documents end earlier."""
    threads: Processes | None = None
    """CPU threads of torch; null: torch decides."""
    compile: Annotated[Compiled, BeforeValidator(_bool_as_compiled, json_schema_input_type=Compiled | bool)] = "never"
    """Whether the decoder layer is compiled with torch.compile, once for all layers; auto: on a GPU, but for ZeRO-3.
    On a CPU compiled code is slower. true means always, false never."""
    on_nonfinite: Literal["raise", "skip", "rollback"] = "raise"
    """When a step's loss or gradient is NaN or infinite: stop; leave the step's update out; or go back to the newest
    checkpoint and go on with the documents after this step's."""
    max_nonfinite_steps: PositiveInt = 10
    """skip and rollback give up after this many such steps in a row."""
    targets: Literal["all", "last", "random_one"] = "all"
    """Which targets of each row the training's cross-entropy scores: all of them, the last one, or one that run.seed
    and the row's number draw; padding is never scored. Validations score all."""
    early_stop: EarlyStopSection | None = None
    """End the run when a metric of validations has stopped improving, such as {metric: val/cross_entropy, mode: min,
    patience: 5, min_delta: 0.001}; null: not. With a higher patience a run that ended goes on."""

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.devices * self.num_nodes


def strategy_in_force(name: str, processes: int) -> str:
    """Return the strategy that a value of `parallel.strategy` means with so many processes."""
    if name != "auto":
        return name
    return "single" if processes == 1 else "ddp"


class ParallelSection(Section):
    """How the processes of a run share it; none of this changes what is trained."""

    strategy: Literal["auto", "single", "ddp", "fsdp", "deepspeed"] = "auto"
    """auto: single for one process, ddp for several. fsdp and deepspeed shard weights or optimizer over them."""
    zero_stage: Annotated[int, Field(ge=1, le=3)] = 2
    """With deepspeed: 1 shards the optimizer, 2 also the gradients, 3 also the weights."""
    weights: Literal["fp32", "bf16"] = "fp32"
    """With deepspeed and precision bf16: bf16 keeps fp32 weights in the optimizer only (less memory and traffic)."""
    offload_optimizer: Literal["cpu", "nvme"] | None = None
    """With deepspeed: keep and step the optimizer in host memory, or (stage 3) on a fast disk."""
    offload_parameters: Literal["cpu"] | None = None
    """With deepspeed stage 3: keep the weights in host memory between their uses."""
    offload_path: Text | None = None
    """Folder on a fast disk, for nvme."""
    reduce_bucket_mib: PositiveFloat | None = None
    """Gradients are reduced in buckets of this size; null: 25 MiB with ddp; with deepspeed the model's size, at most
    5e8 elements."""
    allgather_bucket_mib: PositiveFloat | None = None
    """With deepspeed: weights are gathered in buckets of this size; null: as for gradients."""
    activation_checkpointing: Annotated[
        Recomputed, BeforeValidator(_bool_as_layers, json_schema_input_type=Recomputed | bool)
    ] = "none"
    """What is computed again in the backward instead of kept: nothing, the metric learners alone (small and deep: much
    memory for few FLOPs), or whole layers. true means layers, false none."""
    deepspeed_config: Text | None = None
    """With deepspeed: a JSON file whose keys are merged over those that the recipe gives."""
    timeout_s: Seconds = 1800.0
    """A process that makes no progress for so long ends the run with a message, instead of waiting for ever."""
    max_restarts: Few = 0
    """How often `pldr-train fit` starts all processes again from the newest checkpoint after one was killed."""

    @property
    def is_zero_3(self) -> bool:
        """Whether DeepSpeed shards the weights, too, and gathers them in the midst of a layer."""
        return self.strategy == "deepspeed" and self.zero_stage == 3


class BestSection(JudgedSection):
    """Which checkpoints are the best: checkpoint.keep_best."""

    n: PositiveInt = 1
    """How many checkpoints are kept for it."""


class CheckpointSection(Section):
    """When the run is saved and what is kept."""

    every_steps: DerivedSteps = None  # type: ignore[assignment]
    """Steps between checkpoints. null: about 62 in a run, every 4,000 steps of 250,000 as in the papers."""
    every_s: Seconds | None = 1800.0
    """Also save after this many seconds; null: not."""
    keep_last: PositiveInt = 3
    """The newest so many checkpoints are kept."""
    also_keep_steps: DerivedStepList = None  # type: ignore[assignment]
    """Checkpoints of these steps are never deleted. null: in runs of 50,000 steps and more those at 1.6, 4.8, 12.5, 25,
    37.5, 50, 70 and 90 %, in the papers' runs 4,000 to 225,000; in shorter ones none."""
    keep_best: BestSection | None = None
    """Also save at each validation, and keep the n best checkpoints by a metric of validations, such as
    {metric: leakage/sequential_nll, mode: min, n: 1}; null: not."""
    stop_deadline_s: Seconds | None = 120.0
    """After SIGTERM or Ctrl-C: how long to wait for the end of a step to save, then leave without; null: for ever."""
    async_save: bool = False
    """Train on while a checkpoint is written: training stops only to copy weights and moments to the host's memory,
    which must have room for them. A kill loses the checkpoint that is being written, as it always does."""


class LoggingSection(Section):
    """What is written down, how often, and the mirror on Weights & Biases."""

    every_steps: DerivedSteps = None  # type: ignore[assignment]
    """Steps between lines of metrics. null: 125 in a run, every 2,000 steps of 250,000 as in the papers."""
    batch_digest: bool = False
    """Also log a hash of every global batch's token ids."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online where a key is set, else offline."""
    wandb_project: Text = "pldr_train"
    """Project on Weights & Biases."""
    wandb_entity: Text | None = None
    """User or team on Weights & Biases; null: the account's default."""
    wandb_media: bool = True
    """Also log heatmaps and histograms of A, A_LM, A_P and G_LM, once for each snapshot."""
    wandb_checkpoints: bool = False
    """Also upload every checkpoint that is kept for ever, and the last, as artifacts."""
    also: Annotated[tuple[Literal["csv", "tensorboard"], ...], BeforeValidator(_as_tuple)] = ()
    """Also write the metrics for other tools into the run's folder: csv (csv/version_N), tensorboard (tensorboard/)."""
    progress: bool = True
    """Show a progress bar."""
    peak_tflops: PositiveFloat | None = None
    """Peak of one device in the run's precision, for the MFU; null: known for some GPUs, else there is no MFU."""


class MonitorSection(Section):
    """What is measured of the model beside its loss, and what is done when it reads the future."""

    deductive: bool = True
    """Metrics of A, A_LM, A_P and G_LM: the cheap ones at log steps, the costly ones at validations."""
    rows: Width = 16
    """The first so many validation rows are what validations measure the following on."""
    targets: Few = 8
    """Positions of each of these rows whose sequential NLL is taken; 0: leakage is not measured."""
    positions: Annotated[tuple[PositiveInt, ...] | None, BeforeValidator(_as_tuple)] = None
    """Measure at these positions of a row, 1 to data.context_length, instead of evenly spread ones."""
    leakage: Literal["warn", "stop"] = "warn"
    """When the gap exceeds max_gap: say so, or save and end the run as well."""
    max_gap: PositiveFloat = MAX_GAP_NAT
    """nat/token; exceeded when the lower end of the gap's 95 % interval does."""
    prompts: Few = 4
    """Rows whose first halves are continued for the order parameter; 0: it is not measured."""
    new_tokens: Width = 16
    """Of each continuation."""
    snapshots: Few = 50
    """Validations whose A, A_LM, A_P and G_LM of one row are kept as files for heatmaps; 0: none."""


TaskName = Annotated[str, Field(min_length=1, max_length=256, pattern=NO_NUL_PATTERN)]
"""A name of lm-evaluation-harness."""


class EvaluateSection(Section):
    """Tasks of lm-evaluation-harness that a run is scored on at validations; without any it is not."""

    tasks: Annotated[tuple[TaskName, ...], BeforeValidator(_as_list, json_schema_input_type=str | list[str])] = ()
    """Tasks, groups and tags; papers: the papers' eight. Their scores are eval/TASK/METRIC in the metrics."""
    every_validations: PositiveInt = 1
    """Score after every so many validations, after that of step 0 and after the last one."""
    limit: PositiveInt | None = 100
    """The first so many items of each task; null: all."""
    scoring: Literal["block", "sequential", "both"] = "sequential"
    """sequential: each token of a candidate from what stands before it; block: in one pass over context and candidate,
    which then enters a learned G (eval/TASK/block/METRIC)."""
    tasks_dir: Text | None = None
    """Folder with YAML files of tasks of one's own, which go before the stock ones."""


class SampleSection(Section):
    """The texts written at the end of a run, and on the way."""

    every_steps: PositiveInt | None = None
    """Also at the first validation at or after each multiple of so many steps; null: at the end only."""
    prompts: Annotated[tuple[Prompt, ...], BeforeValidator(_as_tuple)] = ("The",)
    """Texts that are continued; [] makes no samples."""
    max_new_tokens: Width = 64
    """Of each continuation."""
    temperature: Annotated[float, Field(ge=0, le=1e6), AfterValidator(_divides_logits)] = 1.0
    """0: always the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Tokens are drawn from the likeliest ones whose probabilities sum to this."""


class CrossCheckError(ValueError):
    """Carries the problems between keys through pydantic's ValidationError."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("; ".join(problem.text for problem in problems))
        self.problems = problems


class Recipe(Section):
    """A whole run. Build one with `load_recipe` or `recipe_from_dict`, whose errors are worded for users."""

    run: RunSection
    model: ModelSection = ModelSection()
    dag: DagSection = DagSection()
    data: DataSection = DataSection()
    optim: OptimSection = OptimSection()
    trainer: TrainerSection = TrainerSection()
    parallel: ParallelSection = ParallelSection()
    checkpoint: CheckpointSection = CheckpointSection()
    logging: LoggingSection = LoggingSection()
    monitor: MonitorSection = MonitorSection()
    evaluate: EvaluateSection = EvaluateSection()
    sample: SampleSection = SampleSection()

    @model_validator(mode="after")
    def _check_across_keys(self) -> Recipe:
        problems = cross_key_problems(self)
        if problems:
            raise CrossCheckError(problems)
        return self

    def resolved(self) -> Recipe:
        """Return the same run with every derived value filled in: sizes, micro-batch, warm-up, cadences, validation."""
        model, trainer = self.model, self.trainer
        sizes = {"hidden_size": model.hidden_size or model.width, "intermediate_size": model.inner_width}
        micro_batch_size = trainer.micro_batch_size or trainer.batch_size // trainer.world_size
        return self.model_copy(
            update={
                "model": model.model_copy(update=sizes),
                "trainer": trainer.model_copy(update={"micro_batch_size": micro_batch_size}),
            }
        )._filled(_derived_from_length(trainer.max_steps, trainer.batch_size))

    def going_on(self, saved: Recipe | None) -> Recipe:
        """Return the recipe with what it leaves open (null) as `saved` has it, the run that goes on.

        A run that begins has no `saved`; then `data.validation_choice` is settled. One that was saved before there was
        that key has `last`.
        """
        if saved is None:
            return self._filled({"data.validation_choice": "spread"})
        kept = {key: saved._value(key) for key in FOLLOW_LENGTH}
        return self._filled({**kept, "data.validation_choice": saved.data.validation_choice or "last"})

    @classmethod
    def default(cls, key: str) -> Any:
        """Return what a key has where a recipe leaves it out."""
        section, leaf = key.split(".")
        annotation = cls.model_fields[section].annotation
        assert isinstance(annotation, type)
        assert issubclass(annotation, Section)
        return annotation.model_fields[leaf].default

    def _value(self, key: str) -> Any:
        section, leaf = key.split(".")
        return getattr(getattr(self, section), leaf)

    def _filled(self, values: Mapping[str, Any]) -> Recipe:
        """Return the recipe with valid values, by dotted key, where it has null."""
        return self.replaced({key: value for key, value in values.items() if self._value(key) is None})

    def replaced(self, values: Mapping[str, Any]) -> Recipe:
        """Return the recipe with other values, by dotted key. They must be valid: nothing checks them."""
        sections: dict[str, dict[str, Any]] = {}
        for key, value in values.items():
            section, leaf = key.split(".")
            sections.setdefault(section, {})[leaf] = value
        return self.model_copy(
            update={name: getattr(self, name).model_copy(update=changes) for name, changes in sections.items()}
        )


PAPER_STEPS = 250_000
"""Steps of the papers' runs, whose cadences are the defaults."""

FOLLOW_LENGTH = (
    "optim.warmup_steps",
    "trainer.validate_every_steps",
    "trainer.validation_rows",
    "checkpoint.every_steps",
    "checkpoint.also_keep_steps",
    "logging.every_steps",
)
"""Keys that are derived from the run's length where they are null; a resumed run keeps those that it began with."""


def _derived_from_length(max_steps: int, batch_size: int) -> dict[str, Any]:
    """Return what null stands for, by key: the papers' shares of the run, exactly their numbers at their length."""

    def share(of_paper: int) -> int:
        return max(1, of_paper * max_steps // PAPER_STEPS)

    keeps = (4000, 12_000, 31_250, 62_500, 93_750, 125_000, 175_000, 225_000)
    derived = {
        "optim.warmup_steps": default_warmup_steps(max_steps),
        "trainer.validate_every_steps": share(12_000),
        "trainer.validation_rows": max(64, max_steps * batch_size // 250),
        "checkpoint.every_steps": share(4000),
        "checkpoint.also_keep_steps": tuple(map(share, keeps)) if 5 * max_steps >= PAPER_STEPS else (),
        "logging.every_steps": share(2000),
    }
    assert derived.keys() == set(FOLLOW_LENGTH)
    return derived


def entry_keys() -> dict[str, list[str]]:
    """Return the keys of the entries of those keys that are lists of mappings, by dotted key."""
    return {
        "optim.groups": list(GroupSection.model_fields),
        "trainer.early_stop": list(EarlyStopSection.model_fields),
        "checkpoint.keep_best": list(BestSection.model_fields),
    }


def recipe_keys() -> list[str]:
    """Return every dotted key of a recipe, in the order of the schema."""
    keys = []
    for section, field in Recipe.model_fields.items():
        assert isinstance(field.annotation, type)
        assert issubclass(field.annotation, Section)
        keys += [f"{section}.{name}" for name in field.annotation.model_fields]
    return keys
