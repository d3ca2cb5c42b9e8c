"""What a merge may be told beside its models: every keyword and option, and the field of a run that it sets.

Nothing heavy is imported: `cpift --help` and `import cpift` pass here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

from cpift.config.words import ConflictName, MeasureName, MergeName, ScopeName, listed

# A number, a gradient over layers, or cases `{"filter": part of a name, "value": …}`: see `config.settings`.
Setting = float | Sequence[float] | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Option:
    """One keyword. kind: what the command line takes for it."""

    field: str
    help: str
    kind: Literal["value", "values", "pairs", "switch"] = "value"


OPTIONS: Mapping[str, Option] = {
    "method": Option("fusion.method", f"{listed(MergeName)}, or module:attribute [default: cpift]"),
    "weight": Option(
        "fusion.weight", "of every task: linear and karcher, λ of task_arithmetic, ties, dare and their like"
    ),
    "weights": Option("fusion.weights", "by task, where they differ from --weight", "pairs"),
    "density": Option("fusion.density", "share of each update that ties, dare, breadcrumbs and their like keep"),
    "densities": Option("fusion.densities", "by task, where they differ from --density", "pairs"),
    "normalize": Option("fusion.normalize", "whether weights are divided by their sum"),
    "scale": Option("fusion.scale", "λ, which the merged update is multiplied by"),
    "trim": Option("fusion.trim", "ties, breadcrumbs: keep the largest of each `tensor`, or of all (`global`)"),
    "gamma": Option("fusion.gamma", "breadcrumbs: share of each update that is left out, its largest elements"),
    "window": Option(
        "fusion.window", "della: how far the chance to be kept goes from the density, by an update's rank"
    ),
    "threshold": Option("fusion.threshold", "ram, ram_plus: an update that is no larger is no change"),
    "rescale": Option("fusion.rescale", "ram_plus: growth of what one task alone changed, by what it shares"),
    "rescale_limit": Option("fusion.rescale_limit", "ram_plus: the most that its shared over its own elements count"),
    "selectivity": Option("fusion.selectivity", "consensus: update of a task that needs an element, over the others'"),
    "agreement": Option("fusion.agreement", "consensus: tasks that have to need an element"),
    "t": Option("fusion.t", "slerp of two: 0 is the first, 1 the second; nearswap: the most that an element moves"),
    "omega": Option("fusion.omega", "cpift: `uniform`, every model weighs the same, or a fixed number"),
    "epsilon": Option("fusion.epsilon", "radians below which SLERP is LERP"),
    "granularity": Option(
        "fusion.granularity", "cpift: what has an angle: `tensor`, `row` or `model`; ram_plus: what is counted in"
    ),
    "space": Option("fusion.space", "cpift, nuslerp, multislerp: of `weights`, or of their `delta` to BASE"),
    "conflict": Option("fusion.conflict", f"cpift: shared core elements: {listed(ConflictName)}, or module:attribute"),
    "transplant": Option("fusion.transplant", "cpift: put cores into the backbone", "switch"),
    "vocabulary": Option(
        "fusion.vocabulary",
        "other tokens: `error`, rows of the `base`; by tokens `union`, `pretrained` (BASE's), a task's",
    ),
    "tokens": Option("fusion.tokens", "whose row a token has in models that lack it: {TOKEN: {source, token, force}}"),
    "missing_tokens": Option("fusion.missing_tokens", "by tokens: row where one is lacking: `pretrained` or `mean`"),
    "pad_to_multiple_of": Option("fusion.pad_to_multiple_of", "by tokens: rows are a multiple of it"),
    "slices": Option(
        "fusion.slices", "layers of models one after another: a list of {sources: [{model, layer_range}]}"
    ),
    "into": Option("fusion.into", "module of BASE that a text-only model is: NAME=model.language_model", "pairs"),
    "as_lora": Option("fusion.as_lora", "one PEFT adapter in place of a model: of adapters, exact", "switch"),
    "rank": Option("fusion.rank", "of --as-lora: the closest product of this rank, of any models and method"),
    "shard_size": Option("fusion.shard_size", "most bytes of one file, for example 5GB"),
    "p": Option("regions.p", "cpift: core fraction; 1 % is 0.01"),
    "scope": Option("regions.scope", "cpift: the top p of all parameters (`global`), or of each `tensor`"),
    "measure": Option("regions.measure", "cpift: elements of the largest `update`, `significance` or `curvature`"),
    "moments": Option(
        "tasks.moments",
        "second moments of a model, for curvature and fisher: NAME=FILE [default: in its folder]",
        "pairs",
    ),
    "placement": Option("regions.placement", "cpift: `random` for as many other elements, a control"),
    "include": Option("regions.include", "cpift: pattern of parameter names (repeatable)", "values"),
    "exclude": Option("regions.exclude", "cpift: pattern taken out again (repeatable)", "values"),
    "tau": Option("groups.tau", "cpift: Jaccard overlap from which tasks are one group"),
    "tau_chance": Option("groups.tau_chance", "cpift: the same as a multiple of chance"),
    "order": Option("groups.order", "cpift: of groups: random, given or similarity"),
    "backbone": Option("backbone.source", "cpift: what cores go into: `pretrained` (BASE), a folder or hub id"),
    "backbone_revision": Option("backbone.revision", "cpift: branch, tag or commit of a backbone on the hub"),
    "seed": Option("seed", "of dare, della and their like, and of the order of groups"),
    "memory_budget": Option("resources.memory_budget", "most memory to hold, page cache apart, for example 512MiB"),
    "device": Option("resources.device", "where it is computed: cpu, cuda, or auto, the faster of both [default: cpu]"),
    "verify": Option("resources.verify", "read the merged model back and compare it with its inputs", "switch"),
    "dtype": Option("model.dtype", "of the merged model: auto (as BASE), bfloat16, float16 or float32"),
    "chat_template": Option("model.chat_template", "chatml, llama3, alpaca or a file, for a BASE that has none"),
    "chat_template_kwargs": Option("model.chat_template_kwargs", "variables of the chat template", "pairs"),
}


class RegionFields(TypedDict, total=False):
    """Keywords that say how core regions are selected (sections `model`, `regions` of a run)."""

    p: float
    scope: ScopeName
    measure: MeasureName
    moments: Mapping[str, str]
    placement: Literal["chosen", "random"]
    include: Sequence[str]
    exclude: Sequence[str]
    vocabulary: Literal["error", "base"]
    memory_budget: int | str
    device: Literal["auto", "cpu", "cuda"]


class MethodFields(TypedDict, total=False):
    """Keywords that decide the values of a merge (sections `fusion`, `groups`)."""

    method: MergeName | str
    weight: Setting
    weights: Mapping[str, Setting]
    density: Setting
    densities: Mapping[str, Setting]
    normalize: bool | None
    scale: float
    trim: ScopeName
    gamma: float
    window: float
    threshold: float
    rescale: float
    rescale_limit: float
    selectivity: float
    agreement: int
    t: Setting
    omega: Literal["uniform"] | float
    epsilon: float
    granularity: Literal["tensor", "row", "model"]
    space: Literal["weights", "delta"]
    conflict: ConflictName | str
    transplant: bool
    p: float
    scope: ScopeName
    measure: MeasureName
    placement: Literal["chosen", "random"]
    include: Sequence[str]
    exclude: Sequence[str]
    tau: float
    tau_chance: float
    order: Literal["random", "given", "similarity"]
    seed: int


class MergeFields(MethodFields, total=False):
    """Every keyword of a merge of checkpoints."""

    moments: Mapping[str, str]
    vocabulary: Literal["error", "base", "union", "pretrained"] | str
    tokens: Mapping[str, Mapping[str, Any]]
    missing_tokens: Literal["pretrained", "mean"]
    pad_to_multiple_of: int
    slices: Sequence[Mapping[str, Any]]
    into: Mapping[str, str]
    as_lora: bool
    rank: int
    shard_size: int | str
    backbone: str
    backbone_revision: str
    memory_budget: int | str
    device: Literal["auto", "cpu", "cuda"]
    verify: bool
    dtype: Literal["auto", "bfloat16", "float16", "float32"]
    chat_template: str
    chat_template_kwargs: Mapping[str, Any]


def tune_names(models: Sequence[str]) -> list[str]:
    """A name a fine-tune: its folder's, with a number where two have the same."""
    names: list[str] = []
    for model in models:
        name = re.sub(r"[^\w.-]+", "-", Path(model).expanduser().resolve().name, flags=re.ASCII).strip("-.")[:50]
        same = sum(earlier == name or earlier.startswith(f"{name}-") for earlier in names)
        names.append(f"{name or 'tune'}-{same + 1}" if same or not name else name)
    return names
