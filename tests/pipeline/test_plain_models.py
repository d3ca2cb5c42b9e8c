"""A plan that asks no class says and refuses what one says and refuses that asks it, word for word."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from cpift.config.loading import load_config
from cpift.errors import CpiftError
from cpift.merging.planning import given_notes
from cpift.pipeline.preflight import examined
from cpift.pretrained import plain
from cpift.pretrained.plain_tokenizer import plain_tokenizer
from tests.helpers.merges import config_file

Edit = Callable[[Path], object]
Check = Callable[[Path], str]
Said = Callable[..., str]


def fields(name: str, **changes: Any) -> Edit:
    """Set fields of a JSON file; a value of `...` takes one out."""

    def edit(folder: Path) -> None:
        found = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({key: value for key, value in found.items() if value is not ...}))

    return edit


def config(**changes: Any) -> Edit:
    return fields("config.json", **changes)


def tokens(**changes: Any) -> Edit:
    return fields("tokenizer_config.json", **changes)


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Edit:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def text(name: str, content: str) -> Edit:
    return lambda folder: (folder / name).write_text(content)


NORM, HEAD, EMBEDDING = "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"
TAKEN: dict[str, Edit] = {
    "as it is": lambda folder: None,
    "tied and there twice": weights(lambda one: one.update({HEAD: one[EMBEDDING].clone()})),
    "with a buffer of before": weights(lambda one: one.update({"model.rotary_emb.inv_freq": torch.ones(4)})),
    "wrapped": weights(lambda one: [one.update({f"module.{name}": one.pop(name)}) for name in list(one)]),
    "an older dtype": config(dtype=..., torch_dtype="bfloat16", transformers_version="4.40.0"),
    "no padding token": tokens(pad_token=None),
}
REFUSED: dict[str, Edit] = {
    "no template": lambda folder: (folder / "chat_template.jinja").unlink(),
    "a template that refuses": text("chat_template.jinja", "{{ raise_exception('not so') }}"),
    "a template without an end": text("chat_template.jinja", "{{ messages[-1].content }}"),
    "no end": tokens(eos_token=None),
    "a tokenizer that is code": tokens(auto_map={"AutoTokenizer": ["x.X", None]}),
    "a damaged tokenizer": text("tokenizer.json", "{"),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "lacks a tensor": weights(lambda one: one.pop(NORM)),
    "a tensor of another shape": weights(lambda one: one.update({NORM: torch.ones(7)})),
    "a smaller vocabulary": lambda folder: (
        config(vocab_size=250, bos_token_id=1, eos_token_id=2, pad_token_id=3)(folder),
        weights(lambda one: one.update({EMBEDDING: one[EMBEDDING][:250].clone()}))(folder),
    ),
    "an unknown activation": config(hidden_act="none"),
    "heads that do not divide": config(num_attention_heads=3),
    "a padding token outside": config(pad_token_id=1000),
    "a width that is a text": config(hidden_size="64"),
    "more layers than tensors": config(num_hidden_layers=10**9),
    "two layers more": config(num_hidden_layers=4),
    "another class": config(architectures=["LlamaForSequenceClassification"]),
    "an unknown model": config(model_type="never_heard_of"),
    "untied, and no head": config(tie_word_embeddings=False),
    "quantised": config(quantization_config={"quant_method": "gptq", "bits": 4}),
    "compiled code": config(attn_implementation="someone/kernel"),
    "a wide head": config(head_dim=64),
}


MERGED: dict[str, Edit] = {  # of a tune
    "as it is": lambda folder: None,
    "saved by another release": config(transformers_version="4.40.0", use_cache=False, dtype="float32"),
    "an older way to write": config(rope_parameters=..., rope_theta=10000.0),
    "other positions": config(rope_parameters={"rope_theta": 5.0, "rope_type": "default"}),
    "an end of its own": config(eos_token_id=[257, 3]),
    "generates otherwise": fields("generation_config.json", do_sample=True, top_k=50),
    "lacks a tensor": weights(lambda one: one.pop(NORM)),
    "a smaller vocabulary": REFUSED["a smaller vocabulary"],
    "untied": lambda folder: (
        config(tie_word_embeddings=False)(folder),
        weights(lambda one: one.update({HEAD: one[EMBEDDING].clone()}))(folder),
    ),
    "another copy of what is tied": weights(lambda one: one.update({HEAD: one[EMBEDDING] + 1})),
    "wrapped": TAKEN["wrapped"],
    "an unknown activation": config(hidden_act="none"),
}


@pytest.fixture
def said(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Said:
    """What a run's check says of an edited model, its classes asked or not; what was said before is not taken."""

    def say(edit: Edit, place: str, run: Check, *, asks: bool) -> str:
        folder = tmp_path / place
        if not folder.exists():
            shutil.copytree(models / "base", folder)
            edit(folder)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"{place}-{asks}"))
        with monkeypatch.context() as patch:
            if asks:
                patch.setattr(plain, "checked_release", lambda: None)
            plain.plain_class.cache_clear()
            try:
                return run(folder)
            except CpiftError as error:
                return str(error)
            finally:
                plain.plain_class.cache_clear()

    return say


