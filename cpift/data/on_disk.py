"""Rows of token ids in a file that is mapped, not read: data sets may be larger than memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

Row = dict[str, list[int]]
_BATCH = 1000  # rows held while writing
_NUMBERS = 2**23  # in them, where rows are long


def rows_on_disk(rows: Iterable[Row], file: Path) -> Dataset:
    """A map-style data set of `rows`, which are read once and written to `file` in their order.

    All rows have the same columns, each a list of integers below 2^31. What an earlier call left in `file` is replaced.
    """
    import pyarrow as pa
    from datasets import Dataset

    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    batches = _batches(rows)
    first = next(batches, [])
    schema = pa.schema({name: pa.list_(pa.int32()) for name in (first or [{}])[0]})
    with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for batch in chain([first], batches):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
    os.replace(partial, file)
    return Dataset.from_file(str(file))


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    batch, numbers = list[Row](), 0
    for row in rows:
        batch.append(row)
        numbers += sum(map(len, row.values()))
        if len(batch) == _BATCH or numbers >= _NUMBERS:
            yield batch
            batch, numbers = [], 0
    if batch:
        yield batch
