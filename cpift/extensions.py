"""Code that users bring: metrics, merge methods and conflict rules of their own.

A word of a config that is none of ours names one. `module:attribute` is looked for beside the run's file, then among
installed packages, and nowhere else; any other word is the name of an entry point that an installed package declares.
`find` runs nothing of what it finds; `load` imports it, and hands it out only if it was made to be what is asked for.

A file beside the run stands alone: it may import what is installed, and no other file beside it, so that its own bytes
say what it does.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from importlib.machinery import BuiltinImporter, FrozenImporter, ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar

from cpift.disk.files import digest, file_sha256
from cpift.errors import ConfigError, CpiftError, Problem, explain_os_error

ExtensionKind = Literal["metrics", "methods", "conflicts"]
Made = TypeVar("Made")

# The group of entry points that a package declares its own in, and what a sentence calls one.
GROUPS: Mapping[ExtensionKind, str] = {
    "metrics": "cpift.metrics",
    "methods": "cpift.methods",
    "conflicts": "cpift.conflicts",
}
TITLES: Mapping[ExtensionKind, str] = {"metrics": "metric", "methods": "merge method", "conflicts": "conflict rule"}
_NAMED = re.compile(r"(?P<module>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):(?P<attribute>[A-Za-z_]\w*)")
_PLACED = re.compile(r"(?P<file>/.*\.py):(?P<attribute>[A-Za-z_]\w*)")


@dataclass(frozen=True)
class Extension:
    """What a word names, of which nothing was run yet.

    name: for people and records. file: the source of the module. module: its dotted name if it is installed, else "".
    package: name and version of what it was installed with, if that is known.
    """

    kind: ExtensionKind
    name: str
    file: Path
    attribute: str
    module: str = ""
    package: str = ""

    @property
    def fingerprint(self) -> str:
        """Part of the identity of all that depends on it: its source's bytes, and the package's version."""
        return digest([self.attribute, file_sha256(self.file), self.package])

    @property
    def origin(self) -> str:
        return f"{self.package}, {self.file}" if self.package else str(self.file)


def short_name(word: str) -> str:
    """A word as people wrote it: of a file its name, not its place."""
    match = _PLACED.fullmatch(word)
    return f"{Path(match['file']).stem}:{match['attribute']}" if match else word


def wrong_word(kind: ExtensionKind, word: str, ours: Sequence[str]) -> str | None:
    """What is wrong with a word that a config may say for one of these; None if nothing is.

    Entry points are looked up; whether a module is there is for `placed` and `find` to say.
    """
    if word in ours or _NAMED.fullmatch(word) or _PLACED.fullmatch(word):
        return None
    declared = sorted({point.name for point in metadata.entry_points(group=GROUPS[kind])})
    if word in declared:
        return None
    close = difflib.get_close_matches(word, [*ours, *declared], n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"one of {', '.join([*ours, *declared])}"
    if ":" in word:
        hint = "write module:attribute, with my_metrics.py beside the run's file, or in an installed package"
    return f"is no {TITLES[kind]} → {hint}"


def placed(kind: ExtensionKind, word: str, folder: Path) -> str | Problem:
    """A word as a loaded config keeps it: with the file's whole path where `module` is a file in `folder`, the run's.

    A Problem without a place where no such module is there, or where the word is a path: from elsewhere, code is not
    taken.
    """
    if _PLACED.fullmatch(word):
        what = f"{word!r} names a file by its path, and code is taken from beside the run's file or what is installed"
        return Problem("", what, f"put {short_name(word).partition(':')[0]}.py there, and write {short_name(word)!r}")
    match = _NAMED.fullmatch(word)
    if match is None:  # an entry point, or nothing: `wrong_word` says
        return word
    file = folder / f"{match['module']}.py"
    if "." not in match["module"] and file.is_file():
        return f"{file.resolve()}:{match['attribute']}"
    if _source_of(match["module"]) is not None:
        return word
    close = difflib.get_close_matches(match["module"], sorted(path.stem for path in folder.glob("*.py")), n=1)
    remedy = f"did you mean '{close[0]}:{match['attribute']}'?" if close else f"put {file.name} there, or install it"
    what = f"{word!r}: there is no module {match['module']} in {folder}, nor among installed packages"
    return Problem("", what, remedy)


def find(kind: ExtensionKind, word: str) -> Extension:
    """What a word of a loaded config names. Raises ConfigError where it is not there."""
    if (here := _PLACED.fullmatch(word)) is not None:
        if not Path(here["file"]).is_file():
            raise _error(word, f"there is no file {here['file']}", "put it back, or name another")
        return Extension(kind, short_name(word), Path(here["file"]), here["attribute"])
    named = _NAMED.fullmatch(word)
    if named is not None:
        return _installed(kind, word, named["module"], named["attribute"], _package_of(named["module"]))
    declared = [point for point in metadata.entry_points(group=GROUPS[kind]) if point.name == word]
    packages = sorted({f"{point.dist.name} {point.dist.version}" if point.dist else "?" for point in declared})
    if len({point.value for point in declared}) > 1:
        raise _error(word, f"is declared by {' and '.join(packages)}", "uninstall one, or write module:attribute")
    if not declared:
        raise _error(word, f"no installed package declares it in {GROUPS[kind]}", "install it in this environment")
    return _installed(kind, word, declared[0].module, declared[0].attr, packages[0])


def _installed(kind: ExtensionKind, word: str, module: str, attribute: str, package: str) -> Extension:
    source = _source_of(module)
    if source is None:
        raise _error(word, f"there is no installed module {module}", "install it, or put its file beside the run's")
    return Extension(kind, word, source, attribute, module, package)


def load(extension: Extension, wanted: type[Made]) -> Made:
    """Import what was found and hand it out: an instance of `wanted`.

    Raises ConfigError where its module fails, has no such attribute, or holds something else there: what was not made
    for this is never called, whatever a config names.
    """
    loaded_value: Made = _handed(extension, wanted, lambda value: isinstance(value, wanted))
    return loaded_value


def load_class(extension: Extension, wanted: type[Made]) -> type[Made]:
    """The same for a class that is derived from `wanted`, and lacks nothing that this leaves to it."""
    loaded_class: type[Made] = _handed(
        extension, wanted, lambda value: isinstance(value, type) and issubclass(value, wanted)
    )
    if missing := sorted(getattr(loaded_class, "__abstractmethods__", ())):
        what = f"{extension.attribute} in {extension.file} lacks {', '.join(missing)}"
        raise _error(extension.name, what, _HOW[extension.kind])
    return loaded_class


def _handed(extension: Extension, wanted: type[Any], fits: Callable[[Any], bool]) -> Any:
    module = _imported(extension)
    attribute = getattr(module, extension.attribute, None)
    if fits(attribute):
        return attribute
    fit = sorted(name for name, value in vars(module).items() if fits(value) and not _borrowed(value, module))
    close = difflib.get_close_matches(extension.attribute, fit, n=1)
    remedy = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(fit)}" if fit else _HOW[extension.kind]
    what = f"has no {extension.attribute}" if attribute is None else f"{extension.attribute} is no {wanted.__name__}"
    raise _error(
        extension.name, f"{extension.file} {what}" if attribute is None else f"{what} in {extension.file}", remedy
    )


_HOW: Mapping[ExtensionKind, str] = {
    kind: f"docs/extending says how a {title} is written" for kind, title in TITLES.items()
}
_MODULES: dict[tuple[Path, str], ModuleType] = {}  # files beside runs, by what they held


def _borrowed(value: Any, module: ModuleType) -> bool:
    """Whether it is a class that a module imports."""
    return isinstance(value, type) and value.__module__ != module.__name__


def modules_beside() -> list[ModuleType]:
    """What was imported of files beside runs, whose names mean nothing to another process."""
    return list(_MODULES.values())


def _imported(extension: Extension) -> ModuleType:
    """The module; of a file beside the run anew where its bytes have changed."""
    try:
        if extension.module:
            return _import_installed(extension)
        source = extension.file.read_bytes()
        key = (extension.file, hashlib.sha256(source).hexdigest())
        if key not in _MODULES:
            module = ModuleType(f"cpift_extension_{extension.file.stem}_{key[1][:12]}")
            module.__file__ = str(extension.file)
            sys.modules[module.__name__] = module  # where dataclasses and typing look for it
            exec(compile(source, str(extension.file), "exec"), module.__dict__)
            _MODULES[key] = module
        return _MODULES[key]
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        what = f"{extension.file} cannot be imported ({_line_of(error, extension.file)}{type(error).__name__}: {error})"
        alone = "; beside a run it may import what is installed, and no file beside it" if not extension.module else ""
        raise _error(extension.name, what, f"mend it{alone}") from error


def _import_installed(extension: Extension) -> ModuleType:
    """Python itself looks into the working directory first; what that hides is not what was asked for."""
    if _source_of(extension.module, sys.path) != extension.file:
        what = f"a module of the same name in {os.getcwd()} hides {extension.file}"
        raise _error(extension.name, what, "rename it, or work in another folder")
    return importlib.import_module(extension.module)


def _line_of(error: BaseException, file: Path) -> str:
    lines, trace = [], error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(file):
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    return f"line {line}: " if line else ""


@contextmanager
def own_code(code: type, where: str) -> Iterator[None]:
    """Around what a class does: an error in a user's says where, one in ours or of the system is raised as it is."""
    try:
        yield
    except CpiftError:
        raise
    except (Exception, SystemExit) as error:  # a user's `exit()` is no end of ours; SIGTERM's, by Ray's handler, is
        ended = isinstance(error, SystemExit) and error.code == signal.SIGTERM
        if ended or code.__module__.startswith("cpift.") or explain_os_error(error):
            raise
        raise CpiftError(f"{where}: {type(error).__name__}: {error} → mend its code") from error


