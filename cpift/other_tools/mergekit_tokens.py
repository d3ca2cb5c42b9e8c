"""`tokenizer` and `tokenizer_source` of a mergekit file as fields of `cpift merge`."""

from __future__ import annotations

from typing import Any

from cpift.other_tools.mergekit_models import THETA0, Merge, reference, unknown
from cpift.untrusted.values import Raw, is_word, kind_of, mapping

_KINDS = ("model_token", "zero")
_MOST = 100_000  # tokens that are named one by one


def tokenizer_of(merge: Merge, raw: Raw) -> None:
    """What a file says of tokens; without a base_model a token's row is the mean of the models that have it."""
    own = raw.get("tokenizer")
    if own is not None and not isinstance(own, dict):
        merge.refuse("tokenizer", f"is {kind_of(own)}", "give fields, for example {source: base}")
        return
    if own is None and raw.get("tokenizer_source") is None:
        return
    fields = mapping(own)
    unknown(merge, fields, {"source", "tokens", "pad_to_multiple_of"}, "tokenizer.")
    if raw.get("tokenizer_source") is not None and own is not None:
        merge.refuse("tokenizer_source", "stands beside tokenizer", "keep one of the two")
    where = "tokenizer_source" if own is None else "tokenizer.source"
    merge.fields["vocabulary"] = _kept(merge, where, raw.get("tokenizer_source") or fields.get("source") or "union")
    if raw.get("base_model") is None:
        merge.fields["missing_tokens"] = "mean"
    if (multiple := fields.get("pad_to_multiple_of")) is not None:
        if type(multiple) is int and multiple > 0:
            merge.fields["pad_to_multiple_of"] = multiple
        else:
            merge.refuse("tokenizer.pad_to_multiple_of", f"is {multiple!r:.40}", "give a whole number, for example 64")
    if tokens := _tokens(merge, fields.get("tokens")):
        merge.fields["tokens"] = tokens


def _kept(merge: Merge, where: str, source: Any) -> str:
    if source == "union":
        return "union"
    if source == "base":
        return THETA0
    return _model(merge, where, source.removeprefix("model:") if isinstance(source, str) else source)


def _model(merge: Merge, where: str, value: Any) -> str:
    """A model of the merge, by its name there."""
    refused = len(merge.problems)
    path = reference(merge, value, where)
    name = next((task for task, one in merge.models.items() if one == path), THETA0 if path == merge.base else "")
    if not name and len(merge.problems) == refused and merge.models:
        what = f"is {path!r:.60}, which is none of the models"
        merge.refuse(where, what, "name one of them, or union, or base" if "source" in where else "name one of them")
    return name


def _tokens(merge: Merge, given: Any) -> dict[str, dict[str, Any]]:
    if given is not None and not isinstance(given, dict):
        merge.refuse("tokenizer.tokens", f"is {kind_of(given)}", "give {token: {source: …}}")
    tokens = mapping(given)
    if len(tokens) > _MOST:
        merge.refuse("tokenizer.tokens", f"are {len(tokens):,}", f"give at most {_MOST:,}")
        return {}
    found = {}
    for token, value in tokens.items():
        where = f"tokenizer.tokens.{token:.40}"
        if not isinstance(value, dict):
            merge.refuse(where, f"is {kind_of(value)}", "give {source: …}")
            continue
        unknown(merge, value, {"source", "force"}, f"{where}.")
        force = value.get("force", False)
        if not isinstance(force, bool):
            merge.refuse(f"{where}.force", f"is {force!r:.40}", "give true or false")
        row = _source(merge, f"{where}.source", value.get("source"))
        found[token] = row | ({"force": True} if force is True else {})
    return found


def _source(merge: Merge, where: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    kind = value.get("kind") if isinstance(value, dict) else None
    if is_word(value) or (isinstance(value, dict) and kind is None):
        return {"source": _model(merge, where, value)}
    if kind not in _KINDS:
        merge.refuse(where, f"is {value!r:.60}", f"give a model, or a kind: {', '.join(_KINDS)}")
        return {}
    unknown(merge, value, {"kind"} if kind == "zero" else {"kind", "model", "token", "token_id"}, f"{where}.")
    if kind == "zero":
        return {"source": "zero"}
    named = {name: value[name] for name in ("token", "token_id") if value.get(name) is not None}
    if len(named) != 1:
        merge.refuse(where, f"has {' and '.join(named) or 'neither token nor token_id'}", "give one of the two")
    return {"source": _model(merge, f"{where}.model", value.get("model")), **named}
