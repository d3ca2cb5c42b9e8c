"""Options of mergekit's commands that people type: understood, or answered with what cpift has instead."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cpift.errors import Problem

_PARAMETERS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
_BYTES = {"float32": 4}  # of one parameter; all other dtypes take two


@dataclass(frozen=True)
class Flag:
    """One option. off: its other form, `--no-…`; field: of a run, which it sets; said: what cpift does anyway;
    remedy: why it is refused."""

    value: bool = False
    field: str = ""
    said: str = ""
    remedy: str = ""


_LAZY = "weights are mapped and read in slices, and nothing is unpickled"
_TWO = "resources.threads_per_worker of a run, or OMP_NUM_THREADS, says how many threads"
FLAGS: Mapping[str, Flag] = {
    "cuda": Flag(field="resources.device"),
    "random-seed": Flag(True, field="seed"),
    "out-shard-size": Flag(True, field="fusion.shard_size"),
    "lazy-unpickle": Flag(said=_LAZY),
    "lazy-loader": Flag(said=_LAZY),
    "low-cpu-memory": Flag(said="--memory-budget says how much memory a merge may hold"),
    "copy-tokenizer": Flag(said="BASE's tokenizer is copied"),
    "write-model-card": Flag(said="a model card is written"),
    "safe-serialization": Flag(said="safetensors are written"),
    "clone-tensors": Flag(said="tensors are cut into files by --shard-size"),
    "async-write": Flag(said="files are written while the next are computed"),
    "allow-crimes": Flag(said="models of several architectures stay refused by name"),
    "trust-remote-code": Flag(said="no code of a model is run; a model that needs its own is refused by name"),
    "read-to-gpu": Flag(said="--cuda alone copies slices there"),
    "num-threads": Flag(True, said=_TWO),
    "write-threads": Flag(True, said="one thread writes, one hashes"),
    "quiet": Flag(said="output that is no terminal is plain lines"),
    "verbose": Flag(said="fusion.json beside the model says what happened to every tensor"),
    "transformers-cache": Flag(True, remedy="set HF_HUB_CACHE in the environment"),
    "lora-merge-cache": Flag(True, remedy="leave it out: adapters are read as they are, and no model is made of them"),
    "multi-gpu": Flag(remedy="leave it out: a merge runs on one GPU, or with --set resources.distributed=true on Ray"),
    "gpu-rich": Flag(remedy="use --cuda: a merge runs on one GPU"),
    "load-in-4bit": Flag(remedy="leave it out: quantised weights are not merged"),
    "load-in-8bit": Flag(remedy="leave it out: quantised weights are not merged"),
}
_OFF = {"copy-tokenizer": "leave it out: a merged model has its tokenizer", "safe-serialization": "leave it out"}


@dataclass
class Understood:
    """What options ask for: fields of a run by dotted name, what to tell, and what cannot be done."""

    settings: dict[str, Any]
    notes: list[str]
    problems: list[Problem]


def understood(given: Mapping[str, Any], dtype: str | None) -> Understood:
    """given: by option, True and False for its two forms; dtype: of the merged model, if it is known."""
    found = Understood({}, [], [])
    for name, value in given.items():
        one, shown = FLAGS[name], f"--{'no-' * (value is False)}{name}"
        if value is False and name in _OFF:
            found.problems.append(Problem(shown, "is mergekit's, and cpift has no such thing", _OFF[name]))
        elif one.remedy and value is not False:
            found.problems.append(Problem(shown, "is mergekit's, and cpift has no such thing", one.remedy))
        elif one.said and value is not False:
            found.notes.append(f"{shown}: {one.said}")
        elif one.field:
            _set(found, name, shown, value, dtype)
    return found


def _set(found: Understood, name: str, shown: str, value: Any, dtype: str | None) -> None:
    field = FLAGS[name].field
    if name == "cuda":
        found.settings |= {field: "cuda"} if value else {}
    elif name == "random-seed":
        found.settings[field] = int(value) if re.fullmatch("[0-9]{1,12}", value) else value
    elif (size := re.fullmatch(r"([0-9]{1,12})([KMB]?)", value.upper())) and int(size[1]):
        found.settings[field] = int(size[1]) * _PARAMETERS[size[2]] * _BYTES.get(str(dtype), 2)
        found.notes.append(f"{shown} {value}: of parameters, --shard-size {found.settings[field]} of bytes")
    else:
        found.problems.append(Problem(shown, f"{value!r:.40} is no number of parameters", "for example 5B or 500M"))
