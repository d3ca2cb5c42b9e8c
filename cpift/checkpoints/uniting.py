"""`fusion.vocabulary` by tokens: which rows every model has, and the small files of what comes out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.lora_config import ADAPTER_CONFIG
from cpift.checkpoints.united import MISSING, PADDING, Rows, UnitedCheckpoint
from cpift.checkpoints.vocabulary import token_tensors
from cpift.config.fusion import THETA0, ZERO, FusionConfig, TokenConfig
from cpift.errors import CheckpointError, Problem, entry
from cpift.pretrained.tokens import (
    FILE,
    Tokens,
    differences_told,
    further,
    plain_flags,
    read_tokens,
    rows_for,
    tokenizer_files,
)

KEPT = {"union": THETA0, "pretrained": THETA0}  # `fusion.vocabulary` by tokens → whose tokenizer; else that task's
BEFORE = {"pretrained": True, "mean": False}  # `fusion.missing_tokens` → whether θ0's row goes before a mean
_ID = "_token_id"  # how fields of config.json end that number a token


@dataclass(frozen=True)
class _Model:
    checkpoint: Checkpoint
    tokens: Tokens
    rows: int

    def row_of(self, token: str) -> int:
        """MISSING where it has no row for a token."""
        number = self.tokens.numbers.get(token, MISSING)
        return number if number < self.rows else MISSING


def united(
    base: Checkpoint, tuned: Mapping[str, Checkpoint], config: FusionConfig
) -> tuple[Checkpoint, dict[str, Checkpoint]]:
    """θ0 and fine-tunes with the vocabulary of a config. Raises CheckpointError with what keeps them apart."""
    names = tuple(sorted(token_tensors(base)))
    models = _models(base, tuned, names)
    kept, made = _made(models, config)
    rows = rows_for(list(made.numbers.values()), config.pad_to_multiple_of)
    given = _given(models, made, config)
    order, forced = list(models), {made.numbers[token] for token, one in config.tokens.items() if one.force}
    checkpoints = [model.checkpoint for model in models.values()]
    by_number = {row: [(order.index(label), at) for label, at in parts] for row, parts in given.items()}
    files = _files(models, kept, made, rows)

    def of(label: str, rewritten: Mapping[str, Any] | None = None) -> Checkpoint:
        own = np.full(rows, PADDING, np.int64)
        for token, number in made.numbers.items():
            own[number] = MISSING if number in forced else models[label].row_of(token)
        tokens = made.numbers if rewritten is not None else None
        return UnitedCheckpoint(models[label].checkpoint, Rows(own, by_number, names), checkpoints, rewritten, tokens)

    return of(THETA0, files), {label: of(label) for label in tuned}


def _models(base: Checkpoint, tuned: Mapping[str, Checkpoint], names: tuple[str, ...]) -> dict[str, _Model]:
    if not names:
        problem = Problem("config.json", "names no class with embeddings of tokens", "give models with a config.json")
        raise CheckpointError(f"model {base.folder}", [problem])
    found = {}
    for label, model in {THETA0: base, **tuned}.items():
        if lacking := [name for name in names if name not in model.tensors]:
            what = f"is not in {label}, and rows of tokens are taken of it"
            raise CheckpointError(f"model {model.folder}", [Problem(lacking[0], what, "use fine-tunes of one model")])
        found[label] = _Model(model, read_tokens(_speaks(model, base).folder), model.tensors[names[0]].shape[0])
    return found


def _speaks(model: Checkpoint, base: Checkpoint) -> Checkpoint:
    """The model that has its tokenizer: an adapter without one speaks as θ0 does."""
    silent = (model.folder / ADAPTER_CONFIG).is_file() and not (model.folder / FILE).is_file()
    return base if silent else model


def _made(models: Mapping[str, _Model], config: FusionConfig) -> tuple[str, Tokens]:
    """Whose tokenizer is kept, and what it becomes."""
    kept = KEPT.get(config.vocabulary, config.vocabulary)
    made = models[kept].tokens
    if config.vocabulary == "union":
        for model in models.values():
            made = made.with_added(further(made, model.tokens, model.rows))
    made = made.with_added({token: plain_flags() for token in config.tokens if token not in made.numbers})
    models[kept].tokens.require_named()
    made.require_numbers()
    return kept, made


def _given(models: Mapping[str, _Model], made: Tokens, config: FusionConfig) -> dict[int, list[tuple[str, int]]]:
    """By row, whose rows a model gets that lacks it: by the config, else θ0's or the fine-tunes' that have it."""
    found: dict[int, list[tuple[str, int]]] = {}
    problems: list[Problem] = []
    before = entry(BEFORE, config.missing_tokens, "fusion.missing_tokens")
    for token, number in made.numbers.items():
        asked = config.tokens.get(token)
        if asked is not None and asked.source is not None:
            found[number] = list(_asked(models, token, asked, problems))
            continue
        having = {label: row for label, model in models.items() if (row := model.row_of(token)) != MISSING}
        if len(having) == len(models):
            continue
        first = having.pop(THETA0, MISSING)
        only_first = first != MISSING and (before or not having)
        found[number] = [(THETA0, first)] if only_first else list(having.items())
    if problems:
        raise CheckpointError("fusion.tokens", problems)
    return found


def _asked(
    models: Mapping[str, _Model], token: str, asked: TokenConfig, problems: list[Problem]
) -> Iterator[tuple[str, int]]:
    if asked.source == ZERO or asked.source is None:
        return
    model = models[asked.source]
    row = asked.token_id if asked.token_id is not None else model.row_of(asked.token or token)
    if 0 <= row < model.rows:
        yield asked.source, row
        return
    what = f"asks for {asked.token or token!r} of {asked.source}, which has no such token"
    if asked.token_id is not None:
        what = f"asks for row {asked.token_id} of {asked.source}, which has {model.rows:,}"
    problems.append(Problem(f"fusion.tokens.{token}", what, "name a model that has it, or another of its tokens"))


def _files(models: Mapping[str, _Model], kept: str, made: Tokens, rows: int) -> dict[str, Any]:
    base, speaks = models[THETA0].checkpoint, models[kept]
    config = with_rows(base.config, rows)
    if kept != THETA0:
        config = _with_ids(config, speaks.checkpoint.config)
    files = tokenizer_files(speaks.tokens, made, moved=speaks.tokens.folder != models[THETA0].tokens.folder)
    return {**files, "config.json": config}


def with_rows(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """A config.json with so many tokens, of models of more than text too."""
    text = config.get("text_config")
    if isinstance(text, dict) and "vocab_size" not in config:
        return {**config, "text_config": {**text, "vocab_size": rows}}
    return {**config, "vocab_size": rows}


def _with_ids(config: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with the numbers of tokens that another has, and no others; of models of more than text too."""
    made = {name: value for name, value in config.items() if not name.endswith(_ID)}
    made |= {name: value for name, value in theirs.items() if name.endswith(_ID)}
    text, of_text = config.get("text_config"), theirs.get("text_config")
    if isinstance(text, dict) and isinstance(of_text, dict):
        made["text_config"] = _with_ids(text, of_text)
    return made


def united_notes(base: Checkpoint, tuned: Mapping[str, Checkpoint], config: FusionConfig) -> Iterator[str]:
    """How many tokens there are, which each model lacks, and what the tokenizers say otherwise."""
    models = _models(base, tuned, tuple(sorted(token_tensors(base))))
    kept, made = _made(models, config)
    rows = rows_for(list(made.numbers.values()), config.pad_to_multiple_of)
    yield f"Tokens: {len(made.numbers):,} in {rows:,} rows, cut as by the tokenizer of {kept}"
    for label, model in models.items():
        if lacks := [token for token in made.numbers if model.row_of(token) == MISSING]:
            some = ", ".join(map(repr, lacks[:3])) + (", …" if len(lacks) > 3 else "")
            yield f"{label}: has no row for {len(lacks):,} of them ({some})"
        if gone := len(model.tokens.numbers.keys() - made.numbers.keys()):
            yield f"{label}: {gone:,} of its tokens are left out"
        for note in differences_told(models[kept].tokens, model.tokens):
            yield f"{label}: {note}"
