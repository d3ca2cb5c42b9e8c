"""Model families at toy width: trained with earlier cores frozen, exported, merged, verified and loaded; packed rows
that equal single ones."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cpift_kernels import unpack_mask
from safetensors.torch import load_file

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.config.run import FusionConfig, RegionsConfig, TrainingConfig
from cpift.data.packing import packed_rows
from cpift.data.tasks import load_examples
from cpift.data.tokenise import IGNORED, CompletionCollator
from cpift.merging.base import FusionInputs
from cpift.merging.checks import failures
from cpift.merging.engine import merge
from cpift.merging.methods.cpift import Fusion
from cpift.merging.verify import check_loads, verify
from cpift.method.regions import CoreRegion, save_regions, select_regions
from cpift.models.sources import load_model, load_tokenizer
from cpift.pretrained.architecture import untrainable, vocabulary_size
from cpift.training import fit as finetune
from cpift.training.fit import FitHooks, fit
from cpift.training.spec import FitSpec, StageSpec
from tests.helpers.families import FAMILIES, FUSED, VISION_LANGUAGE, make_family
from tests.helpers.fits import fit_spec, procedural, weights
from tests.helpers.rows import tokenised_dataset

TASKS = (procedural("addition", "addition", 60), procedural("reverse", "reverse", 60))


PROMPT = ("llama", "qwen3_moe")  # the others are slow together


def _families() -> list[Any]:
    return [
        family if family in PROMPT else pytest.param(family, marks=pytest.mark.slow)
        for family in [*FAMILIES, *FUSED.values()]
    ]


@pytest.fixture(scope="module", params=_families())
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family = next((name for name, title in FUSED.items() if title == request.param), request.param)
    return make_family(family, tmp_path_factory.mktemp(family), save_original_format=family == request.param)


def spec(base: Path, out: Path, *stages: StageSpec, regions: Path | None = None) -> FitSpec:
    training = TrainingConfig(steps=5, batch_size=2, learning_rate=3e-3, max_length=96, packing=True, log_every=1)
    return fit_spec(base, out, TASKS, stages, training, seed=0, regions=regions)


@pytest.mark.slow
def test_it_is_trained_frozen_exported_merged_verified_and_loaded(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is exported is what transformers itself saves of the trained model; what is frozen, θ0's in the file."""
    origin = Checkpoint(base)
    saved_by_transformers(monkeypatch, tmp_path / "own")
    probe = fit(spec(base, tmp_path / "probe", StageSpec(("addition",))))
    assert probe["log"][-1]["loss"] < probe["log"][0]["loss"]
    one = Checkpoint(tmp_path / "probe" / "export")
    own = load_file(tmp_path / "own" / "model.safetensors")
    assert set(own) == set(one.names) == set(origin.names)
    assert all(torch.equal(one.tensor(name), own[name]) for name in own)
    masks = cores(origin, {"addition": one}, tmp_path / "regions")
    stage = StageSpec(("reverse",), frozen=("addition",))
    (frozen,) = fit(spec(base, tmp_path / "next", stage, regions=tmp_path / "regions"))["frozen"]
    assert frozen["moved"] == 0
    assert frozen["elements"] == int(0.1 * origin.numel)
    two = Checkpoint(tmp_path / "next" / "export")
    for name, words in masks["addition"].words.items():
        still = unpack_mask(words, origin.tensors[name].numel)
        assert torch.equal(two.tensor(name).flatten()[still], origin.tensor(name).flatten()[still]), name
        if "rotary" not in name and not still.all():
            assert not torch.equal(two.tensor(name).flatten()[~still], origin.tensor(name).flatten()[~still]), name
    merge_and_verify(origin, {"addition": one, "reverse": two}, tmp_path)


