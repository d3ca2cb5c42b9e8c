"""Greedy decoding in batches that shrink: a row that has ended leaves, and the others no longer wait for it.

Exact up to rounding. What a model holds for likeliest in the places of a right reply's tokens is what it would write,
as far as it is right and for one token more: so replies go on from there, and from what is left of that pass.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from cpift.evaluation.likelihood import Begun, bears_gaps, has_cache, pad


@dataclass(frozen=True)
class Opening:
    """A prompt with what is written of the reply already, and how many tokens may follow."""

    prompt: list[int]
    written: list[int]
    room: int


def greedy(
    model: PreTrainedModel, rows: Sequence[Opening], ends: Collection[int], begun: Begun | None = None
) -> list[list[int]]:
    """What the model writes after each opening, the token that ends it included: at every place the likeliest token, of
    equals the lowest id. All rows go through the model in one batch.

    begun: of the same rows, where all but the last token of each opening went through the model already; from it the
    mask hides what came after. Only of models that bear gaps (`likelihood.bears_gaps`).
    """
    if not has_cache(model):
        return _by_transformers(model, rows, ends)
    rooms = [row.room for row in rows]
    if begun is not None and begun.cache is not None:
        ids = torch.tensor([row.written[-1:] for row in rows], device=model.device)
        mask = torch.cat([begun.mask, begun.mask.new_ones(len(rows), 1)], 1)
        return _decoded(model, ids, mask, mask.sum(1, keepdim=True) - 1, begun.cache, rooms, ends)
    sequences = [[*row.prompt, *row.written] for row in rows]
    mask = pad([[1] * len(row_ids) for row_ids in sequences], 0, "left", model.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    return _decoded(model, pad(sequences, 0, "left", model.device), mask, positions, cache, rooms, ends)


def cut_back(model: PreTrainedModel, begun: Begun, places: Sequence[int], surplus: Sequence[int]) -> Begun | None:
    """Of some rows of what went through the model: without the last `surplus` columns of each. None for a model that
    does not bear the gaps which that leaves."""
    if begun.cache is None or not bears_gaps(model):
        return None
    places_kept = torch.tensor(places, dtype=torch.int64, device=model.device)
    begun.cache.reorder_cache(places_kept)  # type: ignore[arg-type]  # declared LongTensor, which int64 is
    mask = begun.mask[places_kept]
    for row, count in enumerate(surplus):
        mask[row, mask.shape[1] - count :] = 0
    return Begun(begun.cache, mask)


def _decoded(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    positions: Tensor,
    cache: DynamicCache,
    rooms: Sequence[int],
    ends: Collection[int],
) -> list[list[int]]:
    """What follows `ids`, `[rows, columns]`; `mask` covers the columns of the cache too."""
    written: list[list[int]] = [[] for _ in rooms]
    open_rows = list(range(len(rooms)))
    while open_rows:
        likeliest = _likeliest(model, ids, mask, positions, cache)
        for row, token in zip(open_rows, likeliest, strict=True):
            written[row].append(token)
        stay = [
            place
            for place, (row, token) in enumerate(zip(open_rows, likeliest, strict=True))
            if token not in ends and len(written[row]) < rooms[row]
        ]
        if len(stay) < len(open_rows):
            staying = torch.tensor(stay, dtype=torch.int64, device=model.device)
            cache.reorder_cache(staying)  # type: ignore[arg-type]  # declared LongTensor, which int64 is
            mask = mask[staying]
        open_rows = [open_rows[place] for place in stay]
        ids = torch.tensor([[likeliest[place]] for place in stay], device=model.device)
        mask = torch.cat([mask, mask.new_ones(len(stay), 1)], 1)
        positions = mask.sum(1, keepdim=True) - 1
    return written


def _likeliest(model: PreTrainedModel, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> list[int]:
    """The token that follows each row. The cache gets the keys and values of `ids`."""
    logits = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    likeliest: list[int] = logits.float().argmax(-1).tolist()
    return likeliest


def _by_transformers(model: PreTrainedModel, rows: Sequence[Opening], ends: Collection[int]) -> list[list[int]]:
    """The same of a model whose state is no cache of keys and values: all rows stay to the end."""
    ids = pad([[*row.prompt, *row.written] for row in rows], 0, "left", model.device)
    mask = pad([[1] * (len(row.prompt) + len(row.written)) for row in rows], 0, "left", model.device)
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max(row.room for row in rows),
        eos_token_id=sorted(ends),
        pad_token_id=min(ends),
    )
    generated = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)  # type: ignore[operator]  # a mixin's, unknown to PreTrainedModel
    return [
        _ended(row_ids, row, ends) for row_ids, row in zip(generated[:, ids.shape[1] :].tolist(), rows, strict=True)
    ]


def _ended(written: list[int], row: Opening, ends: Collection[int]) -> list[int]:
    stop = next((place + 1 for place, token in enumerate(written) if token in ends), len(written))
    return written[: min(stop, row.room)]