@pytest.fixture
def train(tmp_path: Path, smoke_config: Path) -> Check:
    """The check of a run that trains from a model."""
    task = {"name": "a", "metric": "number"}
    task |= {split: {"procedural": "addition", "size": 4} for split in ("train", "test")}

    def check(folder: Path) -> str:
        changes = {"model": {"path": str(folder)}, "tasks": [task], "output": str(tmp_path / "out")}
        return str(asdict(examined(load_config(smoke_config, [], changes))))

    return check


@pytest.fixture
def merge(models: Path, tmp_path: Path) -> Check:
    """The check of a merge with a tune, and its notes."""

    def check(folder: Path) -> str:
        tasks = [{"name": folder.name, "checkpoint": {"path": str(folder)}} for folder in (models / "one", folder)]
        run = load_config(config_file(tmp_path, models, tasks=tasks), [], {})
        return str(asdict(examined(run, stage="fuse"))) + "\n".join(given_notes(run))

    return check


def test_what_is_taken_is_taken_with_the_same_words(said: Said, train: Check, tmp_path: Path) -> None:
    for number, (name, edit) in enumerate(TAKEN.items()):
        found = said(edit, str(number), train, asks=False)
        assert found.startswith("{'longest'"), name
        assert said(edit, str(number), train, asks=True) == found, name
        assert plain_tokenizer(tmp_path / str(number)) is not None, name


@pytest.mark.slow
def test_what_is_refused_is_refused_with_the_same_words(said: Said, train: Check) -> None:
    for number, (name, edit) in enumerate(REFUSED.items()):
        found = said(edit, str(number), train, asks=False)
        assert "→" in found, name
        assert said(edit, str(number), train, asks=True) == found, name


@pytest.mark.slow
def test_a_merge_says_the_same(said: Said, merge: Check) -> None:
    found = {name: said(edit, f"m{place}", merge, asks=False) for place, (name, edit) in enumerate(MERGED.items())}
    asked = {name: said(edit, f"m{place}", merge, asks=True) for place, (name, edit) in enumerate(MERGED.items())}
    assert asked == found
    refused = ("other positions", "lacks a tensor", "a smaller vocabulary", "another copy of what is tied")
    assert {name for name, text in found.items() if "→" in text} == {*refused, "an unknown activation"}


@pytest.mark.slow
def test_neither_torch_nor_transformers_is_loaded_to_plan(models: Path, tmp_path: Path, smoke_config: Path) -> None:
    """Of a model that is seen for the first time."""
    raw = yaml.safe_load(smoke_config.read_text())
    run = tmp_path / "run.yaml"
    run.write_text(yaml.safe_dump(raw | {"model": {"path": str(models / "base")}, "output": str(tmp_path / "out")}))
    code = (
        "import sys; sys.argv = ['cpift', 'plan', sys.argv[1]]\n"
        "from cpift import devices; devices.visible_gpus = lambda: 0  # torch alone can tell of some\n"
        "from cpift.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'transformers', 'ray', 'datasets', 'numba'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