def saved_by_transformers(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Have the next fine-tune's model saved by itself too, before it is exported."""
    export = finetune.write_trained

    def both(model: Any, *rest: Any) -> None:
        if not folder.exists():
            model.save_pretrained(folder)
        export(model, *rest)

    monkeypatch.setattr(finetune, "write_trained", both)


def cores(origin: Checkpoint, tuned: dict[str, Checkpoint], folder: Path) -> dict[str, CoreRegion]:
    folder.mkdir()
    found = select_regions(origin, tuned, RegionsConfig(p=0.1))
    save_regions(found, folder)
    return found


def merge_and_verify(origin: Checkpoint, tuned: dict[str, Checkpoint], tmp_path: Path) -> None:
    """Fuse, check, and have transformers load the result: all of it, and as if it were too large for that."""
    cores(origin, tuned, tmp_path / "both")
    method = Fusion(FusionInputs(origin, origin, tuned, tmp_path / "both", list(tuned)), FusionConfig())
    out = tmp_path / "fused"
    out.mkdir()
    merge(method, origin, out, "inputs", shard_size=30_000)
    checks = [*verify(method, origin, out), check_loads(out, 1 << 30), check_loads(out, 0)]
    assert not failures(checks)
    assert [check["passed"] for check in checks[-2:]] == [True, True]
    cored = checks[1]
    assert (cored["passed"], "0 differ" in cored["detail"]) == (True, True), cored
    written = Checkpoint(out)
    read, given = load_model(out), load_model(out, tensors={name: written.tensor(name) for name in written.names})
    assert type(given) is type(read)
    assert given.generation_config.to_dict() == read.generation_config.to_dict()
    for name, values in read.state_dict().items():
        assert torch.equal(given.state_dict()[name], values), name


class _Stopped(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("original", [True, False])
def test_experts_go_on_from_a_checkpoint_where_they_were(tmp_path: Path, original: bool) -> None:
    """transformers' Trainer would pass over experts whose names in its checkpoint are not its class's."""
    base = make_family("qwen3_moe", tmp_path / "base", save_original_format=original)

    def stop(checkpoint: Path, metrics: dict[str, Any]) -> None:
        if metrics["step"] == 2:
            shutil.copytree(checkpoint, tmp_path / "kept")
            raise _Stopped

    def run(out: str, hooks: FitHooks) -> None:
        one = spec(base, tmp_path / out, StageSpec(("addition",)))
        fit(replace(one, training=one.training.model_copy(update={"checkpoint_every": 2})), hooks)

    run("undisturbed", FitHooks())
    with pytest.raises(_Stopped):
        run("broken", FitHooks(on_checkpoint=stop))
    run("broken", FitHooks(resume_from=tmp_path / "kept"))
    assert weights(tmp_path / "broken" / "export") == weights(tmp_path / "undisturbed" / "export")


@pytest.mark.slow
@pytest.mark.parametrize("family", VISION_LANGUAGE)
def test_a_vision_language_model_is_merged_and_not_trained(family: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText

    fields = VISION_LANGUAGE[family]
    config = AutoConfig.for_model(family, **fields | {"text_config": {"vocab_size": 64, **fields["text_config"]}})
    for seed, name in enumerate(("base", "one", "two")):
        torch.manual_seed(seed)
        AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / name)
    tuned = {name: Checkpoint(tmp_path / name) for name in ("one", "two")}
    merge_and_verify(Checkpoint(tmp_path / "base"), tuned, tmp_path)
    assert vocabulary_size(tmp_path / "base") == 64
    (problem,) = untrainable(tmp_path / "base", "model.path")
    assert "only models of text alone are trained" in problem.what


@pytest.mark.slow
@pytest.mark.parametrize("attention", [None, "eager"])
def test_a_packed_token_has_the_loss_that_it_has_alone(base: Path, attention: str | None) -> None:
    model, tokenizer = load_model(base, torch.float32), load_tokenizer(base)
    if attention is not None:
        model.set_attn_implementation(attention)
    model.config.use_cache = False  # as while training
    rows = tokenised_dataset(load_examples(TASKS[1].train)[:12], tokenizer, 96)
    alone = sorted(loss for row in rows for loss in losses(model, [row], tokenizer))
    together = sorted(losses(model, list(packed_rows(rows, 96)), tokenizer))
    assert len(together) == len(alone) > 50
    torch.testing.assert_close(torch.tensor(together), torch.tensor(alone), rtol=0, atol=2e-5)


@torch.no_grad()
def losses(model: Any, rows: list[dict[str, Any]], tokenizer: Any) -> list[float]:
    """Of each label of a batch."""
    batch = CompletionCollator(tokenizer)(rows)
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch).logits[:, :-1].float()
    found = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    kept: list[float] = found[labels.flatten() != IGNORED].tolist()
    return kept
