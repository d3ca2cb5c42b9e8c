"""mergekit's files: the command here that does the same, and whatever differs.

Its meaning of a field was read in its source (`merge_methods/`, `plan.py`), defaults included.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cpift.errors import Problem
from cpift.untrusted.values import Raw, command, is_list, is_word, mapping, mappings

_LERP_BELOW = "0.0316"  # radians, where mergekit's slerp takes the straight line: cos > 0.9995
_TEMPLATES = ("chatml", "llama3", "alpaca")
_DTYPES = ("bfloat16", "float16", "float32")
_STAY = "stay with mergekit for it; `cpift merge` has cpift, linear, slerp, task_arithmetic, ties and dare"


@dataclass(frozen=True)
class _Method:
    """One of mergekit's `merge_method`s. ours: `--method`; settings: its options, from what was read of the file."""

    ours: str
    settings: Callable[[_Merge], list[str]]
    of_updates: bool = True  # merges onto base_model, which is no model to merge
    differs: str = ""


@dataclass
class _Merge:
    """What a mergekit file says, read piece by piece; `left` gathers what the command cannot say."""

    raw: Raw
    entries: list[Raw] = field(default_factory=list)
    shared: list[Raw] = field(default_factory=list)  # `parameters` for all models, the nearest first
    base: str = ""
    models: list[str] = field(default_factory=list)
    left: list[Problem] = field(default_factory=list)

    def note(self, where: str, what: str, remedy: str = "") -> None:
        self.left.append(Problem(where, what, remedy))

    def number(self, name: str, default: float, entry: Raw | None = None) -> float:
        """A parameter of one model, else of all; what is no single number is noted, and the default taken."""
        places = [*([mapping(entry.get("parameters"))] if entry else []), *self.shared]
        value = next((place[name] for place in places if place.get(name) is not None), default)
        if isinstance(value, (int, float)) and math.isfinite(value):
            return float(value)
        where = f"parameters.{name}"
        if all(problem.where != where for problem in self.left):
            self.note(where, "is no single number", "cpift merges all tensors alike: the command has the default")
        return default


def of_mergekit(raw: Raw) -> list[Problem]:
    name = raw.get("merge_method")
    method = _METHODS.get(name) if isinstance(name, str) else None
    merge = _Merge(raw)
    if method is None:
        lacks = f"cpift has no {name!r}" if name is not None else "it names no merge_method"
        return [Problem("merge_method", f"this is mergekit's file, and {lacks}", _STAY)]
    if not _read_models(merge):
        what = "this is mergekit's file, and it puts layers of models together, which cpift does not"
        return [Problem("merge_method", what, _STAY), *merge.left]
    if method.of_updates:
        _take_base_out(merge)
    elif method.ours == "slerp":
        _base_first(merge)
    if not merge.models:
        return [Problem("models", "this is mergekit's file, and it names no model to merge", "name them there")]
    options = [*method.settings(merge), *_output(merge)]
    if method.differs:
        merge.note("merge_method", f"{name}: {method.differs}")
    models = merge.models if "--weights" not in options else [f"{a}={b}" for a, b in _named(merge.models)]
    words = ["cpift", "merge", merge.base, *models, "--method", method.ours, *options, "--out", "merged"]
    same = "does not quite do the same, see below" if merge.left else "does the same"
    return [
        Problem("merge_method", f"this is mergekit's file, and here a command {same}", command(words)),
        *merge.left,
    ]


def _read_models(merge: _Merge) -> bool:
    """Fill in models and base; False where layers of models are put together."""
    slices = mappings(merge.raw.get("slices"))
    if merge.raw.get("modules") or len(slices) > 1:
        return False
    models = merge.raw.get("models")
    named = [model for model in models if model] if is_list(models) else []
    merge.entries = [{"model": model} if is_word(model) else mapping(model) for model in named]
    if slices:
        merge.entries = [entry for entry in mappings(slices[0].get("sources")) if entry]
        merge.shared.append(mapping(slices[0].get("parameters")))
        ranges = {str(entry.get("layer_range")) for entry in merge.entries}
        merge.note("slices.0.sources.layer_range", " and ".join(sorted(ranges)), "cpift merges all layers")
        if len(ranges) > 1:
            return False
    merge.shared.append(mapping(merge.raw.get("parameters")))
    merge.models = [_model(entry.get("model"), merge) for entry in merge.entries]
    base = _model(merge.raw.get("base_model"), merge) if merge.raw.get("base_model") else ""
    merge.base = base or next(iter(merge.models), "")
    return True


def _model(value: Any, merge: _Merge) -> str:
    """A model as `cpift merge` takes it; of `model+adapter` the adapter, which is put onto BASE."""
    if isinstance(value, Mapping):
        inner = mapping(value.get("model"))
        commit = f"@{inner['revision']}" if inner.get("revision") else ""
        lora = mapping(value.get("lora")).get("path")
        value = f"{inner.get('path', '')}{commit}" + (f"+{lora}" if lora else "")
    if not is_word(value):
        merge.note("models", "one of them has no name", "give it in the place of MODEL")
        return "MODEL"
    name, _, adapter = str(value).partition("+")
    if adapter:
        merge.note("models", f"{name}+{adapter}: cpift puts an adapter onto BASE", f"the same if BASE is {name}")
    return adapter or name


def _take_base_out(merge: _Merge) -> None:
    if not merge.raw.get("base_model"):
        merge.note("base_model", "is not there, and updates are from it", "put it before the models")
    others = [(model, entry) for model, entry in zip(merge.models, merge.entries, strict=True) if model != merge.base]
    merge.models, merge.entries = [model for model, _ in others], [entry for _, entry in others]


