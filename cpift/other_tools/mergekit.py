"""mergekit's files: what they ask of `cpift merge`, and one list of what it cannot do.

What a field means is as its documentation has it, the README and the guide of merge methods; `mergekit_values` has the
values that may differ by model, layer and tensor.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from cpift.errors import Problem
from cpift.other_tools.mergekit_models import (
    THETA0,
    Merge,
    Method,
    Source,
    names_of,
    parameters_of,
    reference,
    sources_of,
    unknown,
)
from cpift.other_tools.mergekit_parameters import IDLE, by_models, slice_of, told
from cpift.other_tools.mergekit_tokens import tokenizer_of
from cpift.other_tools.mergekit_values import Place
from cpift.text.redaction import is_template
from cpift.untrusted.values import Raw, kind_of

_TEMPLATES = ("chatml", "llama3", "alpaca")
_MODULE = "default"  # of models that are one module, in mergekit's words
_DTYPES = ("bfloat16", "float16", "float32")
_FIELDS = {
    *("merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source"),
    *("tokenizer", "chat_template", "modules"),
}


_TRIMMED = ("weight", "density")
_SUMMED = ("normalize", "lambda")
_RESCALE = ("rescale", True, "cpift rescales what DARE keeps")
_PRUNED = ("rescale", True, "cpift divides what is kept by its probability")
_WINDOW = {"window": 0.15}
_DROPS = "other elements are dropped than by mergekit, at the same density: `--seed N` for others"
METHODS = {
    "linear": Method("linear", False, ("weight",), ("normalize",)),
    "slerp": Method("slerp", False, (), ("t",), least=2, most=2),
    "task_arithmetic": Method("task_arithmetic", True, ("weight",), ("normalize", "lambda")),
    "ties": Method("ties", True, _TRIMMED, _SUMMED, normalize=True),
    "dare_linear": Method("dare", True, _TRIMMED, _SUMMED, others=(_RESCALE,), told=_DROPS),
    "dare_ties": Method("dare_ties", True, _TRIMMED, _SUMMED, normalize=False, others=(_RESCALE,), told=_DROPS),
    "della": Method(
        "della", True, _TRIMMED, _SUMMED, {"epsilon": "window"}, False, (_PRUNED,), told=_DROPS, begins=_WINDOW
    ),
    "della_linear": Method(
        "della_linear", True, _TRIMMED, _SUMMED, {"epsilon": "window"}, None, (_PRUNED,), told=_DROPS, begins=_WINDOW
    ),
    "sce": Method("sce", numbers={"select_topk": "density"}, begins={"density": 1.0}),
    "arcee_fusion": Method("arcee_fusion", most=1),
    "nuslerp": Method(
        "nuslerp",
        None,
        ("weight",),
        others=(
            ("nuslerp_flatten", True, "cpift takes a tensor as one vector"),
            ("nuslerp_row_wise", False, "cpift takes a tensor as one vector"),
        ),
        least=2,
        most=2,
    ),
    "multislerp": Method(
        "multislerp",
        None,
        ("weight",),
        others=(
            ("normalize_weights", True, "cpift's weights share 1"),
            ("eps", None, "cpift's own limits hold"),
        ),
        least=2,
    ),
    "breadcrumbs": Method("breadcrumbs", True, _TRIMMED, _SUMMED, {"gamma": "gamma"}),
    "breadcrumbs_ties": Method("breadcrumbs_ties", True, _TRIMMED, _SUMMED, {"gamma": "gamma"}, False),
    "ram": Method("ram", numbers={"epsilon": "threshold"}),
    "ramplus_tl": Method("ram_plus", numbers={"epsilon": "threshold", "r": "rescale", "alpha": "rescale_limit"}),
    "nearswap": Method("nearswap", True, (), ("t",), most=1),
    "model_stock": Method(
        "model_stock", True, others=(("filter_wise", False, "cpift takes one angle for each tensor"),), least=2
    ),
    "karcher": Method(
        "karcher",
        False,
        others=(
            ("max_iter", None, "cpift goes on until the mean stands still"),
            ("tol", None, "cpift goes on until the mean stands still"),
        ),
        told="cpift goes on until the mean stands still, whatever max_iter and tol say",
    ),
    "passthrough": Method("passthrough", False, ("scale",), most=1),
}
_KNOWN = {
    name
    for one in METHODS.values()
    for name in (*one.by_model, *one.single, *one.numbers, *(it[0] for it in one.others))
}


def is_mergekit(raw: Raw) -> bool:
    """Whether fields are those of a file of mergekit's, and of no run."""
    own = {"tasks", "run", "space", "experts"} & set(raw)
    return not own and ("merge_method" in raw or "slices" in raw or {"base_model", "models"} <= set(raw))


def read_mergekit(raw: Raw) -> Merge:
    """What a file asks for, with everything that cannot be done; nothing is opened."""
    merge = Merge()
    raw = _of_module(merge, raw)
    inside = [name for name in raw if name in _KNOWN | set(IDLE)]
    for name in inside:
        merge.refuse(name, "stands outside of `parameters`, where mergekit does not look", "put it under `parameters`")
    unknown(merge, [name for name in raw if name not in inside], _FIELDS, "")
    method = _method(merge, raw)
    slices = sources_of(merge, raw)
    base = reference(merge, raw["base_model"], "base_model") if raw.get("base_model") is not None else ""
    if method is not None:
        shared: Place = ("parameters", parameters_of(merge, raw, "")) if raw.get("parameters") is not None else ("", {})
        base = _base(merge, method, base, slices)
        kept = [_onto_base(merge, method, base, sources) for sources in slices]
        _name(merge, kept)
        told(merge, method, kept, shared, _KNOWN)
        if len(kept) == 1:
            by_models(merge, method, kept[0], shared)
        if any(one.layers for sources in slices for one in sources):
            merge.slices = [slice_of(merge, method, *both, shared) for both in zip(slices, kept, strict=True)]
    _output(merge, raw)
    return merge


