"""A fine-tune's change as a PEFT adapter in a folder of the user's: places and hub ids in, one finished folder out."""

from __future__ import annotations

import os
from collections.abc import Mapping

from cpift.checkpoints.lora_extraction import Extraction, OnModule, extract_lora
from cpift.checkpoints.opening import locate, model_files, pinned
from cpift.config.inputs import CheckpointConfig
from cpift.console.view import View
from cpift.disk.files import folder_made
from cpift.disk.guarded import guarded_reads
from cpift.errors import ConfigError, Problem
from cpift.merge_folder import given_source, occupied, place_of

_SUBJECT, _TITLE = "extract-lora", "LoRA extraction"


def extract_into(
    base: str | os.PathLike[str], tuned: str | os.PathLike[str], out: str | os.PathLike[str], rank: int, view: View
) -> Extraction:
    """Make the adapter at `out`, which appears when it is whole; nothing that exists is replaced.

    base, tuned: model folders or hub ids (`org/name@revision`). Raises ConfigError for arguments and CheckpointError
    for models that do not fit each other, both before anything is written under the name asked for.
    """
    place, problems = place_of(out, _SUBJECT), list[Problem]()
    sources = {name: given_source(name, model, problems) for name, model in (("base", base), ("tuned", tuned))}
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        problems.append(Problem("rank", f"is {rank!r}", "a whole number from 1 on, for example 32"))
    if occupied(place):
        problems.append(
            Problem("out", f"{place} holds files", "give a folder to make: nothing that exists is replaced")
        )
    if problems:
        raise ConfigError(_SUBJECT, problems)
    with view.stage(_TITLE, [_TITLE]):
        theirs, mine = (locate(pinned(CheckpointConfig(**sources[name]))) for name in ("base", "tuned"))
        with folder_made(place) as partial, guarded_reads(_TITLE, [*model_files(theirs), *model_files(mine)]):
            extraction = extract_lora(theirs, mine, partial, rank, _name(sources["base"]), _shown(view))
    return extraction


def _shown(view: View) -> OnModule:
    return lambda done, of: view.progress({"title": _TITLE, "done": done / of})


def _name(source: Mapping[str, str]) -> str:
    """How the adapter's configuration calls its base model."""
    return source.get("hub") or source["path"]
