"""Fine-tunes that exist already: fused without Ray and without training, refused where they do not fit."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.opening import open_models
from cpift.checkpoints.vocabulary import FittedCheckpoint
from cpift.cli.main import main
from cpift.config.loading import load_config
from cpift.config.run import RunConfig
from cpift.console.view import quiet
from cpift.disk.checksums import file_checksum
from cpift.disk.files import file_sha256, read_json
from cpift.errors import CheckpointError, ConfigError
from cpift.evaluation.scoring import evaluate_model
from cpift.merging.planning import given_notes
from cpift.method.changes import changes
from cpift.models.sources import load_model
from cpift.pipeline.engine import NoEngine
from cpift.pipeline.identity import StageArtifacts
from cpift.pipeline.inprocess import InProcessEngine
from cpift.pipeline.pipeline import Pipeline
from cpift.pipeline.plan import plan
from cpift.pipeline.preflight import preflight
from cpift.pipeline.stages.regions import CHANGES, read_changes
from cpift.sweep.config import load_sweep
from cpift.sweep.points import check_points
from tests.helpers.merges import config_file


def opened(tmp_path: Path, models: Path, **changes: object) -> RunConfig:
    return load_config(config_file(tmp_path, models, **changes))


@pytest.mark.slow
def test_the_command_fuses_without_ray_and_the_model_answers(tmp_path: Path, models: Path) -> None:
    path = config_file(tmp_path, models)
    code = (
        "import sys; from cpift.cli.main import main\n"
        f"sys.argv = ['cpift', 'fuse', {str(path)!r}, '--memory-budget', '256MiB']\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'ray' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    out = Path(done.stdout.split("Fused model: ")[1].strip())
    assert len(Checkpoint(out).files) > 1
    for companion in ("config.json", "tokenizer.json", "chat_template.jinja"):
        assert (out / companion).read_bytes() == (models / "base" / companion).read_bytes()
    inputs = read_json(out / "inputs.json")
    assert list(inputs) == ["pretrained", "backbone", "one", "two"]
    for label, folder in (("pretrained", "base"), ("one", "one"), ("two", "two")):
        files = inputs[label]["files"]
        assert {name for name in files if name.endswith(".safetensors")} == {
            file.name for file in (models / folder).glob("*.safetensors")
        }
        for name, found in files.items():
            weights = name.endswith(".safetensors")
            assert found["sha256"] == (None if weights else file_sha256(models / folder / name))
            assert found.get("xxh3_128") == (file_checksum(models / folder / name) if weights else None)
    record = read_json(out / "fusion.json")
    assert len(record["checks"]) >= 4
    assert not any(check["passed"] is False for check in record["checks"])
    network = load_model(out)
    with torch.inference_mode():
        assert bool(network(torch.tensor([[1, 2, 3]])).logits.isfinite().all())
    assert "given: `one`" in (out / "README.md").read_text()


def test_regions_keep_what_the_fine_tunes_changed(tmp_path: Path, models: Path) -> None:
    folder = Pipeline(opened(tmp_path, models), NoEngine()).regions().path
    base = Checkpoint(models / "base")
    assert read_changes(folder) == {task: changes(base, Checkpoint(models / task)) for task in ("one", "two")}
    (folder / CHANGES).unlink()  # as in a run from before
    assert read_changes(folder) == {}


def test_the_same_command_again_does_nothing_and_another_file_is_noticed(tmp_path: Path, models: Path) -> None:
    mine = tmp_path / "models"
    shutil.copytree(models, mine)
    config = opened(tmp_path, mine)
    first = Pipeline(config, NoEngine())
    fused = first.fuse()
    again = Pipeline(config, NoEngine())
    assert again.fuse() == fused
    assert not again.worked
    os.utime(mine / "one" / "model.safetensors", ns=(0, 0))
    changed = Pipeline(config, NoEngine())
    assert changed.fuse().path != fused.path


def test_stages_that_need_more_name_the_fields(tmp_path: Path, models: Path) -> None:
    config = opened(tmp_path, models)
    preflight(config, stage="fuse")
    with pytest.raises(ConfigError) as caught:
        preflight(config, stage="run")
    for said in ("integration: is not there", "tasks.one.train: is not there", "tasks.two.test: is not there"):
        assert said in str(caught.value)
    with pytest.raises(ConfigError, match=r"tasks\.one\.train: is not there.*backbone\.source: pretrained"):
        preflight(opened(tmp_path, models, backbone={}), stage="fuse")
    with pytest.raises(ConfigError, match="give `train` to train its probe, or the `checkpoint` to use"):
        opened(tmp_path, models, tasks=[{"name": "one"}])


def given_tasks(*checkpoints: Path) -> list[dict[str, object]]:
    """Tasks with a checkpoint and rows to score on, and nothing else."""
    rows = {"procedural": "addition", "size": 6, "split": "test"}
    return [
        {"name": path.name, "checkpoint": {"path": str(path)}, "test": rows | {"seed": seed}}
        for seed, path in enumerate(checkpoints)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cpift", "linear"])
def test_given_checkpoints_with_test_rows_alone_are_scored(tmp_path: Path, models: Path, method: str) -> None:
    """θ0, a full tune, an adapter and what they fuse to: no integration, no training rows."""
    adapter(tmp_path / "lora", models / "base", 0)
    tasks = given_tasks(models / "one", tmp_path / "lora")
    config = opened(tmp_path, models, tasks=tasks, fusion={"method": method})
    preflight(config, stage="evaluate")
    run = Pipeline(config, InProcessEngine(), quiet())
    scores = run.evaluate()
    assert list(scores) == ["base", "probe one", "probe lora", "fused"]
    assert not [path for path in (tmp_path / "run" / ".work").glob("evaluate*") if path.is_dir()]
    assert [step.stage for step in plan(StageArtifacts(config)).steps].count("evaluate") == 4
    assert all(step.state in ("given", "cached") for step in plan(StageArtifacts(config)).steps)
    shutil.copytree(models / "base", tmp_path / "merged")
    _, opened_models = open_models(models / "base", {"lora": tmp_path / "lora"})
    lora = opened_models["lora"]
    weights = {name: lora.tensor(name) for name in lora.names}
    save_file(weights, tmp_path / "merged" / "model.safetensors", metadata={"format": "pt"})
    settings = read_json(tmp_path / "merged" / "config.json") | {"tie_word_embeddings": not lora.is_apart}
    (tmp_path / "merged" / "config.json").write_text(json.dumps(settings))
    alone = evaluate_model(tmp_path / "merged", config.tasks, config.evaluation)
    assert scores["probe lora"]["one"]["loss"] == alone["one"].loss


@pytest.mark.parametrize(
    ("stage", "changes", "said"),
    [
        ("run", {}, ["integration: is not there, and `cpift run` needs it"]),
        ("sweep final", {}, ["integration: is not there, and `cpift sweep` needs it", "`model: fused`"]),
        ("sweep fused", {"backbone": {}}, ["backbone.training: is not there", "tasks.one.train: is not there"]),
        ("evaluate", {"integration": {"steps": 1}}, ["tasks.one.train: is not there", "or leave `integration` out"]),
    ],
)
def test_a_stage_asks_only_for_what_it_needs(
    tmp_path: Path, models: Path, stage: str, changes: dict[str, object], said: list[str]
) -> None:
    tasks = given_tasks(models / "one", models / "two")
    for fine in ("fuse", "evaluate", "sweep fused"):
        preflight(opened(tmp_path, models, tasks=tasks), stage=fine)
    with pytest.raises(ConfigError) as caught:
        preflight(opened(tmp_path, models, tasks=tasks, **changes), stage=stage)
    for part in said:
        assert part in str(caught.value)
    with pytest.raises(KeyError):
        preflight(opened(tmp_path, models, tasks=tasks), stage="sweeps")


def test_a_point_of_a_sweep_that_needs_more_is_refused_before_it_starts(tmp_path: Path, models: Path) -> None:
    run = yaml.safe_load(config_file(tmp_path, models, tasks=given_tasks(models / "one", models / "two")).read_text())
    run |= {"backbone": {"source": "staged"}, "fusion": {"method": "linear"}}
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({"run": run, "space": {"fusion.method": ["linear", "cpift"]}, "model": "fused"}))
    loaded = load_sweep(path)
    preflight(loaded.base, stage="sweep fused")
    with pytest.raises(ConfigError, match=r"tasks\.one\.train.*at fusion\.method cpift"):
        check_points(loaded, "sweep fused")


def edit_header(file: Path, edit: Callable[[dict[str, dict[str, object]]], None]) -> None:
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    edit(header)
    encoded = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + raw[8 + length :])


def edit_index(folder: Path, edit: Callable[[dict[str, str]], object]) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    edit(content["weight_map"])
    index.write_text(json.dumps(content))


def truncate(root: Path) -> None:
    file = root / "one" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def poison(root: Path) -> None:
    tensors = load_file(root / "one" / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, root / "one" / "model.safetensors")


def add_tensor(root: Path) -> None:
    tensors = load_file(root / "one" / "model.safetensors")
    save_file(tensors | {"extra.weight": torch.zeros(3)}, root / "one" / "model.safetensors")


def other_vocabulary(root: Path) -> None:
    tensors = load_file(root / "one" / "model.safetensors")
    tensors = {n: torch.cat([x, x[:2]]) if "embed" in n or "lm_head" in n else x for n, x in tensors.items()}
    save_file(tensors, root / "one" / "model.safetensors")


def other_architecture(root: Path) -> None:
    config = root / "one" / "config.json"
    config.write_text(config.read_text().replace('"model_type": "llama"', '"model_type": "qwen3"'))


def untie(root: Path) -> None:
    tensors = load_file(root / "one" / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    head[7, 5] += 1
    save_file(tensors | {"lm_head.weight": head}, root / "one" / "model.safetensors")


def symlink_loop(root: Path) -> None:
    loop(root / "one" / "model.safetensors")


def loop(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.name)


def pickle(root: Path) -> None:
    (root / "one" / "model.safetensors").unlink()
    (root / "one" / "pytorch_model.bin").write_bytes(b"\x80")


MALFORMED: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated shard": (truncate, "tasks.one.checkpoint: model.safetensors: cannot be read"),
    "missing index entry": (
        lambda root: edit_index(root / "two", lambda entries: entries.pop("model.norm.weight")),
        "tasks.two.checkpoint: model.norm.weight: is in model-0000",
    ),
    "NaN": (poison, "one: model.norm.weight: holds NaN or Inf"),
    "extra tensor": (add_tensor, "tasks.one.checkpoint: its tensors: it has 1 that θ0 lacks (extra.weight)"),
    "other vocabulary": (other_vocabulary, "tasks.one.checkpoint: model.embed_tokens.weight: has"),
    "wrong architecture": (other_architecture, "tasks.one.checkpoint: config.json, model_type: is 'qwen3'"),
    "symlink loop": (symlink_loop, "tasks.one.checkpoint: model.safetensors: is a symbolic link that leads to no file"),
    "symlink loop of a shard": (
        lambda root: loop(root / "two" / "model-00002-of-00002.safetensors"),
        "tasks.two.checkpoint: model-00002-of-00002.safetensors: is a symbolic link that leads to no file",
    ),
    "one file beside shards": (
        lambda root: shutil.copy(root / "one" / "model.safetensors", root / "two"),
        "tasks.two.checkpoint: model.safetensors: is there beside an index of 2 other files",
    ),
    "tied weights that differ": (
        untie,
        "one.checkpoint: lm_head.weight: differs from model.embed_tokens.weight in 1 of",
    ),
    "path escape": (
        lambda root: edit_index(root / "two", lambda entries: entries.update({"model.norm.weight": "../one/x"})),
        "in '../one/x', which is no file of its folder",
    ),
    "pickle": (pickle, "save_pretrained"),
    "duplicate tensor": (
        lambda root: shutil.copy(
            root / "two" / "model-00001-of-00002.safetensors", root / "two" / "model-00002-of-00002.safetensors"
        ),
        "is in model-00001-of-00002.safetensors and in model-00002-of-00002.safetensors",
    ),
    "lying header": (
        lambda root: edit_header(
            root / "one" / "model.safetensors", lambda header: header["model.norm.weight"].update(shape=[63])
        ),
        "'model.norm.weight' has 128 bytes, its shape [63] needs 126",
    ),
    "no folder": (lambda root: shutil.rmtree(root / "one"), "there is no such file or folder"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_inputs_are_one_clear_message_and_nothing_is_written(
    tmp_path: Path, models: Path, kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, said = MALFORMED[kind]
    mine = tmp_path / "models"
    shutil.copytree(models, mine)
    damage(mine)
    before = contents(mine)
    assert said in refused(monkeypatch, capsys, config_file(tmp_path, mine))
    assert contents(mine) == before
    assert [path for path in (tmp_path / "run").rglob("*.safetensors") if ".partial" not in str(path)] == []


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], config: Path, *options: str | Path
) -> str:
    """What `cpift fuse` says that refuses with exit code 2: one message and nothing else."""
    monkeypatch.setattr(sys, "argv", ["cpift", "fuse", str(config), *map(str, options)])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr().err
    assert end.value.code == 2, said
    assert len(re.findall("^cpift: ", said, re.MULTILINE)) == 1
    assert "Traceback" not in said
    return said


def test_another_vocabulary_is_fitted_where_asked_for(tmp_path: Path, models: Path) -> None:
    mine = tmp_path / "models"
    shutil.copytree(models, mine)
    other_vocabulary(mine)
    config = opened(tmp_path, mine, fusion={"vocabulary": "base"})
    preflight(config, stage="fuse")
    fused = Checkpoint(Pipeline(config, NoEngine()).fuse().path)
    plain = Checkpoint(Pipeline(opened(tmp_path, models, fusion={}), NoEngine()).fuse().path)
    assert all(torch.equal(fused.tensor(name), plain.tensor(name)) for name in plain.names)

    tensors = load_file(models / "one" / "model.safetensors")
    short = {n: x[:-3].contiguous() if "embed" in n or "lm_head" in n else x for n, x in tensors.items()}
    save_file(short, mine / "one" / "model.safetensors")
    base = Checkpoint(models / "base")
    fitted = FittedCheckpoint(Checkpoint(mine / "one"), base)
    name = "model.embed_tokens.weight"
    wanted = torch.cat([short[name], base.tensor(name)[-3:]])
    assert torch.equal(fitted.tensor(name), wanted)
    places = np.array([0, wanted.numel() - 200, wanted.numel() - 4])
    assert torch.equal(
        fitted.gather(name, places, 4), torch.stack([wanted.flatten()[p : p + 4] for p in places]).float()
    )


def test_an_output_that_cannot_be_written_is_refused(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_file(tmp_path, models)
    (tmp_path / "run").write_text("a file of somebody's")
    assert "is a file" in refused(monkeypatch, capsys, config)
    monkeypatch.chdir(tmp_path)
    assert "results are not written to object stores" in refused(monkeypatch, capsys, config, "--output", "s3://b/x")
    assert not (tmp_path / "s3:").exists()
    assert (tmp_path / "run").read_text() == "a file of somebody's"
    if os.geteuid() == 0:  # whom no permission stops, but nobody makes a folder there
        said = refused(monkeypatch, capsys, config, "--output", "/sys/cpift")
        assert "/sys/cpift: Operation not permitted → change its permissions" in said or "cannot be written" in said
    else:
        (tmp_path / "closed").mkdir(mode=0o500)
        assert "closed cannot be written" in refused(monkeypatch, capsys, config, "--output", tmp_path / "closed")


def test_a_disk_that_takes_no_more_loses_nothing(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system refuses files above a size, as a full disk would: during regions, and during fusion."""
    config, unlimited = config_file(tmp_path, models), resource.getrlimit(resource.RLIMIT_FSIZE)
    for size, said in ((1 << 12, "one.safetensors: File too large"), (1 << 16, "could not be written: File too large")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, unlimited[1]))
        try:
            assert said in refused(monkeypatch, capsys, config)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert not list((tmp_path / "run").glob("fuse/*/*"))
    assert not list((tmp_path / "run").rglob("*.safetensors.*.partial"))
    Pipeline(opened(tmp_path, models), NoEngine()).fuse()  # goes on


