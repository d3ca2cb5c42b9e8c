"""The tables of documents that the code decides, each from its module. `python -m tests.supported` writes them anew."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from cpift import layout, lora_config, model_fields, untrusted

DOCUMENTS = [Path(__file__).parents[1] / "docs" / name for name in ("supported.md", "security.md")]
_READ = {
    "CONFIG": "a run's, sweep's or comparison's YAML, values of `--set`",
    "MODEL_CONFIG": "`config.json`, the tokenizer's and generation's configs",
    "ADAPTER": "`adapter_config.json`",
    "INDEX": "`model.safetensors.index.json`",
    "TENSOR_HEADER": "a safetensors header",
    "ROW": "one row of a data file",
    "ANSWER": "a judge's answer",
    "RECORD": "what cpift wrote",
}


def limits_table() -> str:
    """What each reader of JSON and YAML takes at most."""
    found = {name: one for name, one in vars(untrusted).items() if isinstance(one, untrusted.Limits)}
    rows = [
        f"| {_READ[name]} | {one.size:,} | {one.values:,} | {one.depth} | {one.digits} |" for name, one in found.items()
    ]
    head = "| what is read | bytes | values | levels | digits of a whole number |"
    return "\n".join([head, "|---|--:|--:|--:|--:|", *rows])


TABLES: dict[str, Callable[[], str]] = {
    "adapters": lora_config.fields_table,
    "models": layout.models_table,
    "configuration": model_fields.fields_table,
    "limits": limits_table,
}  # a marker in the document → the function that gives its table as markdown


def written(text: str) -> str:
    """The document with every table as the code has it."""
    for name, table in TABLES.items():
        marked = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = marked.sub(lambda found, table=table: f"{found[1]}{table().rstrip()}\n{found[2]}", text)  # type: ignore[misc]
    return text


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(written(document.read_text(encoding="utf-8")), encoding="utf-8")
