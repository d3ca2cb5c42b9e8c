"""What a finished run left: its final model and its core regions, found by its summary and their manifests alone.

Rows and models that it was made from may be gone. Nothing in its folder is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from cpift.disk.artifacts import Artifact, artifact_at
from cpift.disk.files import digest, link_folder, read_json
from cpift.errors import ConfigError, Problem

CONFIG, _SUMMARY = "config.yaml", "summary.json"


@dataclass(frozen=True)
class Parent:
    """A finished run. `final`: its model; `regions`: the core regions of all tasks inside it."""

    root: Path
    final: Artifact
    regions: Artifact

    @cached_property
    def fingerprint(self) -> str:
        """Of the bytes of its final model and of its core regions."""
        outputs = [one.manifest()["outputs"] for one in (self.final, self.regions)]
        return digest([self.final.fingerprint, self.regions.fingerprint, *outputs])

    @property
    def made_of(self) -> Mapping[str, str]:
        """Fingerprints of θ0, `model`, and of every task's fine-tune, `probe <task>`."""
        return self.regions.inputs

    def probe(self, task: str) -> Artifact | None:
        """The fine-tune of a task that the run trained, as it lies there; None of one that was given, or is gone."""
        value = self.made_of.get(f"probe {task}", "")
        return artifact_at(self.root / "probe" / f"{task}-{value[:12]}")

    def knows_regions(self, wanted: Artifact, task: str) -> bool:
        """Whether it selected this task's region as `wanted` would: of the same models, in the same way."""
        same = (self.regions.version, self.regions.fields) == (wanted.version, wanted.fields)
        known = ("model", f"probe {task}", f"moments {task}")  # moments only where they were given, and read
        return same and all(self.made_of.get(name) == wanted.inputs.get(name) for name in known)

    def has(self, artifact: Artifact) -> bool:
        """Whether it made the same, and that is there with its weights."""
        return replace(artifact, root=self.root).has_weights

    def hand_over(self, artifact: Artifact) -> None:
        """Give an artifact that is not there what the run made under the same fingerprint, if it is sound: by second
        names of the files where the file system has them. The caller holds the artifact."""
        own = replace(artifact, root=self.root)
        if artifact.state().kind == "absent" and own.state(thorough=True).kind == "whole":
            artifact.path.parent.mkdir(parents=True, exist_ok=True)
            link_folder(own.path, artifact.path)


def read_parent(root: Path, field: str = "RUN") -> Parent:
    """The finished run in a folder; `field` names it in messages. Raises ConfigError where it is none, or damaged."""

    def problem(what: str, remedy: str) -> ConfigError:
        return ConfigError(f"run {root}", [Problem(field, what, remedy)])

    if not root.is_dir():
        raise problem(f"{root} is no folder", "give the output folder of a finished run")
    if not (root / _SUMMARY).is_file() or not (root / CONFIG).is_file():
        what = f"{root} holds no finished run: its report is not there"
        raise problem(what, "finish it first: the command that began it goes on; or give another folder")
    try:
        last = root / str(read_json(root / _SUMMARY)["model"])
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise problem(f"{_SUMMARY} of {root} cannot be used ({error})", _again(root)) from None
    if last.parent != root / "integrate":
        raise problem(f"{root} has no final model, only {last.name!r}", "give a run with `integration`")
    final = _sound(last, problem)
    regions = _sound(root / "regions" / final.inputs.get("regions", "")[:12], problem, thorough=True)
    if regions.fingerprint != final.inputs["regions"]:
        raise problem(f"{regions.path} are other core regions than {last} was made with", _again(root))
    return Parent(root, final, regions)


def _sound(folder: Path, problem: Callable[[str, str], ConfigError], thorough: bool = False) -> Artifact:
    """The artifact in a folder, with all of its files."""
    artifact = artifact_at(folder)
    if artifact is None:
        raise problem(f"{folder} is not there, or not as it was written", _again(folder.parents[1]))
    state = artifact.state(thorough)
    if state.kind != "whole":
        what = {"dropped": "has no weights any more"}.get(state.kind, f"is damaged ({state.why})")
        raise problem(f"{folder} {what}", _again(folder.parents[1]))
    return artifact


def _again(root: Path) -> str:
    return f"make it again: cpift run {root / CONFIG} --output={root}"