def _error(word: str, what: str, remedy: str) -> ConfigError:
    return ConfigError("extensions", [Problem(word, what, remedy)])


def _source_of(module: str, path: Sequence[str] | None = None) -> Path | None:
    """The file of an installed module, which is not imported; None where there is none, or it is Python's own."""
    parts = module.split(".")
    if parts[0] in sys.stdlib_module_names:
        return None
    places, spec = _installed_places() if path is None else path, None
    for count in range(1, len(parts) + 1):
        spec = _spec(".".join(parts[:count]), places, top=count == 1)
        if spec is None:
            return None
        places = list(spec.submodule_search_locations or ())
    return Path(spec.origin) if spec is not None and spec.origin and spec.has_location else None


def _spec(name: str, places: Sequence[str], top: bool) -> ModuleSpec | None:
    if (own_spec := PathFinder.find_spec(name, places)) is not None or not top:
        return own_spec
    others = [finder for finder in sys.meta_path if finder not in (BuiltinImporter, FrozenImporter, PathFinder)]
    specs = (finder.find_spec(name, None) for finder in others)  # of packages that are installed to be edited
    return next((spec for spec in specs if spec is not None), None)


def _installed_places() -> list[str]:
    """Where Python looks, without the working directory, which it puts first for itself."""
    first, *rest = sys.path or [""]
    here = first in ("", os.getcwd())
    return [place for place in ([] if here else [first]) + rest if place]


def _package_of(module: str) -> str:
    """Name and version of what brought a module."""
    names = metadata.packages_distributions().get(module.partition(".")[0], [])
    return ", ".join(f"{name} {metadata.version(name)}" for name in sorted(set(names)))


def loaded(kind: ExtensionKind, word: str, wanted: type[Made]) -> Made:
    """`load` of what `find` finds."""
    return load(find(kind, word), wanted)
