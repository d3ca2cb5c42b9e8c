"""The tables of docs/supported.md, each from the module that decides. `python -m tests.supported` writes them anew."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from cpift import layout, lora_config, model_fields

DOCUMENT = Path(__file__).parents[1] / "docs" / "supported.md"

TABLES: dict[str, Callable[[], str]] = {
    "adapters": lora_config.fields_table,
    "models": layout.models_table,
    "configuration": model_fields.fields_table,
}  # a marker in the document → the function that gives its table as markdown


def written(text: str) -> str:
    """The document with every table as the code has it."""
    for name, table in TABLES.items():
        marked = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = marked.sub(lambda found, table=table: f"{found[1]}{table().rstrip()}\n{found[2]}", text)  # type: ignore[misc]
    return text


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
