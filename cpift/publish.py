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
from cpift.disk.files import MANIFEST, file_sha256, json_text
from cpift.errors import ConfigError, Problem, StageError
from cpift.formats.safetensors import DtypeError, FormatError, read_header
from cpift.hub import HUB_ID, upload
from cpift.hub_card import card_of
from cpift.pretrained.architecture import CONFIG
from cpift.untrusted.json import MODEL_CONFIG, read_object, read_weight_map

if TYPE_CHECKING:
    pass

RECORD = "cpift.json"
_RUN_FILE = "cpift.yaml"
# What is sent beside weights. Whatever else lies in a model's folder (notes, states of a trainer, records that name
# files of this machine) stays here.
_SENT = (
    *("config.json", "generation_config.json", ADAPTER_CONFIG, EXTRACTION, "LICENSE*"),
    *("tokenizer*.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.*", "*processor_config.json"),
)
_HERE = ("output", "resources.address", "resources.storage", "evaluation.judge.url")  # places and services of one's own
_PLACES = ("_name_or_path", "name_or_path", "base_model_name_or_path", "tokenizer_file")  # keys of these that are paths


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
        return sum(
            len(content.encode()) if isinstance(content, str) else content.stat().st_size
            for content in self.files.values()
        )


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
        if run is not None and folder is not None:
            remedy = "`cpift run` of its file makes it again"
        what = "holds no model" if folder in (None, source) else f"lacks its model, {folder}"
        problems.append(Problem(str(source), what, remedy))
    if problems or folder is None:
        raise ConfigError("push", problems)
    _require_sound(folder)
    files = dict(_model_files(folder))
    written = {CARD: card_of(folder, run, repository), RECORD: _record(folder, files)}
    if run is not None:
        written[_RUN_FILE] = _shared(read_yaml(run / "config.yaml"))
    return Publication(repository, files | written)


def publish(planned: Publication, private: bool = True) -> str:
    """Send it as one commit; the commit's address. Raises HubError."""
    return upload(planned.repository, planned.files, private, RECORD, _listed, "Upload by cpift")


def _listed(record: Path) -> set[str]:
    """The names of all that was sent together with a record."""
    return {*read_object(record, MODEL_CONFIG)["sha256"], CARD, RECORD, _RUN_FILE}


def _last_model(run: Path) -> Path | None:
    name = read_object(run / "summary.json", MODEL_CONFIG).get("model")
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
        return None
    return run / name


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
        if path.is_file() and path not in weights and any(fnmatch.fnmatch(path.name, pattern) for pattern in _SENT):
            yield path.name, _without_places(path)


def _without_places(path: Path) -> Path | str:
    if not path.name.endswith("config.json"):
        return path
    config = read_object(path, MODEL_CONFIG)
    places = {key: Path(config[key]).name for key in _PLACES if Path(str(config.get(key) or "")).is_absolute()}
    return json_text(config | places) if places else path


def _require_sound(folder: Path) -> None:
    """Raise StageError where the bytes are not those that were written, or weights are no whole file."""
    if not (folder / MANIFEST).exists():  # somebody else's model, whose hashes nobody kept
        for file in (file for file in _weights(folder) if file.suffix == ".safetensors"):
            _require_whole(file)
        return
    try:
        state = state_of(folder, read_manifest(folder)["fingerprint"], thorough=True)
    except ValueError as error:
        raise StageError(f"{folder}: {error} → make the model again") from None
    if state.kind != "whole":
        raise StageError(f"{folder}: {state.why} → `cpift check` says what is damaged; the run makes it again")


def _require_whole(file: Path) -> None:
    try:
        read_header(file)
    except DtypeError:
        pass  # of a model that we could not merge, and whole
    except FormatError as error:
        raise StageError(f"{file}: {error} → get it again") from None


def _record(folder: Path, files: Mapping[str, Path | str]) -> str:
    """What the repository's bytes are: the model's fingerprint, the versions that made it, every file's sha256."""
    hashes = {name: _sha256(content) for name, content in files.items()}
    record = {}
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        record = {key: manifest.get(key) for key in ("stage", "fingerprint", "commit", "versions", "device", "started")}
    return json_text({**record, "sha256": hashes})


def _sha256(content: Path | str) -> str:
    return hashlib.sha256(content.encode()).hexdigest() if isinstance(content, str) else file_sha256(content)


def _shared(raw: dict[str, Any]) -> str:
    """A run's file for others: without what holds here alone, and of every path its last part."""
    for field in _HERE:
        *sections, key = field.split(".")
        part: Any = raw
        for section in sections:
            part = part.get(section) if isinstance(part, dict) else None
        if isinstance(part, dict):
            part.pop(key, None)
    for section, key, field in list(texts(raw)):
        if is_path(field) and Path(section[key]).is_absolute():
            section[key] = Path(section[key]).name
    return dump_fields(raw)
