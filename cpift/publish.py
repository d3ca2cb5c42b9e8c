"""A model on the Hugging Face hub: what of a run's output or of a model folder is sent, and the card that says what it
is. Nothing of the machine goes along: paths in the run's file keep their last part alone."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpift.checkpoints.checkpoint import INDEX_FILE, SINGLE_FILE
from cpift.checkpoints.lora_config import ADAPTER_CONFIG
from cpift.checkpoints.lora_extraction import RECORD as EXTRACTION
from cpift.checkpoints.lora_files import ADAPTER_WEIGHTS
from cpift.config.loading import dump_fields, read_yaml
from cpift.config.paths import is_path, texts
from cpift.disk.artifact_state import read_manifest, state_of
from cpift.disk.artifacts import CARD
from cpift.disk.files import MANIFEST, file_sha256, json_text, read_json
from cpift.errors import ConfigError, Problem, StageError
from cpift.evaluation.estimates import estimate
from cpift.evaluation.scores import Score, read_scores
from cpift.hub import HUB_ID, upload
from cpift.pretrained.architecture import CONFIG
from cpift.untrusted.json import MODEL_CONFIG, read_object, read_weight_map

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

RECORD = "cpift.json"
_RUN_FILE = "cpift.yaml"
# What is sent beside weights. Whatever else lies in a model's folder (notes, states of a trainer, records that name
# files of this machine) stays here.
_SENT = (
    *("config.json", "generation_config.json", ADAPTER_CONFIG, EXTRACTION, "LICENSE*"),
    *("tokenizer*.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.*", "*processor_config.json"),
)
_PLACES = ("_name_or_path", "name_or_path", "base_model_name_or_path", "tokenizer_file")  # keys of these that are paths
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Publication:
    """What is sent: by name in the repository a file of the disk, or a text that is made for it."""

    repository: str
    files: Mapping[str, Path | str]

    @property
    def card(self) -> str:
        return str(self.files[CARD])

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(len(one.encode()) if isinstance(one, str) else one.stat().st_size for one in self.files.values())


def publication(source: Path, repository: str) -> Publication:
    """What `publish` would send of a run's output folder (its last model) or of one model's or adapter's folder.

    Raises ConfigError where the folder or the repository's name is none, and StageError where the model is no longer
    what the run wrote.
    """
    problems = []
    if not HUB_ID.fullmatch(repository):
        problems.append(Problem("--to", f"{repository!r} is no name of a repository", "give org/name"))
    run, folder = (source, _last_model(source)) if (source / "summary.json").is_file() else (None, source)
    if folder is None or not _weights(folder):
        remedy = "give the output folder of a finished run, or a folder with config.json and safetensors"
        problems.append(Problem(str(source), "holds no model", remedy))
    if problems or folder is None:
        raise ConfigError("push", problems)
    _require_sound(folder)
    files = dict(_model_files(folder))
    made = {CARD: _card(folder, run, repository), RECORD: _record(folder, files)}
    if run is not None:
        made[_RUN_FILE] = _shared(read_yaml(run / "config.yaml"))
    return Publication(repository, files | made)


def publish(found: Publication, private: bool = True) -> str:
    """Send it as one commit; the commit's address. Raises HubError."""
    return upload(found.repository, found.files, private, RECORD, _listed, "Upload by cpift")


def _listed(record: Path) -> set[str]:
    """The names of all that was sent together with a record."""
    return {*read_object(record, MODEL_CONFIG)["sha256"], CARD, RECORD, _RUN_FILE}


def _last_model(run: Path) -> Path | None:
    name = read_json(run / "summary.json").get("model")
    return run / name if isinstance(name, str) else None


def _weights(folder: Path) -> list[Path]:
    """The files of a model's or an adapter's weights, with their index; none if one is missing, or the config."""
    if (folder / INDEX_FILE).is_file():
        names = [INDEX_FILE, *sorted(set(read_weight_map(folder / INDEX_FILE).values()))]
    else:
        names = [ADAPTER_WEIGHTS if (folder / ADAPTER_CONFIG).is_file() else SINGLE_FILE]
    files = [folder / name for name in names]
    config = folder / (ADAPTER_CONFIG if (folder / ADAPTER_CONFIG).is_file() else CONFIG)
    return files if all(file.is_file() for file in (*files, config)) else []


