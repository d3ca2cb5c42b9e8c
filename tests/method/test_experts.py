"""Experts that a fine-tune changed: of mixtures whose experts are tensors of their own, and of stacks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import cpift
from cpift.checkpoints.checkpoint import Checkpoint
from cpift.cli.main import app
from cpift.method.experts import Expert, ExpertCore, core_by_expert, shared_mass, stacked
from cpift.report.data import summary
from cpift.report.files import report_md
from cpift.report.page import page
from cpift.report.places import expert_rows
from tests.helpers.checkpoints import save_checkpoint
from tests.helpers.reports import made_up_run

BLOCK = "model.layers.1.mlp"


@pytest.mark.parametrize(
    ("name", "shape", "count"),
    [
        (f"{BLOCK}.experts.gate_up_proj", (4, 6, 8), 4),
        (f"{BLOCK}.experts.gate_up_proj_bias", (4, 6), 4),
        ("model.layers.0.block_sparse_moe.input_linear.weight", (3, 6, 8), 3),
        (f"{BLOCK}.experts.3.gate_proj.weight", (6, 8), 0),
        (f"{BLOCK}.shared_experts.gate_proj.weight", (6, 8), 0),
        ("transformer.blocks.0.ffn.experts.mlp.w1", (24, 8), 0),
        ("conv1d.weight", (6, 1, 4), 0),
    ],
)
def test_a_stack_is_told_by_name_and_shape(name: str, shape: tuple[int, ...], count: int) -> None:
    assert stacked(name, shape) == count


def models(root: Path, stack: bool) -> tuple[Path, Path]:
    """θ0 and a fine-tune that moved experts 0 and 2 of four, the last by more, and a norm."""
    torch.manual_seed(0)
    up, down = torch.randn(4, 6, 8), torch.randn(4, 8, 6)
    found = []
    for tuned in (False, True):
        if tuned:
            up[0] += 0.1
            down[2, 0] += 0.5
        experts = {f"{BLOCK}.experts.up_proj": up.clone(), f"{BLOCK}.experts.down_proj": down.clone()}
        if not stack:
            experts = {
                f"{BLOCK}.experts.{number}.{name}_proj.weight": values[number].clone()
                for name, values in (("up", up), ("down", down))
                for number in range(4)
            }
        norm = torch.full((8,), 2.0 if tuned else 1.0)
        found.append(save_checkpoint(root / f"{stack}-{tuned}", experts | {"model.norm.weight": norm}))
    return found[0], found[1]


@pytest.mark.parametrize("stack", [False, True])
def test_experts_are_the_same_in_a_stack_and_apart(stack: bool, tmp_path: Path) -> None:
    base, tuned = models(tmp_path, stack)
    found = cpift.diff(base, tuned)
    assert list(found.experts) == [(BLOCK, number) for number in range(4)]
    one, other = (Checkpoint(folder) for folder in (base, tuned))
    names = [name for name in one.names if "experts" in name]
    assert {expert[1]: change.changed for expert, change in found.experts.items()} == {0: 48, 1: 0, 2: 6, 3: 0}
    assert found.experts[BLOCK, 0].l2 == pytest.approx(0.1 * 48**0.5, rel=1e-5)
    assert found.experts[BLOCK, 2].l2 == pytest.approx(0.5 * 6**0.5, rel=1e-5)
    change = torch.cat([(other.tensor(name) - one.tensor(name)).double().reshape(-1) for name in names])
    assert sum(part.l2**2 for part in found.experts.values()) == pytest.approx(float(change.square().sum()))
    assert sum(part.elements for part in found.experts.values()) == len(change)
    assert found.whole.changed == 48 + 6 + 8
    shown = CliRunner().invoke(app, ["diff", str(base), str(tuned)]).output
    assert "Experts: 2 of 4 changed, in 1 blocks" in shown
    rows = [line.split() for line in shown.splitlines() if line.strip().startswith(BLOCK)]
    assert [row[1] for row in rows] == ["2", "0"], "those that changed most come first"


@pytest.mark.parametrize("stack", [False, True])
def test_a_core_is_told_expert_by_expert(stack: bool, tmp_path: Path) -> None:
    base, tuned = models(tmp_path, stack)
    core = cpift.regions(base, {"a": tuned}, p=1.0)["a"]
    found = core_by_expert(core.summary.cores, core.shapes, core.words.__getitem__)
    counts = {number: (cores.elements, cores.core) for (_, number), cores in found.items()}
    assert counts == {0: (96, 48), 1: (96, 0), 2: (96, 6), 3: (96, 0)}
    assert {block for block, _ in found} == {BLOCK}
    by_hand = sum(int(mask.sum()) for name, mask in core.items() if "experts" in name)
    assert by_hand == sum(cores.core for cores in found.values())


def test_experts_that_two_cores_share() -> None:
    def cores(*counts: int) -> dict[Expert, ExpertCore]:
        return {(BLOCK, number): ExpertCore(10, count) for number, count in enumerate(counts)}

    assert shared_mass(cores(4, 4, 0), cores(2, 2, 0)) == 1.0
    assert shared_mass(cores(4, 0, 0), cores(0, 2, 2)) == 0.0
    assert shared_mass(cores(3, 1, 0), cores(1, 0, 1)) == 0.5
    assert shared_mass(cores(0, 0, 0), cores(1, 0, 1)) is None


@pytest.mark.slow
def test_a_report_says_which_experts_the_cores_touch() -> None:
    counts = {"a": (6, 2, 0, 0), "b": (0, 2, 6, 0), "c": (0, 0, 0, 0)}
    rows = expert_rows({t: {(BLOCK, n): ExpertCore(20, c) for n, c in enumerate(own)} for t, own in counts.items()})
    data = replace(made_up_run(), experts=rows)
    text, md = page(data), report_md(data)
    for said in (
        "The core of a touches 2 of 4 experts; 1 of them holds half of its elements in experts.",
        "The core of c touches 0 of 4 experts.",
    ):
        assert said in text
        assert said in md
    assert f"| {BLOCK} 0 | 30 (75) | 0 (0) | 0 (0) |" in md.replace("\\", "")
    assert "| a | 1.000 | 0.250 | – |" in md
    assert f"{BLOCK} 3" not in md, "an expert that no core touches"
    assert summary(data)["experts"][1] == {
        "block": BLOCK, "expert": 1, "elements": 20, "core": {"a": 2, "b": 2, "c": 0}
    }  # fmt: skip
    assert "experts" not in summary(made_up_run())
    assert "touches" not in page(made_up_run()) + report_md(made_up_run())


def test_a_model_without_experts_has_none(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base", {"a.weight": torch.ones(3, 4)})
    tuned = save_checkpoint(tmp_path / "tuned", {"a.weight": torch.zeros(3, 4)})
    assert cpift.diff(base, tuned).experts == {}
    assert "Experts" not in CliRunner().invoke(app, ["diff", str(base), str(tuned)]).output
