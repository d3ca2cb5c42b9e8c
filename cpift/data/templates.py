"""Chat templates: text that came with a model, and a program. Rendered by transformers in jinja's sandbox, with limits.

A sandbox keeps a template from Python's objects; it does not keep it from looping or from building gigabytes. So the
first renderings of a template, those of `plan` and of all checks before training, run in a child process with limits on
its processor time and memory (`Renderer`). Workers that train and score after these checks render in their own process.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, BinaryIO

from cpift.pretrained.release import without_index

SECONDS = 10.0  # of processor time for the renderings of one row
MEMORY = 2**29  # bytes, beyond what the child has after its imports
TEXT = 2**24  # characters of one rendering
ASKS_TODAY = "strftime_now"  # what transformers lets templates ask for the time
_SHOWN = 300  # of a template's own message
_checked = contextvars.ContextVar("checked", default=False)

Conversation = Mapping[str, Any]  # messages, tools and add_generation_prompt, as transformers' templates take them


class TemplateError(ValueError):
    """A chat template that is none, refuses a conversation, fails or exceeds a limit; the message says which."""


@contextlib.contextmanager
def checked_templates() -> Iterator[None]:
    """Within it templates are rendered in this process: the rows were checked by another one before."""
    token = _checked.set(True)
    try:
        yield
    finally:
        _checked.reset(token)


def rendered(template: str, variables: Mapping[str, Any], conversations: Sequence[Conversation]) -> list[str]:
    """The text of each conversation. `variables`: the tokenizer's special tokens by name. Raises TemplateError."""
    if _checked.get():
        return _render(template, variables, conversations)
    return renderer().render(template, variables, conversations)


def _render(template: str, variables: Mapping[str, Any], conversations: Sequence[Conversation]) -> list[str]:
    from transformers.utils.chat_template_utils import render_jinja_template

    texts = []
    for conversation in conversations:
        try:
            fields = {"conversations": [conversation["messages"]], "tools": conversation["tools"]}
            again = {"add_generation_prompt": conversation["add_generation_prompt"], **variables}
            text = render_jinja_template(chat_template=template, **fields, **again)[0][0]
        except Exception as error:  # whatever a foreign program raises
            raise TemplateError(_explain(error)) from None
        if len(text) > TEXT:
            raise TemplateError(f"writes more than {TEXT:,} characters")
        texts.append(text)
    return texts


def _explain(error: Exception) -> str:
    import jinja2

    if isinstance(error, MemoryError):
        return f"needs more than {MEMORY:,} bytes of memory"
    message = " ".join(str(error).split())[:_SHOWN]
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"is no jinja template (line {error.lineno}: {message})"
    if isinstance(error, jinja2.exceptions.SecurityError):
        return f"reaches where the sandbox does not let it ({message})"
    if type(error) is jinja2.TemplateError:  # raise_exception(...)
        return f"refuses the conversation: {message}"
    return f"fails ({type(error).__name__}: {message})"


def serving(module: str) -> subprocess.Popen[bytes]:
    """A process of one thread without torch that runs `serve()` of a module: questions go to its input."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return subprocess.Popen(
        [sys.executable, "-c", f"from {module} import serve; serve()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment | {"TOKENIZERS_PARALLELISM": "false", "USE_TORCH": "0"},
        start_new_session=True,  # Ctrl-C is for this process, with which the child's input ends
    )


class Renderer:
    """A child process that renders templates, begun with the first question and anew after one that ended it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def render(self, template: str, variables: Mapping[str, Any], conversations: Sequence[Conversation]) -> list[str]:
        """As `rendered`, within the limits."""
        question = json.dumps([SECONDS, template, dict(variables), list(conversations)]).encode() + b"\n"
        with self._lock:
            child = self.start()
            assert child.stdin is not None
            assert child.stdout is not None
            with _limited_by_clock(child):
                try:
                    child.stdin.write(question)
                    child.stdin.flush()
                    line = child.stdout.readline()
                except OSError:
                    line = b""
            if not line.endswith(b"\n"):
                raise TemplateError(self._ended(child))
        answer = json.loads(line)
        if isinstance(answer, str):
            raise TemplateError(answer)
        return list(answer)

    def start(self) -> subprocess.Popen[bytes]:
        """Begin the child if there is none; does not wait until it is ready."""
        if self._child is None or self._child.poll() is not None or self._owner != os.getpid():
            self._owner, self._child = os.getpid(), serving(__name__)
        return self._child

    def _ended(self, child: subprocess.Popen[bytes]) -> str:
        child.kill()
        code, self._child = child.wait(), None
        if code == -getattr(signal, "SIGPROF", 0) or code == -9:
            return f"needs more than {SECONDS:g} s of processor time"
        return f"ended the process that rendered it (exit code {code})"


@lru_cache(maxsize=1)
def renderer() -> Renderer:
    """This process's."""
    return Renderer()


@contextlib.contextmanager
def _limited_by_clock(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """Where processes cannot limit themselves, a clock ends the child."""
    if hasattr(signal, "setitimer"):
        yield
        return
    clock = threading.Timer(3 * SECONDS, child.kill)
    clock.start()
    try:
        yield
    finally:
        clock.cancel()


def serve() -> None:
    """The child: one line of JSON a question, one an answer (a list of texts, or what is wrong), until input ends."""
    without_index()
    from transformers.utils import chat_template_utils  # noqa: F401 (before the limits)

    output: BinaryIO = sys.stdout.buffer
    _limit_memory()
    for line in sys.stdin.buffer:
        seconds, *question = json.loads(line)
        _limit_time(seconds)
        try:
            answer: Any = _render(*question)
        except TemplateError as error:
            answer = str(error)
        except (MemoryError, RecursionError) as error:
            answer = _explain(error)
        _limit_time(0)
        output.write(json.dumps(answer).encode() + b"\n")
        output.flush()


def _limit_time(seconds: float) -> None:
    """The system ends this process, in whatever code it is, when it has worked for so long."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # not on Windows
        return
    with contextlib.suppress(OSError, ValueError):
        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
