"""GGUF files: the packages that ship them, and what transformers does again and again while it loads one, done once."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path


@contextmanager
def read_once() -> Iterator[None]:
    """Inside, a file's header is read once, not for configuration, weights and tokenizer each, and the table of its
    architecture's names is made once, not for every module. Together that is most of what a small model takes."""
    import gguf

    makers = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, maker in makers.items():
            setattr(gguf, name, cache(maker))
        yield
    finally:
        for name, maker in makers.items():
            setattr(gguf, name, maker)


def package_folder(name: str) -> Path | None:
    """The folder of an installed package, dotted or not, None if there is none. Nothing of it is imported."""
    first, *rest = name.split(".")
    if not all(part.isidentifier() for part in (first, *rest)) or first == "__main__":
        return None
    spec = importlib.util.find_spec(first)
    for part in rest:  # find_spec of a dotted name would import what stands before the last dot
        spec = None if spec is None else PathFinder.find_spec(part, spec.submodule_search_locations)
    locations = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(locations[0]) if locations else None
