"""The releases of transformers whose ways are known well enough to go without importing all of it."""

from __future__ import annotations

import importlib.util
import sys
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
    """Have files of transformers imported in this process without what `import transformers` does first: read the
    source of every model. For a process that needs one of them, and nothing of the library's top."""
    spec, release = importlib.util.find_spec("transformers"), checked_release()
    if spec is None or release is None or "transformers" in sys.modules:
        return
    package = ModuleType("transformers")
    package.__spec__, package.__path__ = spec, list(spec.submodule_search_locations or ())
    package.__version__ = release  # type: ignore[attr-defined]  # its files ask for it
    sys.modules["transformers"] = package
