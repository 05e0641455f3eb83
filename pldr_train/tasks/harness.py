"""A PLDR-LLM as a model of lm-evaluation-harness. Imports `lm_eval`, which the extra `eval` installs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from pldr_train.errors import DataError
from pldr_train.model import PldrllmForCausalLM
from pldr_train.tasks.scoring import Row, Scoring, is_causal, padded_left, score_rows

_MOST_NEW_TOKENS = 256
"""Of a generation whose task names no number; half of a context that is shorter than twice that."""


class HarnessModel(TemplateLM):
    """A model whose continuations are scored, and texts continued, by one scoring.

    No piece is added to a text, but for the end of a document where there is no context, as training has it. Context
    and continuation are tokenised together. A request longer than the model's context loses its beginning. A batch
    gives each request what it gives alone.

    Args:
        model: in eval mode.
        tokenizer: in transformers' form.
        scoring: of likelihoods, see `tasks.scoring`. Generation with `block` keeps K, V and the prompt's G in a cache,
            with `sequential` each token comes from a pass over all before it.
        batch_size: sequences in a pass.
        together: other processes generate the same, and a pass needs them all.
    """

    def __init__(
        self,
        model: PldrllmForCausalLM,
        tokenizer: Any,
        scoring: Scoring,
        batch_size: int = 32,
        together: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.scoring: Scoring = scoring
        self.batch_size, self._together = batch_size, together
        self.max_length = int(model.config.max_position_embeddings)
        self.truncated = 0
        """Requests that lost their beginning."""

    @property
    def eot_token_id(self) -> int:
        """The end of a document, which also stands for an empty context."""
        return int(self.model.config.eos_token_id)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the ids of a text, without special ones."""
        ids: list[int] = self.tokenizer(string, add_special_tokens=False)["input_ids"]
        return ids

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Score each request's continuation after its context.

        Returns:
            Log-likelihood in nats, and whether each token was the likeliest.

        Raises:
            DataError: a continuation has no token, or more than the model's context.
        """
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> Sequence[tuple[float, bool]]:
        rows = [self._row(context, continuation, texts) for texts, context, continuation in requests]
        return list(score_rows(self.model, rows, self.scoring, self.batch_size))

    def _row(self, context: Sequence[int], continuation: Sequence[int], texts: tuple[str, str]) -> Row:
        if not 0 < len(continuation) <= self.max_length:
            raise DataError(
                f"the continuation {texts[1][:60]!r} has {len(continuation)} tokens after {texts[0][-60:]!r}, and the "
                f"model's context takes 1 to {self.max_length}; leave the item out of the task"
            )
        ids = (*context, *continuation)
        self.truncated += len(ids) > self.max_length + 1
        return Row(ids[-(self.max_length + 1) :], len(continuation))

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[float]:
        """Return the log-likelihood in nats of each whole text, cut into windows of the model's context.

        The first token is predicted from the end of a document.
        """
        owners: list[int] = []
        rows: list[Row] = []
        for number, (text,) in enumerate(request.args for request in requests):
            windows = get_rolling_token_windows(self.tok_encode(text), self.eot_token_id, self.max_length, 1)
            for context, scored in map(make_disjoint_window, windows):
                owners.append(number)
                rows.append(Row((*context, *scored), len(scored)))
        sums = [0.0] * len(requests)
        for owner, score in zip(owners, score_rows(self.model, rows, self.scoring, self.batch_size), strict=True):
            sums[owner] += score.log_likelihood
        return sums

    @torch.no_grad()
    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[str]:
        """Continue each request's context until one of its stops, the end of a document, or its number of tokens.

        Raises:
            DataError: a task asks for as many new tokens as the model's context has.
        """
        texts: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        for numbers in groups.values():
            contexts = {number: self._prompt(requests[number]) for number in numbers}
            order = sorted(numbers, key=lambda number: -len(contexts[number]))
            for start in range(0, len(order), self.batch_size):
                part = order[start : start + self.batch_size]
                found = self._generate([contexts[number] for number in part], requests[part[0]].args[1])
                texts |= dict(zip(part, found, strict=True))
        return [texts[number] for number in range(len(requests))]

    def _settings(self, kwargs: dict[str, Any]) -> tuple[list[str], int, dict[str, Any]]:
        """Return the stops, the number of new tokens, and what else `generate` takes."""
        settings: dict[str, Any] = dict(normalize_gen_kwargs(kwargs, min(_MOST_NEW_TOKENS, self.max_length // 2)))
        stops = handle_stop_sequences(settings.pop("until", None), eos=None)
        new_tokens = int(settings.pop("max_gen_toks"))
        if new_tokens >= self.max_length:
            raise DataError(
                f"max_gen_toks={new_tokens} of the task's generation_kwargs leaves no room for a prompt in the model's "
                f"context of {self.max_length} tokens; lower it"
            )
        if not settings.get("do_sample"):
            settings = {"do_sample": False}
        return stops, new_tokens, settings

    def _prompt(self, request: Instance) -> list[int]:
        text, kwargs = request.args
        room = self.max_length - self._settings(kwargs)[1]
        ids = self.tok_encode(text) or [self.eot_token_id]
        self.truncated += len(ids) > room
        return ids[-room:]

    def _generate(self, contexts: Sequence[Sequence[int]], kwargs: dict[str, Any]) -> list[str]:
        stops, new_tokens, settings = self._settings(kwargs)
        ids, mask = padded_left(contexts, self.model.device)
        length = ids.shape[1]
        generated = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids) if mask is None else mask,
            max_new_tokens=new_tokens,
            eos_token_id=self.eot_token_id,
            use_cache=self.scoring == "block" or is_causal(self.model),
            synced_gpus=self._together,
            stopping_criteria=StoppingCriteriaList([_AtStops(self.tokenizer, stops, length)]),
            **settings,
        )
        texts = self.tokenizer.batch_decode(generated[:, length:], skip_special_tokens=True)
        return [postprocess_generated_text(text, stops, None) for text in texts]


class _AtStops(StoppingCriteria):
    """Ends a sequence whose new text holds one of the stops."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], prompt_length: int) -> None:
        self._tokenizer, self._stops, self._start = tokenizer, [stop for stop in stops if stop], prompt_length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        texts = self._tokenizer.batch_decode(input_ids[:, self._start :], skip_special_tokens=True)
        found = [any(stop in text for stop in self._stops) for text in texts]
        return torch.tensor(found, device=input_ids.device)