def _model_files(folder: Path) -> Iterator[tuple[str, Path | str]]:
    """A model's files by name; what names a place of this machine without it."""
    weights = _weights(folder)
    yield from ((path.name, path) for path in weights)
    for path in sorted(folder.iterdir()):
        if path.is_file() and path not in weights and any(fnmatch.fnmatch(path.name, one) for one in _SENT):
            yield path.name, _without_places(path)


def _without_places(path: Path) -> Path | str:
    if not path.name.endswith("config.json"):
        return path
    found = read_object(path, MODEL_CONFIG)
    places = {key: Path(found[key]).name for key in _PLACES if Path(str(found.get(key) or "")).is_absolute()}
    return json_text(found | places) if places else path


def _require_sound(folder: Path) -> None:
    """Raise StageError where the bytes are not those that were written."""
    if not (folder / MANIFEST).exists():
        return  # somebody else's model, whose hashes nobody kept
    try:
        state = state_of(folder, read_manifest(folder)["fingerprint"], thorough=True)
    except ValueError as error:
        raise StageError(f"{folder}: {error} → make the model again") from None
    if state.kind != "whole":
        raise StageError(f"{folder}: {state.why} → `cpift check` says what is damaged; the run makes it again")


def _record(folder: Path, files: Mapping[str, Path | str]) -> str:
    """What the repository's bytes are: the model's fingerprint, the versions that made it, every file's sha256."""
    hashes = {name: _sha256(content) for name, content in files.items()}
    made = {}
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        made = {key: manifest.get(key) for key in ("stage", "fingerprint", "commit", "versions", "device", "started")}
    return json_text({**made, "sha256": hashes})


def _sha256(content: Path | str) -> str:
    return hashlib.sha256(content.encode()).hexdigest() if isinstance(content, str) else file_sha256(content)


def _shared(raw: dict[str, Any]) -> str:
    """A run's file for others: without the output folder, and of every path its last part."""
    raw.pop("output", None)
    for section, key, field in list(texts(raw)):
        if is_path(field) and Path(section[key]).is_absolute():
            section[key] = Path(section[key]).name
    return dump_fields(raw)


# ---- the card --------------------------------------------------------------------------------------------------------


def _card(folder: Path, run: Path | None, repository: str) -> str:
    """The model's own card with what the hub shows: base models, data sets, scores with their intervals."""
    from huggingface_hub import ModelCard, ModelCardData

    own = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else _new_card(folder, repository)
    card = ModelCard(own, ignore_metadata_errors=True)
    known: dict[str, Any] = card.data.to_dict()  # type: ignore[no-untyped-call]  # the library declares no result
    if run is not None:
        raw = read_yaml(run / "config.yaml")
        bases, sets = _sources(raw)
        known |= {"base_model": bases} if bases else {}
        known |= {"datasets": sets} if sets else {}
        known |= {"model_name": repository.rpartition("/")[2], "eval_results": list(_results(run, folder, raw))}
    if not known.get("eval_results"):
        known.pop("eval_results", None)
    card.data = ModelCardData(**known)
    return str(card)


def _new_card(folder: Path, repository: str) -> str:
    """For a folder without a card; of an adapter that was extracted, what its rank lost."""
    lines = ["---", "tags: [cpift]"]
    about = "A language model."
    if (folder / ADAPTER_CONFIG).is_file():
        base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or ""
        lines += ["library_name: peft", *([f'base_model: "{base}"'] if HUB_ID.fullmatch(base) else [])]
        about = "A LoRA adapter."
    if (folder / EXTRACTION).is_file():
        found = read_json(folder / EXTRACTION)
        lost = f"{found['relative']:.1%} of the change is lost (Frobenius norms of the weights)"
        about = f"A LoRA adapter of rank {found['rank']} of what a fine-tune changed; {lost}."
    return "\n".join([*lines, "---", "", f"# {repository.rpartition('/')[2]}", "", about, ""])


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
    found = estimate([100 * row for row in rows], _CONFIDENCE)
    if found.high is None or found.high == found.low:
        return ""
    return f", ±{found.high - found.mean:.1f} ({_CONFIDENCE:.0%})"
