"""A run at work: what its stages take, and how an output is made, trained or found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from cpift.checkpoints.opening import model_files
from cpift.console.view import View
from cpift.disk.artifact_state import note_times
from cpift.disk.artifacts import Artifact, claimed, require_sound
from cpift.disk.guarded import guarded_reads
from cpift.errors import DamagedInput
from cpift.pipeline.engine import Engine, Finish, train_all
from cpift.pipeline.stages.names import Names
from cpift.training.spec import FitSpec

Given = ParamSpec("Given")
Result = TypeVar("Result")
Working = TypeVar("Working", bound="Run")
Fit = tuple[Artifact, FitSpec]  # a fine-tune, and what it exports for
_DAMAGED_AT_MOST = 100  # inputs that come out damaged in one stage


class Run:
    """One run: its config, the names of its outputs, and where it works."""

    artifacts: Names

    def __init__(self, artifacts: Names, engine: Engine, view: View):
        self.artifacts, self.config, self.root = artifacts, artifacts.config, artifacts.root
        self.engine, self.view = engine, view
        self.merging = engine.merging.telling(view.note) if engine.merging else None
        self.worked = False  # whether any stage had to be made
        self.said: set[str] = set()  # what was told of already

    @contextmanager
    def session(self) -> Iterator[None]:
        """Keep one connection to where things run over several stages."""
        with self.merging.session() if self.merging else nullcontext(), self.engine.session():
            yield

    def hand_over(self, artifacts: Iterable[Artifact]) -> None:
        """Take what the run that this one goes on from has made of these."""
        parent = self.artifacts.parent
        wanted = [one for one in artifacts if parent and one.state().kind == "absent" and parent.has(one)]
        if parent and wanted:
            with claimed(wanted, self.view.warn):
                for artifact in wanted:
                    parent.hand_over(artifact)

    def make(
        self, artifact: Artifact, title: str, build: Callable[[Path], None], read: Sequence[Path] = ()
    ) -> Artifact:
        """Make an artifact unless it is there; `read`: the folders that are read for it."""
        masks = artifact.stage == "regions"  # all of their bytes are looked at every time
        if artifact.state(thorough=masks).kind == "whole":
            note_times(artifact.path)
            self.say_cached(title)
            return artifact
        with claimed([artifact], self.view.warn):
            artifact.set_aside_if_damaged(self.view.warn, thorough=masks)
            if artifact.has_weights:  # another process made it while this one waited
                return artifact
            require_sound(read, self.root, self.view.warn)
            self.begin(title)
            from cpift.devices import device_name

            files = [file for folder in read for file in model_files(folder)]
            with (
                artifact.compared(self.view.warn),
                self.view.stage(title),
                artifact.build(device_name()) as out,
                guarded_reads(artifact.title, files),
            ):
                build(out)
        return artifact

    def train(
        self,
        artifacts: Iterable[Artifact],
        title: str,
        specs: Callable[[], Sequence[FitSpec]],
        finish: Finish = lambda artifact, out: None,
    ) -> None:
        """Run the fine-tunes whose artifacts are missing, and keep what each exported."""
        artifacts = list(artifacts)
        missing = [artifact for artifact in artifacts if not artifact.has_weights]
        for artifact in artifacts:
            if artifact not in missing:
                note_times(artifact.path)
        if not missing:
            self.say_cached(title)
            return
        self.begin(title)
        train_all(self.engine, self.view, title, missing, specs(), finish)

    def begin(self, title: str) -> None:
        """Something is made: it is announced, and nothing is cached that has this title."""
        self.said.add(title)
        self.worked = True

    def say_cached(self, title: str) -> None:
        """Once for each title."""
        if title not in self.said:
            self.said.add(title)
            self.view.cached(title)


def unless_damaged(
    stage: Callable[Concatenate[Working, Given], Result],
) -> Callable[Concatenate[Working, Given], Result]:
    """A stage that begins again where an input came out damaged: it was set aside, so this time it is made."""

    @wraps(stage)
    def made(run: Working, /, *args: Given.args, **kwargs: Given.kwargs) -> Result:
        for _ in range(_DAMAGED_AT_MOST):
            try:
                return stage(run, *args, **kwargs)
            except DamagedInput:
                continue
        return stage(run, *args, **kwargs)

    return made
