"""docs/supported.md and docs/security.md say what the code does."""

from __future__ import annotations

import pytest

from tests import supported


@pytest.mark.parametrize("name", supported.TABLES)
def test_the_document_has_the_tables_of_the_code(name: str) -> None:
    texts = [document.read_text(encoding="utf-8") for document in supported.DOCUMENTS]
    (text,) = [text for text in texts if f"<!-- table: {name} -->" in text]
    assert supported.TABLES[name]().strip() in text, "write it anew: python -m tests.supported"
