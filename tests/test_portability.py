"""What the sources may not take for granted: the locale's encoding, and modules that only Linux has."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.sources import sources

# What macOS or Windows lack.
MODULES = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix", "syslog", "crypt", "spwd", "nis"}
NAMES = {
    *(f"os.{name}" for name in ("O_DIRECT", "O_NOFOLLOW", "O_CLOEXEC", "posix_fadvise", "preadv")),
    *(f"os.{name}" for name in ("sched_getaffinity", "fork", "geteuid", "getuid", "statvfs", "killpg", "setsid")),
    *(f"signal.{name}" for name in ("SIGHUP", "SIGKILL", "SIGALRM", "SIGUSR1", "SIGBUS", "alarm", "pthread_sigmask")),
    *(f"mmap.{name}" for name in ("MADV_WILLNEED", "MADV_DONTNEED", "MADV_SEQUENTIAL", "MAP_POPULATE", "MAP_PRIVATE")),
}


PROCESSES = {"run", "Popen", "check_output", "call", "check_call"}
_ASKED = re.compile("platform|hasattr|TYPE_CHECKING")


def unnamed_encodings(path: Path, tree: ast.Module) -> Iterator[str]:
    """Texts that are read or written in whatever the locale says."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        method = isinstance(call.func, ast.Attribute)
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
        keywords = {one.arg: one.value for one in call.keywords}
        mode = keywords.get("mode") or next(iter(call.args[0 if method else 1 :]), None)
        binary = isinstance(mode, ast.Constant) and "b" in str(mode.value)
        opens = name == "open" and owner not in ("os", "self", "store") and not binary
        named = "encoding" in keywords or (name == "read_text" and bool(call.args))
        whole = method and name in ("read_text", "write_text")
        text = opens or whole or (name in PROCESSES and bool({"text", "universal_newlines"} & set(keywords)))
        if text and not named:
            yield f"{path}:{call.lineno} calls {name} without an encoding"


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when a module is imported: no bodies of functions, and nothing that is tried or asked for first."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            for part in (*getattr(child, "decorator_list", ()), child.args):
                yield from at_import(part)
            continue
        asked = isinstance(child, (ast.If, ast.IfExp)) and _ASKED.search(ast.unparse(child.test)) is not None
        if not asked and not isinstance(child, ast.Try):
            yield child
            yield from at_import(child)


def absent_elsewhere(path: Path, tree: ast.Module) -> Iterator[str]:
    for node in at_import(tree):
        names: set[str] = set()
        if isinstance(node, ast.Import):
            names = {alias.name for alias in node.names} & MODULES
        elif isinstance(node, ast.ImportFrom):
            names = ({node.module or ""} & MODULES) | ({f"{node.module}.{alias.name}" for alias in node.names} & NAMES)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in NAMES:
            names = {ast.unparse(node)}
        yield from (f"{path}:{getattr(node, 'lineno', 0)} {name}" for name in names)


@pytest.mark.slow
def test_every_text_file_names_its_encoding() -> None:
    assert [fault for path, tree in sources() for fault in unnamed_encodings(path, tree)] == []


@pytest.mark.slow
def test_nothing_is_imported_that_other_systems_lack() -> None:
    ours = [(path, tree) for path, tree in sources() if path.parts[0] in ("cpift", "kernels", "ray_jobs")]
    assert [fault for path, tree in ours for fault in absent_elsewhere(path, tree)] == []


def written_elsewhere(path: Path, tree: ast.Module) -> Iterator[str]:
    """Text that goes to the terminal or into a page past the functions that escape it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in WRITERS:
            yield f"{path}:{node.lineno} calls {ast.unparse(node.func)}"
        if isinstance(node, ast.ImportFrom) and node.module == "html":
            yield f"{path}:{node.lineno} imports html"


WRITERS = {
    "print",
    "typer.echo",
    "typer.secho",
    "click.echo",
    "Console",
    "sys.stdout.write",
    "sys.stderr.write",
    "Markup",
}
WRITERS |= {"rich.print", "Text.from_markup", "html.escape", "escape"}


@pytest.mark.slow
def test_what_is_shown_goes_through_the_modules_that_escape() -> None:
    ours = [(path, tree) for path, tree in sources() if path.parts[0] == "cpift"]
    assert [fault for path, tree in ours for fault in written_elsewhere(path, tree)] == []
