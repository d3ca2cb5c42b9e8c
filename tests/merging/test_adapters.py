"""Merges as one adapter: what PEFT computes of it is the merged model, and what cannot be one is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

import cpift
from cpift.checkpoints.adapters import low_rank
from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.opening import open_models
from cpift.cli.main import app
from cpift.merging.adapters import making
from cpift.merging.registry import METHODS
from tests.helpers.toys import write_tokenizer
from tests.helpers.ways_to_merge import write_moments

peft = pytest.importorskip("peft")
TINY: dict[str, Any] = {
    "llama": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_inner": 16},
}
PLAIN = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]}
OTHER = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "up_proj"], "use_rslora": True}
PATTERNS = OTHER | {"rank_pattern": {"0.self_attn.q_proj": 1}, "alpha_pattern": {"up_proj": 9}}
GPT2: dict[str, Any] = {"fan_in_fan_out": True}
# Of a base two adapters' settings, by what is special in them.
PAIRS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("llama", PLAIN, OTHER),
    "patterns": ("llama", PLAIN, PATTERNS),
    "biases": ("llama", PLAIN | {"bias": "all"}, OTHER | {"bias": "lora_only"}),
    "whole": ("llama", PLAIN | {"modules_to_save": ["norm", "lm_head"]}, OTHER),
    "whole beside factors": ("llama", PLAIN | {"modules_to_save": ["up_proj"]}, OTHER),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}, {"target_modules": ["lm_head", "k_proj"]}),
    "tied": ("llama-tied", {"target_modules": ["embed_tokens"]}, OTHER),
    "tied whole": ("llama-tied", PLAIN | {"modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens"]}),
    "transposed": ("gpt2", {"target_modules": ["c_attn", "wte"]} | GPT2, {"target_modules": ["c_fc", "c_attn"]} | GPT2),
}
UNITED = ["linear", "task_arithmetic", "model_stock"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    root = tmp_path_factory.mktemp("models")
    for kind, size in TINY.items():
        for name, tied in ((kind, False), (f"{kind}-tied", True)):
            torch.manual_seed(0)
            config = AutoConfig.for_model(kind, vocab_size=40, tie_word_embeddings=tied, attention_bias=True, **size)
            AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(root / name)
            write_tokenizer(root / name, [])
    for name, (base, *settings) in PAIRS.items():
        for number, chosen in enumerate(settings):
            trained(root / base, root / f"{name}-{number}", number, **chosen)
    return root


def trained(base: Path, out: Path, seed: int, **settings: Any) -> None:
    """PEFT's own adapter with every trainable parameter moved."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(out)


def pair(models: Path, name: str) -> tuple[Path, dict[str, Path]]:
    return models / PAIRS[name][0], {"one": models / f"{name}-0", "two": models / f"{name}-1"}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(torch.arange(40)[None]).logits
    return found


def off(base: Path, adapter: Path, merged: Path) -> float:
    """How far the logits of PEFT's model are from those of the merged one, of which θ0's are further."""
    from transformers import AutoModelForCausalLM

    origin, whole = (logits(AutoModelForCausalLM.from_pretrained(path)) for path in (base, merged))
    assert (whole - origin).abs().max() > 5e-5
    ours = logits(peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))
    return float((ours - whole).abs().max() / (whole - origin).abs().max().clamp(min=0.1))


FAST = ("biases", "whole beside factors", "tied whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rank"),
    [
        pytest.param(name, rank, marks=() if rank is None and name in FAST else pytest.mark.slow)
        for name in PAIRS
        for rank in (None, 64)
    ],
)
def test_peft_computes_the_merged_model(name: str, rank: int | None, models: Path, tmp_path: Path) -> None:
    """By concatenation, and by singular values of as many as there are."""
    base, tuned = pair(models, name)
    fields: dict[str, Any] = {"method": "task_arithmetic", "weights": {"one": 0.7, "two": -0.4}}
    cpift.merge(base, tuned, tmp_path / "merged", **fields)
    ranks = {"rank": rank} if rank else {}
    made = cpift.merge(base, tuned, tmp_path / "adapter", as_lora=True, **ranks, **fields)
    assert [check["passed"] for check in made.checks] == [True]
    assert off(base, made.path, tmp_path / "merged") < 1e-5
    assert json.loads((made.path / "extraction.json").read_text())["relative"] < 1e-5
    pretrained, opened = open_models(base, {"adapter": made.path, "merged": tmp_path / "merged"})
    for tensor in pretrained.names:
        assert torch.allclose(opened["adapter"].tensor(tensor), opened["merged"].tensor(tensor), atol=1e-6), tensor