def _of_module(merge: Merge, raw: Raw) -> Raw:
    """A file whose `modules` are one, `default`, as if what stands there stood outside: a text model is one module."""
    modules = raw.get("modules")
    if modules is None:
        return raw
    rest = {name: value for name, value in raw.items() if name != "modules"}
    only = modules.get(_MODULE) if isinstance(modules, dict) and len(modules) == 1 else None
    if not isinstance(only, dict):
        remedy = (
            f"give models or slices outside of it, or in one module `{_MODULE}`; a text model goes into a "
            "vision-language model with `cpift merge BASE NAME=TEXT --into NAME=model.language_model`"
        )
        merge.refuse("modules", "name parts of models, and cpift merges one language model at a time", remedy)
        return rest
    if twice := [name for name in only if name in rest]:
        what = f"stands in modules.{_MODULE} and outside of it"
        merge.refuse(twice[0], what, "keep one of the two")
    return rest | only


def _method(merge: Merge, raw: Raw) -> Method | None:
    name = raw.get("merge_method")
    if isinstance(name, str) and name in METHODS:
        return METHODS[name]
    known = ", ".join(METHODS)
    if not isinstance(name, str):
        what = "is not there" if name is None else f"is {kind_of(name)}"
        merge.refuse("merge_method", what, f"one of {known}")
    else:
        close = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.7)
        merge.refuse(
            "merge_method", f"cpift has no {name[:60]!r}", f"did you mean {close[0]!r}?" if close else f"one of {known}"
        )
    return None


def _base(merge: Merge, method: Method, base: str, slices: Sequence[Sequence[Source]]) -> str:
    """base_model as far as it can be taken; θ0 is it, or else the first model."""
    if "+" in base:
        merge.refuse("base_model", f"{base}: has an adapter, and cpift takes θ0 as it is", "merge the two beforehand")
        base = base.partition("+")[0]
    if not base and not merge.problems and (method.of_updates or method.ours == "slerp"):
        merge.refuse(
            "base_model", "is not there, and this method is from it", "name the model that all were tuned from"
        )
    if method.of_updates is None:
        merge.fields["space"] = "delta" if base else "weights"
    merge.base = base or next((one.model for sources in slices for one in sources if one.model), "")
    return base


def _onto_base(merge: Merge, method: Method, base: str, sources: list[Source]) -> list[Source]:
    """Of a slice the models that are merged onto it; slerp's `t` is from base_model on."""
    plain = [one for one in sources if one.model != merge.base or one.adapter]
    if method.of_updates or (method.of_updates is None and base):
        sources = plain
    elif method.ours == "slerp" and base:
        sources = [*[one for one in sources if one not in plain][:1], *plain]
        if sources[:1] == plain[:1]:
            layers = plain[0].layers if plain else None
            sources = [Source("base_model", base, "", (), layers), *sources]
    where = sources[0].where.rpartition(".sources")[0] if sources else ""
    if sources and not method.least <= len(sources) <= method.most:
        wanted = f"{method.least}" if method.least == method.most else f"at least {method.least}"
        wanted = wanted if method.most != 1 else "1"
        what = f"are {len(sources)} beside base_model's part, and it takes {wanted}"
        merge.refuse(f"{where}.sources" if where else "models", what, "name others")
    for one in sources:
        if one.adapter and one.model != merge.base:
            what = f"{one.model}+{one.adapter}: cpift puts an adapter onto base_model, which is {merge.base}"
            fold = f"cpift merge {one.model} {one.adapter} --method linear --out FOLDER"
            merge.refuse(f"{one.where}.model", what, f"`{fold}`, and name FOLDER here")
    if not sources and not merge.problems:
        merge.refuse("models", "name no model beside base_model", "add one")
    return sources


def _name(merge: Merge, slices: Sequence[Sequence[Source]]) -> None:
    """Every model that is merged, by the name of a task."""
    paths = [one.path for sources in slices for one in sources]
    paths = paths if len(slices) == 1 else list(dict.fromkeys(paths))
    names = (f"{name}-tuned" if name == THETA0 else name for name in names_of(paths))
    merge.models = dict(zip(names, paths, strict=True))


# ---- the merged model ------------------------------------------------------------------------------------------------


def _output(merge: Merge, raw: Raw) -> None:
    """dtype, tokenizer and template."""
    for name in ("dtype", "out_dtype"):
        if (dtype := raw.get(name)) in _DTYPES:
            merge.fields["dtype"] = dtype
        elif dtype is not None:
            merge.refuse(name, f"is {dtype!r:.40}", f"one of {', '.join(_DTYPES)}")
    tokenizer_of(merge, raw)
    template = raw.get("chat_template")
    if template in _TEMPLATES or (isinstance(template, str) and is_template(template)):
        merge.fields["chat_template"] = template
    elif template == "auto":
        merge.notes.append("chat_template: auto: base_model's is kept, or the one that all models share")
    elif template is not None:
        words = f"one of {', '.join(_TEMPLATES)}, or a template's text; a file: --chat-template FILE"
        merge.refuse("chat_template", f"is {template!r:.40}", words)


def of_mergekit(raw: Raw) -> list[Problem]:
    """The answer where a run's file is expected."""
    what = "this is mergekit's file, which `cpift merge` reads as it is"
    return [Problem("merge_method", what, "`cpift merge FILE OUT`, with --dry-run to check it")]


def of_experts(raw: Raw) -> list[Problem]:
    what = "this is mergekit-moe's file, and it makes models the experts of one, which cpift does not"
    return [Problem("experts", what, "stay with mergekit for it")]
