"""Negative log-likelihood of token sequences under a causal language model, in batches.

Nothing goes through the model twice, and nothing for no purpose; all exact up to rounding. What all sequences of a
batch begin with (a chat template's head, a system prompt) is computed once. Sequences of one *group* start alike (the
replies to one prompt): what they share beyond that is computed once as well, its key-value cache serves every one of
them, and its last logits the first token of each. Sequences end before the last token that is scored, which nothing
follows. And logits are computed only in columns that predict a labelled token: with 49 k words in the vocabulary they
cost as much as several layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from cpift.data.tokenise import IGNORED, Labelled


@dataclass(frozen=True)
class Likelihood:
    """Of one sequence: the sum of −ln P(token | tokens before it) over its labelled tokens, in nats, and the token that
    the model itself holds for likeliest (of equals the lowest id) in the place of each of them."""

    nll: float
    likeliest: list[int]


@dataclass(frozen=True)
class Begun:
    """The beginnings of a batch's rows, gone through the model: their keys and values (None: nothing has), which of
    these are no padding, `[rows, columns]`, and the logits of what follows each, `[rows, words]`."""

    cache: DynamicCache | None
    mask: Tensor
    following: Tensor | None = None


def likelihoods(model: PreTrainedModel, groups: Sequence[Sequence[Labelled]]) -> list[list[Likelihood]]:
    """The likelihood of each sequence of each group.

    All groups go through the model in one batch; `groups` must hold no empty group, and each sequence a label.
    """
    distinct = [[sequence for place, sequence in enumerate(group) if sequence not in group[:place]] for group in groups]
    values = iter(_scored(model, distinct)[0])
    known = [[(sequence, next(values)) for sequence in group] for group in distinct]
    return [
        [next(likelihood for other, likelihood in scored if other == sequence) for sequence in group]
        for group, scored in zip(groups, known, strict=True)
    ]


def likelihoods_begun(model: PreTrainedModel, sequences: Sequence[Labelled]) -> tuple[list[Likelihood], Begun]:
    """The likelihood of each sequence, and all of them but what comes from the last labelled token on, gone through the
    model: the last columns of the mask are each one's last tokens, or padding after these where none may be between."""
    return _scored(model, [[sequence] for sequence in sequences])


def _scored(model: PreTrainedModel, groups: Sequence[Sequence[Labelled]]) -> tuple[list[Likelihood], Begun]:
    """Of every sequence of every group, and what the last pass left."""
    trunk = _trunk([sequence for group in groups for sequence in group]) if bears_gaps(model) else 0
    lengths = [max(trunk, _shared_prefix(group)) if shares_beginnings(model) else 0 for group in groups]
    begun = _begin_groups(model, groups, lengths, trunk)
    rows = [row for row, group in enumerate(groups) for _ in group]
    return _of_members(model, [sequence for group in groups for sequence in group], rows, lengths, begun)


def has_cache(model: PreTrainedModel) -> bool:
    """Whether what a model keeps of what it has read is one cache of which rows can be taken out."""
    return not model._is_stateful and bool(model._supports_default_dynamic_cache())  # type: ignore[operator]  # torch: any attribute is a Tensor or a Module


def shares_beginnings(model: PreTrainedModel) -> bool:
    """Whether several tokens at once may follow what a model has read: all that it keeps are keys and values."""
    recurrent = LinearAttentionCacheLayerMixin
    return has_cache(model) and not any(isinstance(layer, recurrent) for layer in _layers(model))


def _layers(model: PreTrainedModel) -> list[Any]:
    return list(DynamicCache(config=model.config).layers)


def bears_gaps(model: PreTrainedModel) -> bool:
    """Whether padding may lie within a row, not only at its ends: every layer attends to all that the mask leaves, and
    is told positions. A sliding window counts columns, and a recurrent layer goes over each of them."""
    places_known = "position_ids" in inspect.signature(model.forward).parameters
    return places_known and has_cache(model) and all(type(layer) is DynamicLayer for layer in _layers(model))


def begin(model: PreTrainedModel, ids: Sequence[int], rows: int) -> Begun:
    """What so many rows begin with, computed once; no ids: rows of which nothing is computed yet."""
    if not ids:
        return Begun(None, torch.zeros(rows, 0, dtype=torch.int64, device=model.device))
    cache = DynamicCache(config=model.config)
    model(
        input_ids=torch.tensor([list(ids)], device=model.device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    cache.batch_repeat_interleave(rows)
    return Begun(cache, torch.ones(rows, len(ids), dtype=torch.int64, device=model.device))


def pad(rows: Sequence[Sequence[int]], value: int, side: str, device: torch.device) -> Tensor:
    """`[len(rows), longest]` int64 tensor of the rows, filled up with `value` on the `side` "left" or "right"."""
    width = max(len(row) for row in rows)
    filled = [
        [value] * (width - len(row)) + list(row) if side == "left" else list(row) + [value] * (width - len(row))
        for row in rows
    ]
    return torch.tensor(filled, dtype=torch.int64, device=device)


def common_start(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False)))


