"""Where Ray Train keeps the checkpoints of a fine-tune that runs: a folder, or an object store."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpift.disk.files import link_folder
from cpift.disk.object_store import ObjectStore
from cpift.training.spec import FitSpec
from cpift.untrusted.json import RECORD, parse_json

RUN = "fit"  # Ray's name of the run, a folder of its storage
_SNAPSHOT = "checkpoint_manager_snapshot.json"


@dataclass(frozen=True)
class FitStorage:
    """`place`: an absolute folder or a URI, of one fine-tune alone."""

    place: str

    @classmethod
    def of(cls, spec: FitSpec) -> FitStorage:
        root = spec.resources.storage
        if root is None:
            return cls(str(spec.scratch / "ray"))
        if not spec.remote_storage:
            return cls(f"{Path(root).absolute()}/{spec.scratch.name}")
        return cls(ObjectStore(root).folder(spec.scratch.name).place)

    def drop_damaged_state(self) -> None:
        """Forget a run whose snapshot a crash left half written, which would block its name."""
        filesystem, path = self._open()
        try:
            with filesystem.open_input_stream(f"{path}/{RUN}/{_SNAPSHOT}") as file:
                parse_json(file.read(), RECORD)
        except FileNotFoundError:
            return
        except ValueError:
            self.drop()

    def keep(self, folder: Path, name: str) -> Path:
        """Give a checkpoint a name in a local storage too, without writing it a second time."""
        target = Path(self.place) / RUN / name
        link_folder(folder, target)
        return target

    def drop(self) -> None:
        """Remove everything there."""
        filesystem, path = self._open()
        try:
            filesystem.delete_dir(path)
        except FileNotFoundError:
            return

    def _open(self) -> tuple[Any, str]:
        from pyarrow.fs import FileSystem

        opened: tuple[Any, str] = FileSystem.from_uri(self.place)
        return opened