@pytest.mark.parametrize("method", [UNITED[0], *(pytest.param(name, marks=pytest.mark.slow) for name in UNITED[1:])])
def test_ranks_add_up(method: str, models: Path, tmp_path: Path) -> None:
    base, tuned = pair(models, "plain")
    made = cpift.merge(base, tuned, tmp_path / "adapter", method=method, as_lora=True)
    cpift.merge(base, tuned, tmp_path / "merged", method=method)
    assert off(base, made.path, tmp_path / "merged") < 1e-5
    factors = load_file(made.path / "adapter_model.safetensors")
    ranks = {key.split(".")[-3]: value.shape[0] for key, value in factors.items() if "lora_A" in key}
    others = {} if method == "model_stock" else {"down_proj": 2, "up_proj": 3}  # whose angle is of both
    assert ranks == {"q_proj": 5} | others


@pytest.mark.slow
def test_weights_may_differ_from_layer_to_layer(models: Path, tmp_path: Path) -> None:
    base, tuned = pair(models, "plain")
    fields: dict[str, Any] = {"method": "linear", "weights": {"one": [{"filter": "q_proj", "value": 3}, {"value": 1}]}}
    made = cpift.merge(base, tuned, tmp_path / "adapter", as_lora=True, **fields)
    cpift.merge(base, tuned, tmp_path / "merged", **fields)
    assert off(base, made.path, tmp_path / "merged") < 1e-5


QUICK, ONE_MODEL = ("ties",), ("passthrough", "nearswap", "arcee_fusion")


@pytest.mark.parametrize(
    "method",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in METHODS if name not in ONE_MODEL],
)
def test_the_record_says_what_a_rank_loses(method: str, models: Path, tmp_path: Path) -> None:
    """Of any method: the norm of the singular values that are left out, of the merged model less θ0."""
    base, tuned = pair(models, "plain")
    of_moments = {"moments": {t: write_moments(tmp_path / t, Checkpoint(base), n) for n, t in enumerate(tuned)}}
    given: dict[str, Any] = of_moments if METHODS[method].needs_moments else {}
    made = cpift.merge(base, tuned, tmp_path / "adapter", method=method, as_lora=True, rank=2, **given)
    cpift.merge(base, tuned, tmp_path / "merged", method=method, **given)
    pretrained, opened = open_models(base, {"adapter": made.path, "merged": tmp_path / "merged"})
    record = json.loads((made.path / "extraction.json").read_text())
    assert record["rank"] == 2
    shared = method in ("model_stock", "consensus")  # leave alone what one task alone has
    expected = {"q_proj"} if shared else {"q_proj", "down_proj", "up_proj"}
    assert {one["module"].rpartition(".")[2] for one in record["modules"]} == expected
    for one in record["modules"]:
        change = (
            opened["merged"].tensor(f"{one['module']}.weight") - pretrained.tensor(f"{one['module']}.weight")
        ).double()
        singular = torch.linalg.svdvals(change)
        assert one["change"] == pytest.approx(float(singular.norm()), rel=1e-4)
        assert one["lost"] == pytest.approx(float(singular[2:].norm()), rel=1e-3, abs=1e-6)
        apart = opened["adapter"].tensor(f"{one['module']}.weight") - opened["merged"].tensor(f"{one['module']}.weight")
        assert float(apart.norm()) == pytest.approx(one["lost"], rel=1e-3, abs=1e-6)


