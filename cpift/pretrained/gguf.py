"""What transformers does again and again while it loads a GGUF file, done once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache


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
