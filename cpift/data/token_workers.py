"""Rows as tokens, by as many processes as there are cores where rows are many.

Helpers are processes of their own, begun from nothing: a fork of a process with threads may hang, and
`multiprocessing` runs the user's script again. Each gets the tokenizer once, then examples in chunks.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import chain, islice
from queue import SimpleQueue
from typing import IO, TYPE_CHECKING, Any

from cpift.data.templates import checked_templates, serving
from cpift.data.tokenise import IGNORED, UNCUT, tokenise
from cpift.errors import CpiftError, DataError, Problem
from cpift.rows.examples import Example
from cpift.rows.shapes import size_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 250  # rows that a helper gets at once
_CHARACTERS = 2**21  # of them together, where rows are long: several chunks are in memory
_ALONE = 2000  # rows that are tokenised before helpers could have started
_MOST = 8  # helpers; more would wait for this process, which reads and writes the rows


@dataclass
class Chunk:
    """Examples as tokens, in order. `rows`: of those with something to learn, `input_ids` and `labels`, cut. `lengths`
    and `firsts`: of every example, tokens before it was cut, and where the first label is that counts (UNCUT: there is
    none). `problems`: with examples that cannot be written."""

    rows: list[dict[str, list[int]]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    firsts: list[int] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def tokenised(examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Iterator[Chunk]:
    """All examples, in chunks. Their templates were checked before.

    Raises:
        CpiftError: a helper ended.
    """
    chunks = _chunks(examples)
    for examples_first in islice(chunks, _ALONE // _CHUNK):
        yield _tokenised(examples_first, tokenizer, max_length)
    if (following := next(chunks, None)) is not None:
        yield from _by_helpers(chain([following], chunks), tokenizer, max_length)


def _chunks(examples: Iterable[Example]) -> Iterator[list[Example]]:
    chunk, size = list[Example](), 0
    for example in examples:
        chunk.append(example)
        size += size_of(example)
        if len(chunk) == _CHUNK or size >= _CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _tokenised(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Chunk:
    chunk = Chunk()
    with checked_templates():
        for example in examples:
            try:
                row = tokenise(example, tokenizer, UNCUT)
            except DataError as error:
                chunk.problems += error.problems
                continue
            labels = row["labels"]
            first = next((at for at in range(1, len(labels)) if labels[at] != IGNORED), UNCUT)
            chunk.lengths.append(len(labels))
            chunk.firsts.append(first)
            if first < max_length:
                chunk.rows.append({name: ids[:max_length] for name, ids in row.items()})
    return chunk


def _by_helpers(
    chunks: Iterable[Sequence[Example]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Iterator[Chunk]:
    """In the order of the chunks, of which few are on their way at a time."""
    count, idle = min(_cores(), _MOST), SimpleQueue[_Helper]()

    def one(examples: Sequence[Example]) -> Chunk:
        helper = idle.get()
        try:
            return helper.ask(examples)
        finally:  # one that ended too: who gets it is told at once
            idle.put(helper)

    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(count))  # left last: until then a thread waits for its helper
        for _ in range(count):
            idle.put(stack.enter_context(_Helper((tokenizer, max_length))))
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        on_their_way: deque[Future[Chunk]] = deque()
        for examples in chunks:
            on_their_way.append(pool.submit(one, examples))
            if len(on_their_way) > 2 * count:
                yield on_their_way.popleft().result()
        while on_their_way:
            yield on_their_way.popleft().result()


def _cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Helper:
    """A process that tokenises; it ends with the block."""

    def __init__(self, settings: tuple[PreTrainedTokenizerBase, int]):
        self._child = serving(__name__)
        self._settings: Any = settings

    def __enter__(self) -> _Helper:
        return self

    def ask(self, examples: Sequence[Example]) -> Chunk:
        """Raises CpiftError if it ended."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            if self._settings is not None:
                _send(self._child.stdin, self._settings)
                self._settings = None
            _send(self._child.stdin, examples)
            answer = _receive(self._child.stdout)
        except (OSError, EOFError):
            code = self._child.wait()
            raise CpiftError(
                f"a process that tokenises rows ended (exit code {code}) → the same command tries again; "
                "where memory ran out (-9), run fewer things at once"
            ) from None
        if isinstance(answer, BaseException):
            raise answer
        assert isinstance(answer, Chunk)
        return answer

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        for stream in (self._child.stdin, self._child.stdout):
            assert stream is not None
            with suppress(OSError):  # of what it will not read
                stream.close()
        self._child.wait()


def serve() -> None:
    """A helper: the tokenizer and `max_length`, then examples and their chunk, until input ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    try:
        tokenizer, max_length = _receive(sys.stdin.buffer)
        while True:
            examples = _receive(sys.stdin.buffer)
            try:
                answer: Any = _tokenised(examples, tokenizer, max_length)
            except Exception as error:
                answer = error
            _send(answers, answer)
    except (EOFError, BrokenPipeError):
        pass


def _send(stream: IO[bytes], value: Any) -> None:
    content = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    stream.write(len(content).to_bytes(8, "little") + content)
    stream.flush()


def _receive(stream: IO[bytes]) -> Any:
    """Raises EOFError where nothing more comes."""
    size = stream.read(8)
    content = stream.read(int.from_bytes(size, "little")) if len(size) == 8 else b""
    if not content or len(content) < int.from_bytes(size, "little"):
        raise EOFError
    return pickle.loads(content)  # of a process of ours