def _trunk(sequences: Sequence[Labelled]) -> int:
    """How many tokens a whole batch shares, less the last before a label: it is in each row, for what it predicts."""
    first = min(sequence.first_label() for sequence in sequences)
    return max(0, min(common_start([sequence.ids for sequence in sequences]), first - 1)) if len(sequences) > 1 else 0


def _shared_prefix(group: Sequence[Labelled]) -> int:
    """How many tokens before their labels all sequences of a group share."""
    if len(group) == 1:
        return 0
    return min(common_start([sequence.ids for sequence in group]), min(sequence.first_label() for sequence in group))


def _begin_groups(
    model: PreTrainedModel, groups: Sequence[Sequence[Labelled]], lengths: Sequence[int], trunk: int
) -> Begun:
    """The first `lengths` tokens of every group, padded on the left after the first `trunk`, which all have in common.

    What follows a group that has no more than these is not computed, and no label of it lies there.
    """
    begun = begin(model, groups[0][0].ids[:trunk], len(groups))
    if max(lengths) == trunk:
        return begun
    prefixes = [group[0].ids[trunk:length] for group, length in zip(groups, lengths, strict=True)]
    own_mask = pad([[1] * len(prefix) for prefix in prefixes], 0, "left", model.device)
    mask, cache = torch.cat([begun.mask, own_mask], 1), begun.cache or DynamicCache(config=model.config)
    logits = model(
        input_ids=pad(prefixes, 0, "left", model.device),
        attention_mask=mask,
        position_ids=(trunk + own_mask.cumsum(1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits
    return Begun(cache, mask, logits[:, -1])


def _of_members(
    model: PreTrainedModel, members: Sequence[Labelled], rows: Sequence[int], lengths: Sequence[int], begun: Begun
) -> tuple[list[Likelihood], Begun]:
    """Of each sequence; `rows`: which row of `begun` it goes on from, after so many of its tokens."""
    starts = [lengths[row] for row in rows]
    of_rows, wanted, ended = _suffixes(model, members, rows, starts, begun)
    values = []
    for place, (member, row, start) in enumerate(zip(members, rows, starts, strict=True)):
        logits, targets = of_rows[place], wanted[place]
        if begun.following is not None and member.labels[start] != IGNORED:
            logits = torch.cat([begun.following[row][None], logits])
            targets = torch.cat([targets.new_tensor([member.labels[start]]), targets])
        values.append(_of_row(logits, targets))
    return values, ended


def _suffixes(
    model: PreTrainedModel, members: Sequence[Labelled], rows: Sequence[int], starts: Sequence[int], begun: Begun
) -> tuple[Tensor, Tensor, Begun]:
    """`[members, columns, words]` logits after the beginnings, and the labels that they predict, `[members, columns]`.

    Padded on the left where a row may have gaps: answers end together, in fewer columns.
    """
    parts = [(member, start, member.last_label()) for member, start in zip(members, starts, strict=True)]
    side = "left" if begun.cache is None or bears_gaps(model) else "right"
    target = pad([member.labels[start + 1 : end + 1] for member, start, end in parts], IGNORED, side, model.device)
    columns = (target != IGNORED).any(0).nonzero().squeeze(1)
    if not len(columns):
        assert begun.following is not None  # where else the labels would be
        return begun.following.new_zeros(len(members), 0, begun.following.shape[1]), target[:, columns], begun
    own_mask = pad([[1] * (end - start) for _, start, end in parts], 0, side, model.device)
    chosen = torch.tensor(rows, device=model.device)
    cache = begun.cache or (DynamicCache(config=model.config) if has_cache(model) else None)
    if begun.cache is not None and len(members) > len(begun.mask):
        begun.cache.batch_select_indices(chosen)
    mask = torch.cat([begun.mask[chosen], own_mask], 1)
    offset = torch.tensor(starts, device=model.device)[:, None]
    logits = model(
        input_ids=pad([member.ids[start:end] for member, start, end in parts], 0, side, model.device),
        attention_mask=mask,
        position_ids=(offset + own_mask.cumsum(1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=columns,
    ).logits
    return logits, target[:, columns], Begun(cache, mask)


def _of_row(logits: Tensor, wanted: Tensor) -> Likelihood:
    """From `[columns, words]` logits. Row by row: the float32 copy of all rows' logits at once would be the largest
    tensor of the whole evaluation."""
    places = wanted != IGNORED
    scored = logits[places].float()
    nll = cross_entropy(scored, wanted[places], reduction="none").double().sum()
    return Likelihood(float(nll), scored.argmax(-1).tolist())
