"""Text of others (names of tensors, rows, folders, licences) put into a medium of ours: each has its one function.

A name may hold what the medium takes for its own: escape sequences, markup, headings, tags, letters that turn the
reading direction. Whoever writes to the medium escapes, once, at the edge.
"""

from __future__ import annotations

import codecs
import html as _html
import re
import unicodedata

PLAIN_SIGNS = "plainsigns"  # how streams are told to write what their encoding lacks
_SIGNS = {
    "→": "->",
    "←": "<-",
    "…": "...",
    "–": "-",
    "−": "-",
    "×": "x",
    "÷": "/",
    "·": "*",
    "±": "+-",
    "≥": ">=",
    "≤": "<=",
    "✓": "ok",
    "✗": "no",
    "▸": ">",
    "★": "*",
    "▲": "^",
    "▼": "v",
    "⟦": "[[",
    "⟧": "]]",
    "✂": "[cut]",
    "θ": "theta",
    "τ": "tau",
    "ω": "omega",
    "Ω": "Omega",
    "Δ": "Delta",
    "σ": "sigma",
    "ε": "epsilon",
    "α": "alpha",
}
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_ENTITY = re.compile(r"&(?=#?\w{1,32};)")
_SPECIAL = re.compile(r"[\\`*<>\[\]|~$]|(?<!\w)_|_(?!\w)|^[#+=-]")
_NUMBERED = re.compile(r"^(\d+)([.)])(?=\s|$)")  # an item of a list; 0.001 is none


def terminal(text: str) -> str:
    """What a terminal shows as text, whatever is in it; lines and tabs stay."""
    return "".join(char if char in "\n\t" else _visible(char) for char in text)


def one_line(text: str) -> str:
    """As `terminal`, on one line: for a message's parts and the lines of a log."""
    return terminal(re.sub(r"[\r\n\v\f\x85\u2028\u2029]+", " ", text))


def without_colours(text: str) -> str:
    """Text of another program without its colours, which `terminal` would show."""
    return _COLOURS.sub("", text)


def html(text: str) -> str:
    """Inside an element or a quoted attribute of a page or an SVG."""
    return _html.escape(terminal(text))


def text_of(page: str) -> str:
    """The text that a part of a page without elements shows."""
    return _html.unescape(page)


def markdown(text: str) -> str:
    """Inline text of a page in Markdown, in a paragraph, a heading or a table's cell."""
    escaped = _SPECIAL.sub(lambda match: f"\\{match[0]}", one_line(text).strip())
    return _ENTITY.sub("&amp;", _NUMBERED.sub(r"\1\\\2", escaped))


def code(text: str) -> str:
    """A code span in Markdown, in a table's cell too."""
    shown = one_line(text).strip().replace("|", "\\|") or " "
    fence = "`" * (max((len(run) for run in re.findall("`+", shown)), default=0) + 1)
    space = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{space}{shown}{space}{fence}"


def _visible(char: str) -> str:
    """A control, a sign that turns or joins text, half a surrogate pair: as Python writes it. Else itself."""
    if char.isprintable() or unicodedata.category(char) in ("Zs", "Co", "Cn"):
        return char
    return char.encode("unicode_escape").decode("ascii")


def _plain_signs(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    bytes_there = error.object[error.start : error.end]
    return "".join(_SIGNS.get(char) or char.encode("unicode_escape").decode("ascii") for char in bytes_there), error.end


codecs.register_error(PLAIN_SIGNS, _plain_signs)
