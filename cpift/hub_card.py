"""The card of a model on the hub: its own README with what the hub shows, base models, data sets, scores with their
intervals. What others wrote into a README is checked before it is read; places of this machine are left out of its
metadata."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpift.checkpoints.lora_config import ADAPTER_CONFIG
from cpift.checkpoints.lora_extraction import RECORD as EXTRACTION
from cpift.config.loading import read_yaml
from cpift.disk.artifact_state import read_manifest
from cpift.disk.artifacts import CARD
from cpift.disk.files import MANIFEST
from cpift.evaluation.estimates import estimate
from cpift.evaluation.scores import Score, read_scores
from cpift.hub import HUB_ID
from cpift.untrusted.json import ADAPTER, MODEL_CONFIG, UnreadableError, decoded, read_object, read_with
from cpift.untrusted.yaml import parse_yaml

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

_CONFIDENCE = 0.95
_FRONT = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)


def card_of(folder: Path, run: Path | None, repository: str) -> str:
    """The model's own card, or a new one, with what the hub shows. Raises CpiftError naming what cannot be used."""
    own = _own_card(folder) if (folder / CARD).is_file() else _new_card(folder, repository)
    known = _metadata(own, folder / CARD)
    if run is not None:
        known |= {"model_name": repository.rpartition("/")[2]} | _of_run(run, folder)
    return _with_metadata(own, {key: value for key, value in known.items() if value not in (None, [], {})})


def _own_card(folder: Path) -> str:
    text: str = read_with(folder / CARD, ADAPTER, decoded)
    return text


def _metadata(text: str, path: Path) -> dict[str, Any]:
    """What stands between the first two lines of `---`, without places of this machine."""
    from huggingface_hub import ModelCard

    front = _FRONT.match(text)
    try:
        metadata = parse_yaml(front[1], ADAPTER) if front else None
    except UnreadableError as error:
        raise UnreadableError(f"its metadata {error.what}", "mend what stands between its `---`", str(path)) from None
    if metadata is None:
        return {}
    if not isinstance(metadata, dict):
        raise UnreadableError("its metadata is no mapping", "write `key: value` between its `---`", str(path))
    card = ModelCard(text, ignore_metadata_errors=True)
    known: dict[str, Any] = card.data.to_dict()  # type: ignore[no-untyped-call]  # the library declares no result
    bases = known.get("base_model") or []
    known["base_model"] = [name for name in (bases if isinstance(bases, list) else [bases]) if _on_hub(name)]
    return {key: _without_places(value) for key, value in known.items()}


def _on_hub(name: object) -> bool:
    return isinstance(name, str) and HUB_ID.fullmatch(name) is not None


def _without_places(value: Any) -> Any:
    """A value of a README's metadata, with every absolute path's last part alone."""
    if isinstance(value, dict):
        return {key: _without_places(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_places(part) for part in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _with_metadata(text: str, known: Mapping[str, Any]) -> str:
    from huggingface_hub import ModelCardData

    body = _FRONT.sub("", text, count=1)
    return f"---\n{ModelCardData(**known)}\n---\n{body}" if known else body


def _new_card(folder: Path, repository: str) -> str:
    """For a folder without a card; of an adapter that was extracted, what its rank lost."""
    lines = ["---", "tags: [cpift]"]
    about = "A language model."
    if (folder / ADAPTER_CONFIG).is_file():
        base = read_object(folder / ADAPTER_CONFIG, ADAPTER).get("base_model_name_or_path")
        lines += ["library_name: peft", *([f'base_model: "{base}"'] if _on_hub(base) else [])]
        about = "A LoRA adapter."
    if (folder / EXTRACTION).is_file():
        rank, relative = _extraction(folder / EXTRACTION)
        lost = f"{relative:.1%} of the change is lost (Frobenius norms of the weights)"
        about = f"A LoRA adapter of rank {rank} of what a fine-tune changed; {lost}."
    return "\n".join([*lines, "---", "", f"# {repository.rpartition('/')[2]}", "", about, ""])


def _extraction(path: Path) -> tuple[int, float]:
    """Rank and relative error of an adapter, as `extract-lora` recorded them."""
    record = read_object(path, MODEL_CONFIG)
    rank, relative = record.get("rank"), record.get("relative")
    if not (isinstance(rank, int) and isinstance(relative, float)):
        raise UnreadableError("is no record of extract-lora", "remove it, or extract again", str(path))
    return rank, relative


def _of_run(run: Path, folder: Path) -> dict[str, Any]:
    """What a run's records say of its last model."""
    raw = read_yaml(run / "config.yaml")
    try:
        bases, sets = _sources(raw)
        results = list(_results(run, folder, raw))
    except (AttributeError, KeyError, TypeError) as error:  # somebody changed them
        what = f"its config.yaml or scores are not as a run writes them ({type(error).__name__}: {error})"
        raise UnreadableError(what, "`cpift run` of its file writes them again", str(run)) from None
    known: dict[str, Any] = {"eval_results": results}
    return known | ({"base_model": bases} if bases else {}) | ({"datasets": sets} if sets else {})


def _sources(raw: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The hub's models that a run started from, θ0 first, and the hub's data sets that it trained on."""
    models, sets = [raw.get("model", {}).get("hub")], []
    for task in raw.get("tasks", ()):
        models.append((task.get("checkpoint") or {}).get("hub"))
        sets.append((task.get("train") or {}).get("hub"))
    return [one for one in dict.fromkeys(models) if one], [one for one in dict.fromkeys(sets) if one]


def _results(run: Path, folder: Path, raw: Mapping[str, Any]) -> Iterator[EvalResult]:
    """Every task's score of the run's last model, with its interval over the test rows."""
    from huggingface_hub import EvalResult

    fingerprint = read_manifest(folder)["fingerprint"]
    scores = _scores(run, fingerprint)
    for task in raw.get("tasks", ()):
        score = scores.get(task["name"])
        if score is None:
            continue
        test = task.get("test") or {}
        value, kind = (score["loss"], "loss") if score["score"] is None else (100 * score["score"], score["metric"])
        yield EvalResult(
            task_type="text-generation",
            dataset_type=test.get("hub") or task["name"],
            dataset_name=task["name"],
            dataset_split=test.get("split"),
            metric_type=kind,
            metric_name=f"{kind}, {score['rows']} rows{_interval(score)}",
            metric_value=round(value, 3),
        )


def _scores(run: Path, fingerprint: str) -> dict[str, Score]:
    """By task, of the model of this fingerprint; empty where it was not scored."""
    for folder in sorted((run / "evaluate").glob("*")):
        if (folder / MANIFEST).is_file() and fingerprint in read_manifest(folder)["inputs"].values():
            return read_scores(folder)
    return {}


def _interval(score: Score) -> str:
    examples = score.get("examples", [])
    rows = [row["score"] for row in examples if "score" in row]
    if score["score"] is None or len(rows) < max(2, len(examples)):
        return ""
    interval = estimate([100 * row for row in rows], _CONFIDENCE)
    if interval.high is None or interval.high == interval.low:
        return ""
    return f", ±{interval.high - interval.mean:.1f} ({_CONFIDENCE:.0%})"
