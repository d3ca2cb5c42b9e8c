"""The schema takes what the project's own files say, and refuses what the loader refuses by name."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import yaml

from cpift.cli.schema import SCHEMAS, schema_of

ROOT = Path(__file__).parents[2]
FILES = {
    "run": [*(ROOT / "configs").rglob("*.yaml"), ROOT / "benchmarks" / "study" / "tiny_base.yaml"],
    "sweep": list((ROOT / "sweeps").glob("*.yaml")),
    "compare": [ROOT / "benchmarks" / "study" / name for name in ("tiny.yaml", "smollm2.yaml")],
}


@pytest.mark.parametrize("kind", SCHEMAS)
def test_the_projects_own_files_fit_their_schema(kind: str) -> None:
    schema = jsonschema.Draft202012Validator(schema_of(kind))
    assert FILES[kind]
    for path in FILES[kind]:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert not [error.message for error in schema.iter_errors(fields)], path
        assert list(schema.iter_errors(fields | {"unheard": 1}))
    assert "identity" not in str(schema.schema)
