"""θ0: a copy that fine-tunes start from; runs that only merge read it where it lies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cpift.checkpoints.opening import as_read, pinned
from cpift.config.run import ModelConfig
from cpift.disk.artifacts import Artifact
from cpift.disk.input_watch import unchanged
from cpift.models.sources import materialise, model_fingerprint, source_files, source_of
from cpift.pipeline.run import Run
from cpift.pipeline.stages.names import Known, ModelRef, Names, once
from cpift.pipeline.stages.step import Step, step_of

VERSION = 1


@once
def source(names: Names) -> ModelConfig:
    """Where θ0 comes from; a hub repository at one commit."""
    return pinned(names.config.model)


def in_place(names: Names) -> bool:
    """Whether θ0 is used where it lies."""
    model = names.config.model
    return names.config.merges_only and model.dtype == "auto" and source_of(model).in_place


def copy_of(names: Names, field: str, label: str, copied: ModelConfig) -> Artifact:
    """A copy of a model as fine-tunes start from it. `field`: what names it in the config; `copied`: pinned."""
    value = names.watch.identify(field, lambda: source_files(copied), lambda: model_fingerprint(copied))
    return names.artifact("model", VERSION, {"source": value}, {}, label)


@once
def artifact(names: Names) -> Artifact:
    """The copy, named by where θ0 comes from."""
    return copy_of(names, "model", "", source(names))


@once
def base(names: Names) -> ModelRef:
    """θ0: where it lies if nothing is trained from it, else the copy."""
    if in_place(names):
        return names.input_model("base", "model", names.config.model, as_read)
    return ModelRef.of("base", artifact(names))


def make(run: Run) -> ModelRef:
    """θ0 as a safetensors folder."""
    if not in_place(run.artifacts):
        run.hand_over([artifact(run.artifacts)])
        run.make(
            artifact(run.artifacts),
            title(run.artifacts),
            lambda out: copy(source(run.artifacts), out, not run.config.merges_only),
        )
    return base(run.artifacts)


def copy(copied: ModelConfig, out: Path, chats: bool) -> None:
    """Write a model into `out` (`materialise`). Raises ChangedInput where a hub's files change while they are read."""
    origin = source_of(copied)
    with unchanged(f"the copy of {origin.description}", origin.fetched()):
        materialise(copied, out, chats)


def title(names: Names) -> str:
    return "" if in_place(names) else "model θ0"


def plan(names: Names, known: Known) -> Iterator[Step]:
    said = source_of(names.config.model).description
    yield Step("model", "", "given", said) if in_place(names) else step_of(artifact(names), said, names.parent)


def outputs(names: Names, known: Known) -> dict[str, Artifact]:
    return {} if in_place(names) else {"model": artifact(names)}


def models(names: Names, known: Known) -> list[ModelRef]:
    return [base(names)]
