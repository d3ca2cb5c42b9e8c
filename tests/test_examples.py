"""What the page and the examples of the Python functions say runs as it stands, on tiny models."""

from __future__ import annotations

import asyncio
import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import cpift
from cpift.config.inputs import ScratchModel
from cpift.config.run import ModelConfig
from cpift.models.sources import materialise

ROOT = Path(cpift.__file__).parents[1]
RUN = """
name: smoke
model: {scratch: {hidden_size: 32, intermediate_size: 64, layers: 1, heads: 2, max_length: 64}}
tasks:
  - {name: addition, metric: loss, train: {procedural: addition, size: 8}, test: {procedural: addition, split: test, size: 4}}
  - {name: ending, metric: loss, train: {procedural: ending, size: 8}, test: {procedural: ending, split: test, size: 4}}
probe: {steps: 2, batch_size: 4, learning_rate: 3.0e-3, max_length: 48, precision: float32}
backbone: {source: pretrained}
integration: {steps: 1, batch_size: 4, learning_rate: 1.0e-3, max_length: 48, samples_per_task: 4, precision: float32}
evaluation: {batch_size: 4, max_length: 64, precision: float32}
tracking: []
"""  # noqa: E501


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the examples are about: base, ft-maths, ft-code, my-run.yaml, configs/smoke.yaml; the run is made once."""
    root = tmp_path_factory.mktemp("examples")
    scratch = ScratchModel(hidden_size=32, intermediate_size=64, layers=1)
    materialise(ModelConfig(scratch=scratch, dtype="bfloat16"), root / "base")
    tensors = load_file(root / "base" / "model.safetensors")
    for seed, name in enumerate(("ft-maths", "ft-code")):
        generator = torch.Generator().manual_seed(seed)
        shutil.copytree(root / "base", root / name)
        moved = {
            n: (x.float() + 0.02 * torch.randn(x.shape, generator=generator)).bfloat16() for n, x in tensors.items()
        }
        save_file(moved, root / name / "model.safetensors", metadata={"format": "pt"})
    (root / "configs").mkdir()
    for path in ("my-run.yaml", "configs/smoke.yaml"):
        (root / path).write_text(RUN)
    return root


@pytest.fixture
def example(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    monkeypatch.chdir(place)

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.slow
def test_merge_two_checkpoints(example: Callable[..., str], place: Path) -> None:
    told = example("merge_two_checkpoints.py", "base", "ft-maths", "ft-code", "two")
    assert "overlap by chance" in told
    assert (place / "two" / "model.safetensors").is_file()
    assert (place / "two-ties" / "model.safetensors").is_file()
    with pytest.raises(SystemExit, match="no model folder"):
        example("merge_two_checkpoints.py", "base", "ft-maths", "./nowhere", "three")


@pytest.mark.slow
def test_freeze_any_trainer(example: Callable[..., str]) -> None:
    assert re.search(
        r"\d+ elements were frozen, 0 moved", example("freeze_any_trainer.py", "base", "ft-maths", "frozen")
    )


@pytest.mark.slow
def test_run_from_python(example: Callable[..., str], place: Path) -> None:
    told = example("run_from_python.py", "my-run.yaml", "--in-process")
    assert "report.html" in told
    assert "final {'addition'" in told
    assert "cached" in example("run_from_python.py", "my-run.yaml", "--in-process")


@pytest.mark.slow
def test_every_block_of_the_page_runs(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "docs/python.md", "exec"), names)
    assert names["result"].scores["final"].keys() == {"addition", "ending"}
    assert "fusion.method" in capsys.readouterr().out


@pytest.mark.slow
def test_readmes_lines_run(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = shutil.ignore_patterns("merged*", ".merged*")  # what the page made; its run is taken as it is
    shutil.copytree(place, tmp_path, dirs_exist_ok=True, ignore=own)
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), names)
    assert isinstance(names["freeze"], cpift.FreezeCallback)
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert names["result"].report.is_file()


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    notebook = json.loads((ROOT / "examples" / "first_hour.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    names: dict[str, Any] = {"__name__": "__main__"}

    async def kernel() -> None:
        for cell in cells:
            exec(compile("".join(cell["source"]), "first_hour.ipynb", "exec"), names)

    asyncio.run(kernel())
    assert names["freeze"].moved == 0
    assert names["result"].cached or names["result"].report.is_file()
