"""Models without a chat template: what is chosen is what others render, is in every output, and decides its name."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from cpift.config.inputs import ScratchModel
from cpift.config.loading import parse_config
from cpift.config.run import ModelConfig, RunConfig
from cpift.console.view import quiet
from cpift.data.chat_templates import TEMPLATES, proposed
from cpift.data.tokenise import IGNORED, tokenise
from cpift.errors import CheckpointError, ConfigError, DataError
from cpift.models.sources import load_tokenizer, materialise, model_fingerprint, source_files
from cpift.pipeline.identity import StageArtifacts
from cpift.pipeline.inprocess import InProcessEngine
from cpift.pipeline.pipeline import Pipeline
from cpift.pipeline.preflight import preflight
from cpift.rows.examples import parse_row

SCRATCH = ScratchModel(hidden_size=16, intermediate_size=16, layers=1, heads=2, max_length=256)
TALK = [{"role": role, "content": text} for role, text in (("user", "u1"), ("assistant", "r1"), ("user", "u2"))]
# As axolotl's chatml, Llama 3's own and Stanford Alpaca's write it; turns end with the model's own token.
WRITTEN = {
    "chatml": "<|im_start|>user\nu1<e>\n<|im_start|>assistant\nr1<e>\n<|im_start|>user\nu2<e>\n<|im_start|>assistant\n",
    "llama3": "<|start_header_id|>user<|end_header_id|>\n\nu1<e><|start_header_id|>assistant<|end_header_id|>\n\nr1<e>"
    "<|start_header_id|>user<|end_header_id|>\n\nu2<e><|start_header_id|>assistant<|end_header_id|>\n\n",
    "alpaca": "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\nu1\n\n### Response:\nr1<e>\n\n### Instruction:\nu2\n\n### Response:\n",
}


def without_template(folder: Path) -> Path:
    (folder / "chat_template.jinja").unlink()
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama as base models come: with no chat template."""
    folder = tmp_path_factory.mktemp("models") / "base"
    materialise(ModelConfig(scratch=SCRATCH), folder)
    return without_template(folder)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_is_written_as_others_write_it_and_ends_replies(name: str, base: Path, tmp_path: Path) -> None:
    model = ModelConfig(path=base, chat_template=name)
    materialise(model, tmp_path / "out")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    expected = tokenizer.bos_token + WRITTEN[name].replace("<e>", tokenizer.eos_token)
    assert tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True) == expected
    row = tokenise(parse_row({"messages": [*TALK, {"role": "assistant", "content": "r2"}]}, {}), tokenizer, 10_000)
    trained = tokenizer.decode([label for label in row["labels"] if label != IGNORED])
    assert trained == "r1<|end|>r2<|end|>"
    tokenizer.bos_token = tokenizer.eos_token
    assert not tokenizer.apply_chat_template(TALK, tokenize=False).startswith(tokenizer.eos_token)
    system = [{"role": "system", "content": "s1"}, *TALK]
    assert "s1" in tokenizer.apply_chat_template(system, tokenize=False)
    calls = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    with pytest.raises(DataError, match="it knows no tools"):
        tokenise(parse_row({"messages": [TALK[0], calls]}, {}), load_tokenizer(tmp_path / "out"), 500)
    assert len({model_fingerprint(one) for one in (model, ModelConfig(path=base))}) == 2


