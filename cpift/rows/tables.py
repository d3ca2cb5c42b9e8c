"""Rows out of Arrow's columns: Parquet, Arrow files and streams, and the folders that datasets' `save_to_disk` writes.

pyarrow checks what Parquet says of itself; what Arrow's own files say is checked here before a value is looked at.
Values are taken as they are stored: no picture or sound is decoded, and nothing that a row points at is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cpift.untrusted.json import MODEL_CONFIG, ROW, UnreadableError, opened, read_object

_BATCH = 256  # rows turned into Python's values at a time
_STATE, _SPLITS = "state.json", "dataset_dict.json"  # of a data set, and of several as splits
_RESTORE = "get it again"


def parquet(path: Path) -> Iterator[Any]:
    """The rows of a Parquet file. Raises UnreadableError."""
    import pyarrow.parquet as pq

    with _arrow_errors(path), opened(path) as file:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=_BATCH):
            yield from _rows(batch)


def arrow_file(path: Path) -> Iterator[Any]:
    """The rows of an Arrow file (Feather). Raises UnreadableError."""
    import pyarrow as pa

    def batches(source: Any) -> Iterator[Any]:
        reader = pa.ipc.open_file(source)
        return (reader.get_batch(number) for number in range(reader.num_record_batches))

    return _ipc(path, batches)


def arrow_stream(path: Path) -> Iterator[Any]:
    """The rows of an Arrow stream, as datasets keeps them. Raises UnreadableError."""
    import pyarrow as pa

    return _ipc(path, lambda source: iter(pa.ipc.open_stream(source)))


def _ipc(path: Path, batches: Callable[[Any], Iterator[Any]]) -> Iterator[Any]:
    import pyarrow as pa

    with opened(path):  # a regular file
        pass
    with _arrow_errors(path), pa.memory_map(str(path)) as source:
        for batch in batches(source):
            batch.validate(full=True)  # offsets that lead outside
            for start in range(0, batch.num_rows, _BATCH):
                yield from _rows(batch.slice(start, _BATCH))


def _rows(batch: Any) -> Iterator[Any]:
    if batch.nbytes <= ROW.size:
        yield from batch.to_pylist()
        return
    for place in range(batch.num_rows):
        row = batch.slice(place, 1)
        large = row.nbytes > ROW.size
        yield UnreadableError(f"has more than {ROW.size:,} bytes", "shorten it") if large else row.to_pylist()[0]


def saved_rows(folder: Path, split: str | None) -> Iterator[Any]:
    """The rows of a data set that datasets' `save_to_disk` wrote. Raises UnreadableError."""
    for file in saved_files(folder, split):
        if file.suffix == ".arrow":
            yield from arrow_stream(file)


def saved_files(folder: Path, split: str | None) -> list[Path]:
    """What `save_to_disk` wrote of a data set, or of a split of several. Raises UnreadableError."""
    if (folder / _SPLITS).is_file():
        folder = folder / _known_split(folder, split)
    if not (folder / _STATE).is_file():
        remedy = "give one of its files, or a folder that datasets' save_to_disk wrote"
        raise UnreadableError(f"is a folder without {_STATE}", remedy, str(folder))
    state = read_object(folder / _STATE, MODEL_CONFIG)
    if state.get("_indices_data_files") or state.get("_indices_files"):
        remedy = "load it with datasets and save it again"
        raise UnreadableError("chooses its rows by indices, as old releases of datasets did", remedy, str(folder))
    listed = state.get("_data_files")
    names = [entry.get("filename") for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    if not names or not all(isinstance(name, str) and _is_name(name) and name.endswith(".arrow") for name in names):
        raise UnreadableError(f"{_STATE} names no Arrow files of the folder", _RESTORE, str(folder))
    return [folder / _STATE, *(folder / str(name) for name in names)]


def splits_of(folder: Path) -> list[str]:
    """The splits of a folder of several data sets; none for one that is a data set itself. Raises UnreadableError."""
    if not (folder / _SPLITS).is_file():
        return []
    names = read_object(folder / _SPLITS, MODEL_CONFIG).get("splits")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and _is_name(name) for name in names):
        raise UnreadableError(f"{_SPLITS} names no splits", _RESTORE, str(folder))
    return names


def _known_split(folder: Path, split: str | None) -> str:
    names = splits_of(folder)
    if split not in names:
        raise UnreadableError(f"has no split {split!r}", f"set split to one of {', '.join(names)}", str(folder))
    return split


def _is_name(name: str) -> bool:
    return name not in ("", ".", "..") and not any(sign in name for sign in "/\\\0")


@contextmanager
def _arrow_errors(path: Path) -> Iterator[None]:
    """pyarrow's errors, of which some are OSError without a number, as ours."""
    import pyarrow as pa

    try:
        yield
    except UnreadableError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        what = f"cannot be read as Arrow's columns: {' '.join(str(error).split())[:200]}"
        raise UnreadableError(what, _RESTORE, str(path)) from None