@pytest.mark.slow
def test_whole_fine_tunes_are_approximated_and_norms_kept(models: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = models / "llama"
    for number in (0, 1):
        torch.manual_seed(number)
        model = AutoModelForCausalLM.from_pretrained(base)
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
        model.save_pretrained(tmp_path / f"tuned-{number}")
        write_tokenizer(tmp_path / f"tuned-{number}", [])
    tuned = {"one": tmp_path / "tuned-0", "two": tmp_path / "tuned-1"}
    made = cpift.merge(base, tuned, tmp_path / "adapter", method="ties", as_lora=True, rank=40)
    cpift.merge(base, tuned, tmp_path / "merged", method="ties")
    assert off(base, made.path, tmp_path / "merged") < 1e-4
    with pytest.raises(cpift.ConfigError, match=r"tasks\.one\.checkpoint: is a whole fine-tune"):
        cpift.merge(base, tuned, tmp_path / "other", method="linear", as_lora=True)


def test_updates_are_not_rounded_to_the_dtype_of_the_base(models: Path, tmp_path: Path) -> None:
    """θ0 in bf16 rounds away most of a small update; the adapter has all of it."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(models / "llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base", [])
    _, tuned = pair(models, "plain")
    made = cpift.merge(tmp_path / "base", tuned, tmp_path / "adapter", method="linear", as_lora=True)
    exact = cpift.merge(models / "llama", tuned, tmp_path / "exact", method="linear", as_lora=True)
    mine, theirs = (load_file(one.path / "adapter_model.safetensors") for one in (made, exact))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_the_base_is_named_without_places(models: Path, tmp_path: Path) -> None:
    base, tuned = pair(models, "plain")
    made = cpift.merge(base, tuned, tmp_path / "adapter", method="linear", as_lora=True)
    settings = json.loads((made.path / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "llama"
    assert str(tmp_path.parent) not in (made.path / "README.md").read_text()
    for number, folder in enumerate(tuned.values()):
        named = shutil.copytree(folder, tmp_path / f"named-{number}") / "adapter_config.json"
        named.write_text(json.dumps(json.loads(named.read_text()) | {"base_model_name_or_path": "org/base"}))
    again = cpift.merge(
        base,
        {"one": tmp_path / "named-0", "two": tmp_path / "named-1"},
        tmp_path / "of-hub",
        method="linear",
        as_lora=True,
    )
    assert json.loads((again.path / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"method": "ties"}, r"fusion\.as_lora: without a rank .* give fusion\.rank"),
        ({}, r"fusion\.as_lora: without a rank .* cpift is no sum"),
        ({"method": "linear", "normalize": False}, r"fusion\.weights: sum to 2: θ0 itself is scaled"),
        ({"method": "linear", "vocabulary": "base"}, r"fusion\.vocabulary: makes other layers or rows"),
        ({"method": "linear", "dtype": "float16"}, r"model\.dtype: is float16"),
        ({"method": "linear", "rank": 0}, r"fusion\.rank"),
        ({"method": "linear", "as_lora": False, "rank": 2}, r"fusion\.rank: is 2, and no adapter is asked for"),
        ({"method": "ties", "rank": 2, "memory_budget": "1KiB"}, r"resources\.memory_budget"),
    ],
)
def test_what_cannot_be_an_adapter_is_named(fields: dict[str, Any], said: str, models: Path, tmp_path: Path) -> None:
    base, tuned = pair(models, "plain")
    with pytest.raises(cpift.ConfigError, match=said):
        cpift.merge(base, tuned, tmp_path / "adapter", **({"as_lora": True} | fields))
    assert not list(tmp_path.iterdir())


def test_an_interrupted_merge_goes_on_from_its_factors(models: Path, tmp_path: Path) -> None:
    base, tuned = pair(models, "plain")
    fields: dict[str, Any] = {"method": "ties", "as_lora": True, "rank": 2}
    whole = cpift.merge(base, tuned, tmp_path / "whole", **fields)
    calls: list[int] = []
    real = low_rank.factors

    def some(change: torch.Tensor, rank: int) -> Any:
        calls.append(rank)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(change, rank)

    with mock.patch.object(making, "factors", some):
        with pytest.raises(KeyboardInterrupt):
            cpift.merge(base, tuned, tmp_path / "adapter", **fields)
        made = cpift.merge(base, tuned, tmp_path / "adapter", **fields)
    assert len(calls) == 6 + 1  # of six matrices two were kept, and one was begun twice
    name = "adapter_model.safetensors"
    assert (made.path / name).read_bytes() == (whole.path / name).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "adapter"}


def test_the_command_and_a_file_say_the_same(models: Path, tmp_path: Path) -> None:
    base, tuned = pair(models, "plain")
    arguments = [str(base), *(f"{name}={path}" for name, path in tuned.items()), "--method", "linear", "--as-lora"]
    done = CliRunner().invoke(app, ["merge", *arguments, "--out", str(tmp_path / "adapter")])
    assert done.exit_code == 0, done.output
    assert "6 weights, of ranks up to 5: nothing is lost but rounding" in done.output
    raw = {
        "name": "both",
        "output": str(tmp_path / "run"),
        "model": {"path": str(base)},
        "tasks": [{"name": name, "checkpoint": {"path": str(path)}} for name, path in tuned.items()],
        "fusion": {"method": "linear", "as_lora": True},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    done = CliRunner().invoke(app, ["fuse", str(tmp_path / "run.yaml")])
    assert done.exit_code == 0, done.output
    (made,) = (tmp_path / "run" / "fuse").iterdir()
    name = "adapter_model.safetensors"
    assert (made / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()
    assert "library_name: peft" in (made / "README.md").read_text()
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw | {"integration": {"steps": 1, "learning_rate": 1e-4}}))
    done = CliRunner().invoke(app, ["fuse", str(tmp_path / "run.yaml")])
    assert "fusion.as_lora: makes an adapter, and `integration` trains whole models" in str(done.exception)


def test_an_adapter_that_is_not_the_merge_is_set_aside(models: Path, tmp_path: Path) -> None:
    base, tuned = pair(models, "plain")
    joined = making._joined

    def wrong(method: Any, name: str) -> Any:
        left, right = joined(method, name) or (torch.zeros(1, 1), torch.zeros(1, 1))
        return left * 1.001, right

    with (
        mock.patch.object(making, "_joined", wrong),
        pytest.raises(cpift.StageError, match=r"is the merge by its definition in fp64: .* wrong: model\.layers"),
    ):
        cpift.merge(base, tuned, tmp_path / "adapter", method="linear", as_lora=True)
    assert not (tmp_path / "adapter").exists()