def test_a_file_is_taken_as_it_is_and_counts_by_its_text(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(TEMPLATES["chatml"].replace("im_start", "é"), encoding="utf-8")
    model = ModelConfig(path=base, chat_template=str(file))
    before = model_fingerprint(model)
    assert load_tokenizer(base, model).chat_template == file.read_text(encoding="utf-8")
    written_out = ModelConfig(path=base, chat_template=file.read_text(encoding="utf-8"))
    assert model_fingerprint(written_out) == before, "by its text, wherever that stands"
    assert source_files(written_out) == source_files(ModelConfig(path=base))
    file.write_text("other")
    assert model_fingerprint(model) != before
    for bad, message in (
        ("nowhere.jinja", "is none of chatml, llama3, alpaca, and no file"),
        (str(tmp_path), "folder"),
    ):
        with pytest.raises(CheckpointError, match=message):
            materialise(ModelConfig(path=base, chat_template=bad), tmp_path / "out")


THINKS = (
    "\n{% macro thought() %}{% if enable_thinking %}{{ '<think>' }}{% else %}{{ effort or 'none' }}{% endif %}"
    "{% endmacro %}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ thought() }}{% endif %}"
)


@pytest.mark.parametrize(
    ("arguments", "asked", "expected"),
    [
        ({}, {}, "none"),
        ({"enable_thinking": True}, {}, "<think>"),
        ({"enable_thinking": True}, {"enable_thinking": False}, "none"),
        ({"enable_thinking": False, "effort": 'a "é𝒜" \\n'}, {}, 'a "é𝒜" \\n'),
        ({"effort": 3}, {"enable_thinking": False}, "3"),
    ],
)
def test_arguments_are_set_in_the_output_where_nobody_gives_others(
    base: Path, tmp_path: Path, arguments: Any, asked: Any, expected: str
) -> None:
    (tmp_path / "t.jinja").write_text(THINKS, encoding="utf-8")
    model = ModelConfig(path=base, chat_template=str(tmp_path / "t.jinja"), chat_template_kwargs=arguments)
    tokenizer: Any = load_tokenizer(base, model)
    found = tokenizer.apply_chat_template(TALK[:1], tokenize=False, add_generation_prompt=True, **asked)
    plain = load_tokenizer(base, ModelConfig(path=base, chat_template=str(tmp_path / "t.jinja")))
    same: Any = plain.apply_chat_template(TALK[:1], tokenize=False)
    assert found == same + expected


def test_arguments_that_no_template_asks_for_are_refused(base: Path) -> None:
    with pytest.raises(CheckpointError, match="does not ask for 'enable_thinking'"):
        load_tokenizer(
            base, ModelConfig(path=base, chat_template="chatml", chat_template_kwargs={"enable_thinking": 1})
        )
    for name in ("messages", "bos_token", "a b", "x-y", ""):
        with pytest.raises(ValidationError, match="no variable that a chat template may be given"):
            ModelConfig(path=base, chat_template_kwargs={name: True})


def test_what_is_proposed_follows_the_tokens() -> None:
    assert [proposed({token: 1}) for token in ("<|start_header_id|>", "<|im_start|>", "x")] == [
        "llama3",
        "chatml",
        "alpaca",
    ]


# --- a run ---


def run_of(folder: Path, base: Path, **fields: Any) -> RunConfig:
    rows = [f'{{"instruction": "say {n}", "output": "{n}"}}' for n in range(12)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    training = {"steps": 1, "batch_size": 2, "max_length": 200, "checkpoint_every": 0, "precision": "float32"}
    task = {"train": {"file": "rows.jsonl"}, "holdout": {"rows": 4}}
    raw = {
        "name": "t",
        "output": str(folder / "out"),
        "model": {"path": str(base), "chat_template": "alpaca"},
        "tasks": [{"name": name, **task, **fields.pop(name, {})} for name in ("a", "b")],
        "probe": training,
        "backbone": {"source": "pretrained"},
        "integration": dict(training),
        "evaluation": {"max_length": 256},
        "tracking": [],
    }
    return parse_config(raw | fields, folder, "t")


@pytest.mark.slow
def test_every_output_of_a_run_has_the_template(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"set model\.chat_template to one of chatml, llama3, alpaca or a file"):
        preflight(run_of(tmp_path, base, model={"path": str(base)}))
    config = run_of(tmp_path, base)
    preflight(config)
    run = Pipeline(config, InProcessEngine(), quiet())
    scores = run.evaluate()
    assert {"base", "probe a", "probe b", "fused", "final"} == set(scores)
    models = [path.parent for path in (tmp_path / "out").rglob("config.json")]
    assert len(models) == 5
    assert {(folder / "chat_template.jinja").read_text() for folder in models} == {TEMPLATES["alpaca"]}


@pytest.mark.slow
def test_given_models_are_scored_and_merged_with_the_template(base: Path, tmp_path: Path) -> None:
    """θ0 and its tunes are read where they lie, and get no file."""
    tunes: dict[str, Any] = {}
    for seed, name in enumerate(("a", "b")):
        shutil.copytree(base, tmp_path / name)
        tensors = load_file(base / "model.safetensors")
        noise = torch.Generator().manual_seed(seed)
        moved = {key: one + 0.01 * torch.randn(one.shape, generator=noise) for key, one in tensors.items()}
        save_file(moved, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        tunes[name] = {"checkpoint": {"path": str(tmp_path / name)}}
    config = run_of(tmp_path, base, integration=None, probe=None, **tunes)
    preflight(config, stage="evaluate")
    assert StageArtifacts(config).in_place
    run = Pipeline(config, InProcessEngine(), quiet())
    assert {"base", "probe a", "probe b", "fused"} == set(run.evaluate())
    fused = run.fuse().path
    assert (fused / "chat_template.jinja").read_text() == TEMPLATES["alpaca"]
    assert not any((folder / "chat_template.jinja").exists() for folder in (base, tmp_path / "a", tmp_path / "b"))
    other = run_of(tmp_path, base, integration=None, probe=None, **tunes, model={"path": str(base)})
    assert StageArtifacts(other).fuse((), StageArtifacts(other).base).fingerprint != run.fuse().fingerprint