def test_tied_weights_that_are_there_twice_are_written_once(tmp_path: Path, models: Path) -> None:
    mine = tmp_path / "models"
    shutil.copytree(models, mine)
    for name in ("base", "one"):
        tensors = load_file(mine / name / "model.safetensors")
        head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
        save_file(tensors | head, mine / name / "model.safetensors")
    fused, plain = (Pipeline(opened(tmp_path, folder), NoEngine()).fuse().path for folder in (mine, models))
    shards = [file.name for file in sorted(plain.glob("*.safetensors"))]
    assert fused != plain
    assert all((fused / name).read_bytes() == (plain / name).read_bytes() for name in shards)
    assert "lm_head" not in (fused / "model.safetensors.index.json").read_text()


def test_a_base_without_a_chat_template_gets_the_tunes(tmp_path: Path, models: Path) -> None:
    mine = tmp_path / "models"
    shutil.copytree(models, mine)
    (mine / "base" / "chat_template.jinja").unlink()
    shutil.copy(mine / "one" / "chat_template.jinja", mine / "two")
    fused = Pipeline(opened(tmp_path, mine), NoEngine()).fuse().path
    assert (fused / "chat_template.jinja").read_text() == (mine / "one" / "chat_template.jinja").read_text()


def other_base(root: Path) -> None:
    config = json.loads((root / "two" / "config.json").read_text())
    (root / "two" / "config.json").write_text(json.dumps(config | {"rope_parameters": None, "rope_theta": 5e5}))


