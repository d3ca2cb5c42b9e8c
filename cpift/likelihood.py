"""Negative log-likelihood of token sequences under a causal language model, in batches.

Two economies, both exact up to rounding. Sequences of one *group* start alike (the replies to one prompt): their common
prefix goes through the model once, and its key-value cache serves every one of them. And logits are computed only in
columns that predict a labelled token: with 49 k words in the vocabulary they cost as much as several layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel

from cpift.tokens import IGNORED


@dataclass(frozen=True)
class Labelled:
    """Token ids, and labels of the same length: the id itself where the model is scored on it, −100 elsewhere."""

    ids: list[int]
    labels: list[int]

    def first_label(self) -> int:
        """Index of the first scored token."""
        return next(i for i, label in enumerate(self.labels) if label != IGNORED)

    def scored(self) -> int:
        """Number of tokens that are scored. The first token is never: nothing predicts it."""
        return sum(label != IGNORED for label in self.labels[1:])


def sequence_nll(model: PreTrainedModel, groups: Sequence[Sequence[Labelled]]) -> list[list[float]]:
    """Sum of −ln P(token | tokens before it), in nats, over the labelled tokens of each sequence of each group.

    All groups go through the model in one batch; `groups` must hold no empty group, and each sequence a label.
    """
    lengths = [_shared_prefix(group) for group in groups]
    cache, prefix_mask = _prefix_cache(model, groups, lengths)
    members = [(row, sequence) for row, group in enumerate(groups) for sequence in group]
    rows = torch.tensor([row for row, _ in members], device=model.device)
    starts = [lengths[row] for row, _ in members]
    if cache is not None:
        cache.batch_select_indices(rows)
    sums = _suffix_nll(model, [sequence for _, sequence in members], starts, cache, prefix_mask[rows])
    remaining = iter(sums)
    return [[next(remaining) for _ in group] for group in groups]


def pad(rows: Sequence[Sequence[int]], value: int, side: str, device: torch.device) -> Tensor:
    """`[len(rows), longest]` int64 tensor of the rows, filled up with `value` on the `side` "left" or "right"."""
    width = max(len(row) for row in rows)
    filled = [
        [value] * (width - len(row)) + list(row) if side == "left" else list(row) + [value] * (width - len(row))
        for row in rows
    ]
    return torch.tensor(filled, dtype=torch.int64, device=device)


def _shared_prefix(group: Sequence[Labelled]) -> int:
    """How many tokens of a group to compute once: those all share, less the last, which predicts the first label."""
    if len(group) == 1:
        return 0
    first = min(sequence.first_label() for sequence in group)
    columns = zip(*(sequence.ids[:first] for sequence in group), strict=True)
    shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    return max(0, shared - 1)


def _prefix_cache(
    model: PreTrainedModel, groups: Sequence[Sequence[Labelled]], lengths: Sequence[int]
) -> tuple[DynamicCache | None, Tensor]:
    """The cache of every group's prefix, padded on the left, and its mask `[groups, longest prefix]`."""
    if max(lengths) == 0:
        return None, torch.zeros(len(groups), 0, dtype=torch.int64, device=model.device)
    prefixes = [group[0].ids[:length] for group, length in zip(groups, lengths, strict=True)]
    mask = pad([[1] * length for length in lengths], 0, "left", model.device)
    cache = DynamicCache(config=model.config)
    model(
        input_ids=pad(prefixes, 0, "left", model.device),
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return cache, mask


def _suffix_nll(
    model: PreTrainedModel,
    sequences: Sequence[Labelled],
    starts: Sequence[int],
    cache: DynamicCache | None,
    prefix_mask: Tensor,
) -> list[float]:
    """What follows each sequence's prefix. Without one, padding goes left: answers end together, in fewer columns."""
    side = "left" if cache is None else "right"
    suffixes = [sequence.ids[start:] for sequence, start in zip(sequences, starts, strict=True)]
    targets = [[*sequence.labels[start + 1 :], IGNORED] for sequence, start in zip(sequences, starts, strict=True)]
    own_mask = pad([[1] * len(suffix) for suffix in suffixes], 0, side, model.device)
    target = pad(targets, IGNORED, side, model.device)
    columns = (target != IGNORED).any(0).nonzero().squeeze(1)
    offset = torch.tensor(starts, device=model.device)[:, None]
    logits = model(
        input_ids=pad(suffixes, 0, side, model.device),
        attention_mask=torch.cat([prefix_mask, own_mask], 1),
        position_ids=(offset + own_mask.cumsum(1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=columns,
    ).logits
    # Row by row: the float32 copy of all rows' logits at once would be the largest tensor of the whole evaluation.
    return [
        float(cross_entropy(row.float(), wanted, ignore_index=IGNORED, reduction="none").double().sum())
        for row, wanted in zip(logits, target[:, columns], strict=True)
    ]
