"""A merge in memory: dictionaries of tensors in, one out, by the code that merges model folders slice by slice."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.slices import sweep
from cpift.config.loading import parse_config
from cpift.config.run import RunConfig
from cpift.errors import CheckpointError, ConfigError, CpiftError, Problem
from cpift.formats.safetensors import TensorInfo, dtype_name
from cpift.merging.base import FusionInputs, Materials, MergeMethod
from cpift.merging.conflicts import by_stage
from cpift.merging.options import OPTIONS
from cpift.merging.registry import method_named, reads_moments
from cpift.merging.settings import Largest, write_trimmed
from cpift.method.groups import group_tasks
from cpift.method.masks import read_summary
from cpift.method.regions import Streaming, write_regions

StateDict = Mapping[str, torch.Tensor]
_KINDS = (torch.float32, torch.float16, torch.bfloat16)
_SUBJECT = "merge_state_dicts"
_OTHERWISE = {
    "backbone",
    "backbone_revision",
    "vocabulary",
    "tokens",
    "missing_tokens",
    "pad_to_multiple_of",
    "slices",
    "into",
    "moments",
    "as_lora",
    "rank",
    "shard_size",
    "memory_budget",
    "device",
    "verify",
    "dtype",
}
KEYWORDS = {name for name in OPTIONS if name not in _OTHERWISE and not name.startswith("chat_template")}


def merge_dicts(
    base: StateDict, models: Mapping[str, StateDict], backbone: StateDict | None, fields: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """See `cpift.merge_state_dicts`."""
    config = _config(list(models), fields)
    shared = _shared(base, [*models.values(), *([backbone] if backbone is not None else [])])
    pretrained = TensorsInMemory("base", base, shared)
    tuned = {task: TensorsInMemory(task, values, shared) for task, values in models.items()}
    into = pretrained if backbone is None else TensorsInMemory("backbone", backbone, shared)
    FusionInputs(pretrained, into, tuned, Path(), ()).check()
    with _masks() as folder:
        method = _method(config, pretrained, into, tuned, folder)
        method.prepare()
        merged_tensors = {name: _merged(method, info) for name, info in into.tensors.items()}
    return {name: merged_tensors[shared.get(name, name)].to(tensor.device) for name, tensor in base.items()}


def _merged(method: MergeMethod, info: TensorInfo) -> torch.Tensor:
    out = torch.empty(info.numel, dtype=info.dtype)
    _, fill = method.tensor(info)
    for start, stop in sweep(method.models, info, method.pieces(info)):
        fill(start, stop, out[start:stop])
    return out.view(info.shape)


def _method(
    config: RunConfig,
    pretrained: Checkpoint,
    backbone: Checkpoint,
    tuned: Mapping[str, Checkpoint],
    folder: Path,
) -> MergeMethod:
    """The method over these models; masks go into `folder`."""
    select = partial(_selected, pretrained, tuned, folder)
    priority: list[str] = []
    regions = folder
    if config.fusion.isolates:
        regions = select(config.regions)
        if by_stage(config.fusion.conflict):
            overlaps = np.array(read_summary(regions)["overlaps"])
            grouping = group_tasks(list(tuned), overlaps, config.regions.p, config.groups, config.seed)
            priority = [task for group in grouping.groups for task in group]
    inputs = FusionInputs(pretrained, backbone, tuned, regions, priority)

    def trimmed(wanted: Largest) -> list[Path]:
        folders = [folder / str(number) for number in range(len(wanted.shares))]
        for one in folders:
            one.mkdir()
        write_trimmed(wanted, config.fusion, folders, Streaming())
        return folders

    materials = Materials(inputs, config.fusion, config.seed, trimmed)
    return method_named(config.fusion.method).make(materials)


def _selected(pretrained: Checkpoint, tuned: Mapping[str, Checkpoint], folder: Path, regions: Any) -> Path:
    write_regions(pretrained, tuned, regions, {regions.p: folder}, Streaming())
    return folder


@contextmanager
def _masks() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="cpift-masks-") as folder:
        yield Path(folder)


def _config(tasks: list[str], fields: Mapping[str, Any]) -> RunConfig:
    """The run whose fusion this is; its models are in memory. Raises ConfigError."""
    if unknown := [name for name in fields if name not in KEYWORDS]:
        raise ConfigError(_SUBJECT, [_unknown(name) for name in unknown])
    nowhere = {"hub": "in/memory"}
    raw = {"name": "merge", "model": nowhere, "tasks": [{"name": task, "checkpoint": nowhere} for task in tasks]}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    for field, word, reads in (
        ("method", plain.get("method"), reads_moments(str(plain.get("method")))),
        ("measure", plain.get("measure"), plain.get("measure") == "curvature"),
    ):
        if reads:
            what = f"{word} reads second moments, and a state dict has none"
            raise ConfigError(_SUBJECT, [Problem(field, what, "merge folders: cpift.merge(…, moments={NAME: FILE})")])
    changes = {"backbone.source": "pretrained", **{OPTIONS[name].field: value for name, value in plain.items()}}
    return parse_config(raw, Path.cwd(), _SUBJECT, changes=changes)


def _unknown(name: str) -> Problem:
    if name in OPTIONS:
        return Problem(name, "is of merges of folders", "merge folders, with cpift.merge")
    return Problem(name, "is no field of a merge in memory", f"one of {', '.join(sorted(KEYWORDS))}")


def _shared(base: StateDict, others: list[StateDict]) -> dict[str, str]:
    """Names of tied tensors → the name that stands for them: the first that the base has, where all models tie them."""
    first: dict[tuple[Any, ...], str] = {}
    tied = {}
    for name, tensor in base.items():
        source = first.setdefault(_place(tensor, name), name)
        if source != name:
            tied[name] = source
    return {name: source for name, source in tied.items() if all(_ties(model, name, source) for model in others)}


def _place(tensor: torch.Tensor, name: str) -> tuple[Any, ...]:
    """The same for tensors that are one."""
    if not isinstance(tensor, torch.Tensor) or not tensor.numel():
        return (name,)
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device


def _ties(model: StateDict, name: str, source: str) -> bool:
    if name not in model or source not in model:
        return True  # saved once
    return _place(model[name], name) == _place(model[source], source) or torch.equal(model[name], model[source])


class TensorsInMemory(Checkpoint):
    """A state dict as a checkpoint: tensors by name, sliced. Raises CheckpointError for what no merge computes with."""

    def __init__(self, label: str, tensors: StateDict, shared: Mapping[str, str]):
        self.folder, self.is_apart, self.ties, self.prefix = Path(label), False, {}, ""
        self._copies, self._maps, self._versions = {}, {}, {}
        self._values: dict[str, torch.Tensor] = {}
        problems = []
        for name, tensor in tensors.items():
            if problem := _unusable(name, tensor):
                problems.append(problem)
                continue
            stored_as = shared.get(name, name)
            if stored_as == name or stored_as not in tensors:
                self._values[stored_as] = tensor.detach().cpu().contiguous().view(-1)
        if problems:
            raise CheckpointError(f"state dict {label}", problems)
        shapes = {shared.get(name, name): tuple(tensor.shape) for name, tensor in tensors.items()}
        self.tensors = {
            name: TensorInfo(name, shapes[name], dtype_name(values.dtype), self.folder)
            for name, values in sorted(self._values.items())
        }

    def __reduce__(self) -> tuple[Any, ...]:
        raise CpiftError("a merge in memory stays in its process")

    @property
    def config(self) -> dict[str, Any]:
        return {}

    def slice(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._values[name][start:stop]

    def prefetch(self, name: str, start: int, stop: int) -> None:
        """It is in memory."""

    def release(self, name: str, start: int, stop: int) -> None:
        """It belongs to the caller."""


def _unusable(name: str, tensor: Any) -> Problem | None:
    if not isinstance(tensor, torch.Tensor):
        return Problem(name, f"is a {type(tensor).__name__}", "give a state dict: tensors by name")
    if ".lora_" in name:
        return Problem(name, "is of a LoRA adapter", "merge adapters as folders, with cpift.merge")
    if tensor.is_floating_point() and tensor.dtype not in _KINDS:
        kind = str(tensor.dtype).removeprefix("torch.")
        return Problem(name, f"is {kind}, and fp32, fp16 and bf16 are computed with", "convert it")
    if tensor.is_meta:
        return Problem(name, "is on the meta device, without values", "load the weights")
    return None
