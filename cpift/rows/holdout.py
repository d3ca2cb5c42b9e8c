"""Which rows of a task are held out of training: those whose prompt has the lowest hashes.

So the order of rows does not matter, rows of the same prompt are on the same side, and rows added later move
few.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterable

from cpift.config.inputs import Holdout
from cpift.rows.examples import Example
from cpift.rows.shapes import size_of


def held_key(example: Example, holdout: Holdout) -> int | None:
    """The hash of a row's prompt, of a plain text that of the text; 128 bits. None for a row that is never held out."""
    if holdout.max_characters is not None and size_of(example) > holdout.max_characters:
        return None
    text = json.dumps([holdout.seed, [[turn.role, turn.content] for turn in example.distinct], example.tools])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")


def last_held(keys: Iterable[int | None], rows: int) -> tuple[int | None, int]:
    """The lowest key up to which there are `rows` rows, None where there are too few or no other is left; and how many
    rows could be held out.

    At most `rows` keys are kept.
    """
    counts: dict[int, int] = {}  # of the lowest keys seen so far
    highest: list[int] = []  # these keys, negative, as a heap
    total = others = 0
    for key in keys:
        total += key is not None
        others += key is None
        if key is None:
            continue
        if key in counts:
            counts[key] += 1
        elif len(highest) < rows:
            heapq.heappush(highest, -key)
            counts[key] = 1
        elif key < -highest[0]:
            del counts[-heapq.heappushpop(highest, -key)]
            counts[key] = 1
    held = 0
    for key in sorted(counts):
        held += counts[key]
        if held >= rows:
            return (key if held < total + others else None), total
    return None, total
