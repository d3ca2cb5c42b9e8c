"""What a package hands out: the names that its page imports for types are imported when they are first used."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def handed_out(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package: what its page imports `if TYPE_CHECKING` is its one table of names.

    Neither that block nor a module is read before somebody asks for a name.
    """

    def look_up(name: str) -> Any:
        home = None if name.startswith("__") else homes(package).get(name)
        if home is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(home), name)
        setattr(sys.modules[package], name, value)
        return value

    def listed() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes(package)})

    return look_up, listed


@cache
def homes(package: str) -> dict[str, str]:
    """The names that a package hands out, and the module that each is from; none where its source is not at hand."""
    loader: Any = getattr(find_spec(package), "loader", None)
    blocks = (node for node in ast.parse(loader.get_source(package) or "").body if isinstance(node, ast.If))
    checked = (node for node in blocks if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING")
    imports = (statement for block in checked for statement in block.body if isinstance(statement, ast.ImportFrom))
    return {alias.name: statement.module for statement in imports if statement.module for alias in statement.names}
