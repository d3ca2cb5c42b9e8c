"""Files of other tools in the place of a run's file: whose they are, and the command here that does the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cpift.errors import Problem
from cpift.other_tools.mergekit import of_experts, of_mergekit
from cpift.untrusted.values import Raw, command, is_list, is_word, mapping

_OWN = frozenset({"tasks", "run", "space"})  # a file with one of these is meant to be ours


def answered(raw: Raw) -> list[Problem]:
    """What a file of another tool is, with the command for it, and then what that leaves out; empty for all others."""
    if _OWN & set(raw):
        return []
    return next((tool.answer(raw) for tool in _TOOLS if any(fields <= set(raw) for fields in tool.fields)), [])


@dataclass(frozen=True)
class Tool:
    """A tool by fields that its files have. answer: the command for a file, then what it leaves out."""

    fields: tuple[frozenset[str], ...]
    answer: Callable[[Raw], list[Problem]]


# ---- axolotl, LLaMA-Factory, TRL: the command that begins with the same model and data -------------------------------

_THEN = "then carry learning rate, length and batch size over into probe and integration of the file that it writes"
_EACH = "for cpift each data set is a task of its own"


def _init(tool: str, where: str, model: Any, data: Sequence[Any], why: str = _EACH) -> list[Problem]:
    """What is no text in the file is left to be filled in."""
    words = [word if is_word(word) else "DATA" for word in data] or ["DATA..."]
    init = command(["cpift", "init", *words, "--model", model if is_word(model) else "MODEL"])
    return [Problem(where, f"this is {tool} file; {why}", f"{init}, {_THEN}")]


def _not_here(tool: str, where: str, what: str) -> list[Problem]:
    return [Problem(where, f"this is {tool} file for {what}, which cpift does not do", "stay with it for that")]


def _axolotl(raw: Raw) -> list[Problem]:
    if raw.get("rl"):
        return _not_here("axolotl's", "rl", f"preferences ({raw['rl']})")
    data: list[Any] = []
    datasets = raw.get("datasets") or raw.get("pretraining_dataset")
    for dataset in datasets if is_list(datasets) else [datasets]:
        files = mapping(dataset).get("data_files") or (dataset if is_word(dataset) else mapping(dataset).get("path"))
        data += files if is_list(files) else [files]
    return _init("axolotl's", "base_model", raw["base_model"], data if datasets else [])


def _llama_factory(raw: Raw) -> list[Problem]:
    tool, model, adapter = "LLaMA-Factory's", raw["model_name_or_path"], raw.get("adapter_name_or_path")
    if raw.get("stage", "sft") not in ("sft", "pt"):
        return _not_here(tool, "stage", f"preferences ({raw['stage']})")
    if raw.get("dataset") is None and raw.get("export_dir") and is_word(adapter) and is_word(model):
        words = ["cpift", "merge", model, adapter, "--method", "linear", "--out", str(raw["export_dir"])]
        return [Problem("export_dir", f"this is {tool} file, and here a command puts the adapter in", command(words))]
    if "dataset" not in raw:
        return _not_here(tool, "template", "using a model")
    why = f"{_EACH}: give the files or hub ids that {raw['dataset']} stand for" if raw["dataset"] else _EACH
    return _init(tool, "model_name_or_path", model, [], why)


def _trl(raw: Raw) -> list[Problem]:
    """Of one data set, or of a mixture of several."""
    mixed = raw.get("datasets")
    names = [mapping(dataset).get("path") for dataset in mixed] if is_list(mixed) else [raw.get("dataset_name")]
    where = "model_name_or_path" if "model_name_or_path" in raw else "dataset_name"
    return _init("TRL's", where, raw.get("model_name_or_path"), names)


# ---- the table -------------------------------------------------------------------------------------------------------


def _fields(*names: str) -> frozenset[str]:
    return frozenset(names)


_TOOLS = (
    Tool((_fields("merge_method"), _fields("slices"), _fields("base_model", "models")), of_mergekit),
    Tool((_fields("base_model", "experts"),), of_experts),
    Tool((_fields("base_model", "datasets"), _fields("base_model", "pretraining_dataset")), _axolotl),
    Tool((_fields("model_name_or_path", "dataset"), _fields("model_name_or_path", "template")), _llama_factory),
    Tool((_fields("dataset_name"), _fields("model_name_or_path", "datasets")), _trl),
)  # the first that fits
