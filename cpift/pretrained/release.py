"""The releases of transformers whose ways are known well enough to go without importing all of it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from cpift.disk.facts import releases

# What is said here without asking the library holds of these: tests compare the two. Any other release is asked itself,
# which takes longer.
CHECKED = ("5.23.0",)


def checked_release() -> str | None:
    """The installed release of transformers where it is one of CHECKED, as it was released; else None."""
    installed = releases() or ()
    return next((release for release in CHECKED if f"transformers {release}" in installed), None)


def without_index() -> None:
    """Have files of `transformers.utils` imported in this process without what their packages import first: the names
    of all models, the hub's client. For a process that needs such a file and nothing else of the library."""
    spec, release = importlib.util.find_spec("transformers"), checked_release()
    if spec is None or release is None or "transformers" in sys.modules:
        return
    folder = Path(next(iter(spec.submodule_search_locations or ())))
    for name, place in (("transformers", folder), ("transformers.utils", folder / "utils")):
        package = ModuleType(name)
        package.__path__, package.__version__ = [str(place)], release  # type: ignore[attr-defined]  # its files ask for it
        sys.modules[name] = package