def _base_first(merge: _Merge) -> None:
    merge.models = [merge.base, *(model for model in merge.models if model != merge.base)]
    if len(merge.models) != 2:
        merge.note("models", f"slerp of {len(merge.models)} models", "mergekit takes two, base_model one of them")


def _weights(merge: _Merge) -> list[float]:
    return [merge.number("weight", 1.0, entry) for entry in merge.entries]


def _said(merge: _Merge, weights: Sequence[float]) -> list[str]:
    """Options for weights: none where all are cpift's default, one where they are alike."""
    if len(set(weights)) == 1:
        return [] if weights[0] == 1 else ["--weight", f"{weights[0]:g}"]
    named = zip(_named(merge.models), weights, strict=True)
    return [word for (name, _), weight in named for word in ("--weights", f"{name}={weight:g}")]


def _linear(merge: _Merge) -> list[str]:
    weights = _weights(merge)
    if not merge.number("normalize", True) and abs(sum(weights) - 1) > 1e-6:
        merge.note("parameters.normalize", "false: cpift's linear divides by the weights' sum", "use task_arithmetic")
    return _said(merge, weights)


def _slerp(merge: _Merge) -> list[str]:
    return ["--t", f"{merge.number('t', 0.5):g}", "--epsilon", _LERP_BELOW]


def _sum(merge: _Merge) -> list[str]:
    """θ0 + λ·Σ w·Δ; with `normalize` divided by Σ w."""
    weights, scale = _weights(merge), merge.number("lambda", 1.0)
    total = sum(weights)
    if merge.number("normalize", False) and abs(total) > 1e-8:
        scale /= total
    return _said(merge, [scale * weight for weight in weights])


def _ties(merge: _Merge) -> list[str]:
    """The mean of what agrees: divided by its weights in mergekit, by its number in cpift."""
    weights = _weights(merge)
    if not merge.number("normalize", True):
        merge.note("parameters.normalize", "false: cpift's TIES is the mean of what agrees, not the sum")
    if merge.number("rescale", False):
        merge.note("parameters.rescale", "true: cpift's TIES does not scale what it kept")
    if len(set(weights)) > 1:
        merge.note("parameters.weight", "they differ: mergekit elects signs by weight, cpift does not")
    return [*_density(merge), *_said(merge, _even(merge))]


def _even(merge: _Merge) -> list[float]:
    """Weights whose mean is `lambda`."""
    weights, scale = _weights(merge), merge.number("lambda", 1.0)
    total = sum(weights)
    return [scale * (weight * len(weights) / total if total else weight) for weight in weights]


def _dare(merge: _Merge) -> list[str]:
    merge.note("seed", "other elements are dropped than by mergekit, at the same density", "--seed N for others")
    return [*_density(merge), *_sum(merge)]


def _dare_ties(merge: _Merge) -> list[str]:
    """The mean of what agrees; mergekit sums it unless it is told to normalise."""
    merge.note("seed", "other elements are dropped than by mergekit, at the same density", "--seed N for others")
    if not merge.number("normalize", False):
        merge.note("parameters.normalize", "false: cpift's dare_ties is the mean of what agrees, not the sum")
    return [*_density(merge), *_said(merge, _even(merge))]


def _model_stock(merge: _Merge) -> list[str]:
    if merge.number("filter_wise", False):
        merge.note("parameters.filter_wise", "true: cpift takes one angle for each tensor")
    return []


def _density(merge: _Merge) -> list[str]:
    densities = [merge.number("density", 1.0, entry) for entry in merge.entries]
    if len(set(densities)) > 1:
        merge.note(
            "parameters.density",
            f"differs ({', '.join(f'{density:g}' for density in densities)}): cpift has one for all",
        )
    return ["--density", f"{densities[0]:g}"]


def _output(merge: _Merge) -> list[str]:
    """dtype, tokenizer and template of the merged model."""
    raw, options = merge.raw, []
    dtype = raw.get("out_dtype") or raw.get("dtype")
    if dtype in _DTYPES:
        options += ["--dtype", dtype]
    elif dtype is not None:
        merge.note("dtype", f"{dtype!r} is none of {', '.join(_DTYPES)}")
    if raw.get("tokenizer") or raw.get("tokenizer_source") not in (None, "base"):
        merge.note("tokenizer", "cpift keeps BASE's", "`--vocabulary base` where models have other numbers of tokens")
    template = raw.get("chat_template")
    if template in _TEMPLATES:
        options += ["--chat-template", template]
    elif template not in (None, "auto"):
        merge.note("chat_template", "cpift takes BASE's", f"or one of {', '.join(_TEMPLATES)}, or a file")
    return options


_METHODS = {
    "linear": _Method("linear", _linear, of_updates=False),
    "slerp": _Method("slerp", _slerp, of_updates=False),
    "task_arithmetic": _Method("task_arithmetic", _sum),
    "ties": _Method("ties", _ties),
    "dare_linear": _Method("dare", _dare),
    "dare_ties": _Method("dare_ties", _dare_ties),
    "nearswap": _Method("nearswap", lambda merge: ["--t", f"{merge.number('t', 0.5):g}"]),
    "model_stock": _Method("model_stock", _model_stock),
}


def of_experts(raw: Raw) -> list[Problem]:
    what = "this is mergekit-moe's file, and it makes models the experts of one, which cpift does not"
    return [Problem("experts", what, _STAY)]


def _named(models: Sequence[str]) -> list[tuple[str, str]]:
    """A task's name for each model: the last part of its path, with a number where two have the same."""
    names: list[str] = []
    for model in models:
        name = re.sub(r"[^\w.-]+", "-", model.partition("@")[0].rstrip("/").rpartition("/")[2], flags=re.ASCII)
        name = name.strip("-.")[:50] or "tune"
        names.append(f"{name}-{len(names) + 1}" if name in names else name)
    return list(zip(names, models, strict=True))
