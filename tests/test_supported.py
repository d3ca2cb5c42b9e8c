"""docs/supported.md, security.md, comparison.md and reference.md say what the code does, and what was measured."""

from __future__ import annotations

import pytest

from tests import reference, supported


@pytest.mark.parametrize("name", supported.TABLES)
def test_the_document_has_the_tables_of_the_code(name: str) -> None:
    texts = [document.read_text(encoding="utf-8") for document in supported.DOCUMENTS]
    (text,) = [text for text in texts if f"<!-- table: {name} -->" in text]
    assert supported.TABLES[name]().strip() in text, "write it anew: python -m tests.supported"


def test_the_reference_is_of_the_code_and_explains_everything() -> None:
    text = reference.page()
    assert text == reference.DOCUMENT.read_text(encoding="utf-8"), "write it anew: python -m tests.reference"
    assert [line for line in text.splitlines() if line.startswith("| ") and line.endswith("|  |")] == []  # no meaning