def test_a_tune_that_computes_otherwise_is_refused_and_what_may_be_meant_is_told(tmp_path: Path, models: Path) -> None:
    mine = tmp_path / "models"
    shutil.copytree(models, mine)
    config = json.loads((mine / "one" / "config.json").read_text())
    (mine / "one" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 77}))
    assert any("max_position_embeddings is 77" in note for note in given_notes(opened(tmp_path, mine)))
    other_base(mine)
    with pytest.raises(ConfigError, match=r"tasks\.two\.checkpoint: config\.json, rope_parameters"):
        preflight(opened(tmp_path, mine), stage="fuse")
    with pytest.raises(CheckpointError, match=r"two: config\.json, rope_parameters"):
        Pipeline(opened(tmp_path, mine), NoEngine()).fuse()


def test_what_is_in_the_hub_s_cache_is_checked_as_a_folder_is(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    mine, sources = tmp_path / "models", {}
    shutil.copytree(models, mine)
    other_base(mine)
    for name in ("base", "one", "two"):
        snapshot = tmp_path / f"models--of--{name}" / "snapshots" / ("a" * 40)
        shutil.copytree(mine / name, snapshot)
        sources[name] = {"hub": f"of/{name}", "revision": "a" * 40}
    tasks = [{"name": name, "checkpoint": sources[name]} for name in ("one", "two")]
    config = opened(tmp_path, mine, model=sources["base"], tasks=tasks)
    with pytest.raises(ConfigError, match=r"1 problem\n.*tasks\.two\.checkpoint: config\.json, rope_parameters"):
        preflight(config, stage="fuse")
    assert not (tmp_path / "run").exists()
    next((tmp_path / "models--of--two").rglob("*.safetensors")).unlink()  # a download that was broken off
    preflight(config, stage="fuse")


# ---- LoRA ------------------------------------------------------------------------------------------------------------


def adapter(folder: Path, base: Path, seed: int, **settings: object) -> dict[str, torch.Tensor]:
    """Write a LoRA adapter for the attention and the embedding; returns scaling · B·A in fp64 by parameter name."""
    generator = torch.Generator().manual_seed(seed)
    tensors, deltas = load_file(base / "model.safetensors"), {}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 12} | settings
    factors = {}
    for name, tensor in tensors.items():
        module, embedding = name.removesuffix(".weight"), "embed" in name
        if not (embedding or ".self_attn." in name):
            continue
        rank = 2 if settings.get("rank_pattern") and module.endswith("k_proj") else 4
        alpha = 3 if settings.get("alpha_pattern") and module.endswith("q_proj") else 12
        rows, columns = tensor.shape[::-1] if embedding else tensor.shape
        a = torch.randn(rank, columns, generator=generator) * 0.05
        b = torch.randn(rows, rank, generator=generator) * 0.05
        kind, end = ("lora_embedding_", "") if embedding else ("lora_", ".weight")
        factors[f"base_model.model.{module}.{kind}A{end}"] = a
        factors[f"base_model.model.{module}.{kind}B{end}"] = b
        delta = (b.double() @ a.double()) * alpha / (rank**0.5 if settings.get("use_rslora") else rank)
        deltas[name] = delta.T if embedding else delta
    if settings.get("modules_to_save"):
        factors["base_model.model.model.norm.weight"] = torch.full((64,), 1.5)
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in factors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return deltas


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {".*q_proj": 3}},
        {"modules_to_save": ["norm"]},
    ],
)
def test_an_adapter_is_its_merged_model(tmp_path: Path, models: Path, settings: dict[str, object]) -> None:
    from cpift.checkpoints.lora import LoraCheckpoint

    base = Checkpoint(models / "base").apart()  # the adapters change the embedding alone, which is tied
    deltas = adapter(tmp_path / "a", models / "base", 0, **settings)
    lora = LoraCheckpoint(tmp_path / "a", base)
    assert lora.names == base.names
    for name, info in base.tensors.items():
        whole = lora.slice(name, 0, info.numel)
        assert whole.dtype == info.dtype
        wanted = base.tensor(name).double() + deltas.get(name, torch.zeros(info.shape))
        if name == "model.norm.weight" and settings.get("modules_to_save"):
            wanted = torch.full((64,), 1.5).double()
        torch.testing.assert_close(
            whole.double().reshape(info.shape), wanted.reshape(info.shape), rtol=2**-8, atol=1e-6
        )
        for start, stop in ((0, 1), (5, 97), (info.numel // 2 - 3, info.numel)):
            start, stop = max(start, 0), min(stop, info.numel)
            assert torch.equal(lora.slice(name, start, stop), whole[start:stop])  # bits do not depend on the slice
        starts = torch.arange(0, info.numel, 37).numpy()
        near = lora.gather(name, starts, 3)[:-1]
        exact = torch.stack([whole[s : s + 3].float() for s in starts[:-1] if s + 3 <= info.numel])
        torch.testing.assert_close(near[: len(exact)], exact, rtol=2**-7, atol=1e-6)


def test_fusing_adapters_equals_fusing_what_they_merge_to(tmp_path: Path, models: Path) -> None:
    tasks = []
    for seed, name in enumerate(("x", "y")):
        deltas = adapter(tmp_path / name, models / "base", seed)
        shutil.copytree(models / "base", tmp_path / f"{name}-merged")
        tensors = load_file(models / "base" / "model.safetensors")
        merged = {n: (x.double() + deltas[n]).float().bfloat16() if n in deltas else x for n, x in tensors.items()}
        merged["lm_head.weight"] = tensors["model.embed_tokens.weight"]  # as PEFT computes it: the head stays
        save_file({n: x.contiguous() for n, x in merged.items()}, tmp_path / f"{name}-merged" / "model.safetensors")
        config = tmp_path / f"{name}-merged" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": False}))
        tasks.append(name)
    fused = []
    for end in ("", "-merged"):
        given = [{"name": name, "checkpoint": {"path": str(tmp_path / f"{name}{end}")}} for name in tasks]
        config = opened(tmp_path, models, tasks=given, output=str(tmp_path / f"run{end}"))
        preflight(config, stage="fuse")
        fused.append(Checkpoint(Pipeline(config, NoEngine()).fuse().path))
    for name, info in fused[0].tensors.items():
        one, other = fused[0].tensor(name).double(), fused[1].tensor(name).double()
        assert info.dtype == torch.bfloat16
        torch.testing.assert_close(one, other, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "use_dora: is true: DoRA scales every row"),
        ({"peft_type": "IA3"}, "is 'IA3', not LORA"),
        ({"r": 8}, "has rank 4, adapter_config.json says 8"),
        ({"r": "x"}, "adapter_config.json, r: is"),
    ],
)
def test_adapters_that_cannot_be_streamed_say_why(
    tmp_path: Path, models: Path, change: dict[str, object], said: str
) -> None:
    from cpift.checkpoints.lora import LoraCheckpoint

    adapter(tmp_path / "a", models / "base", 0)
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError) as caught:
        LoraCheckpoint(tmp_path / "a", Checkpoint(models / "base").apart())
    assert said in str(caught.value)


def test_what_peft_saves_is_what_it_merges(tmp_path: Path, models: Path) -> None:
    peft = pytest.importorskip("peft")
    from cpift.checkpoints.lora import LoraCheckpoint

    base = Checkpoint(models / "base")
    network = load_model(models / "base", torch.float32)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=10,
        use_rslora=True,
        target_modules=["q_proj", "down_proj"],
        modules_to_save=["norm"],
        rank_pattern={"layers.1.mlp.down_proj": 2},
        alpha_pattern={"q_proj": 6},
    )
    adapted = peft.get_peft_model(network, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload().state_dict()
    lora = LoraCheckpoint(tmp_path / "adapter", base)
    changed = 0
    for name in base.names:
        torch.testing.assert_close(lora.tensor(name), merged[name].bfloat16(), rtol=2**-7, atol=1e-6)
        changed += not torch.equal(lora.tensor(name), base.tensor(name))
    assert changed >= 6
