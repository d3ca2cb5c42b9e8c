"""Models with the rows of another vocabulary: by tokens, for tied and untied heads, in slices of any size."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.opening import open_merged
from cpift.checkpoints.united import MISSING, PADDING, Rows, UnitedCheckpoint
from cpift.checkpoints.uniting import united, united_notes
from cpift.checkpoints.vocabulary import token_tensors
from cpift.config.fusion import FusionConfig, TokenConfig
from cpift.errors import CheckpointError
from tests.helpers.toys import WIDTH, formula, make_toy, write_tokenizer

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    root = tmp_path_factory.mktemp("toys")
    make_toy(root / "base", 0, layers=1, rows=12)  # four rows of no token
    make_toy(root / "one", 1, layers=1, tokens=("<a>", "<b>"))
    make_toy(root / "two", 2, layers=1, tokens=("<b>", "<c>", "<a>"))
    return {name: Checkpoint(root / name) for name in ("base", "one", "two")}


def test_slices_of_rows_are_those_of_the_whole(toys: dict[str, Checkpoint]) -> None:
    one, two = toys["one"], toys["two"]
    own = np.array([3, 4, 5, MISSING, 0, MISSING, 9, PADDING, MISSING, PADDING])
    given = {3: [(1, 2)], 5: [(0, 1), (1, 8)]}
    model = UnitedCheckpoint(one, Rows(own, given, (EMBEDDING,)), [one, two])
    mine, theirs = (x.tensor(EMBEDDING) for x in (one, two))
    mean = ((mine[1].double() + theirs[8].double()) / 2).bfloat16()
    rows = [mine[3], mine[4], mine[5], theirs[2], mine[0], mean, mine[9], None, torch.zeros(WIDTH).bfloat16(), None]
    of_tokens = torch.stack([row for row in rows if row is not None]).double()
    padding = of_tokens.mean(0).bfloat16()
    wanted = torch.stack([padding if row is None else row for row in rows])
    assert torch.equal(model.tensor(EMBEDDING), wanted)
    for start, stop in ((0, 0), (0, 1), (5, 43), (17, 80), (WIDTH, 2 * WIDTH)):
        assert torch.equal(model.slice(EMBEDDING, start, stop), wanted.flatten()[start:stop])
    places = np.array([0, 20, 3 * WIDTH + 2, 7 * WIDTH, 79])
    at = np.minimum(places[:, None] + np.arange(4), 79)
    sent = pickle.loads(pickle.dumps(model))
    assert torch.equal(sent.gather(EMBEDDING, places, 4), wanted.flatten()[torch.from_numpy(at)].float())
    assert torch.equal(model.tensor("model.norm.weight"), one.tensor("model.norm.weight"))
    model.prefetch(EMBEDDING, 0, 80)
    model.release(EMBEDDING, 0, 80)


def test_rows_of_tokens_are_their_own_or_whose_is_said(toys: dict[str, Checkpoint]) -> None:
    base, one, two = (x.tensor(EMBEDDING) for x in toys.values())
    tuned = {name: toys[name] for name in ("one", "two")}
    tokens = {
        "<c>": TokenConfig(source="one", token="</s>"),
        "a": TokenConfig(source="two", force=True),
        "<new>": TokenConfig(source="one", token_id=2),
    }
    config = FusionConfig(method="linear", vocabulary="union", tokens=tokens)
    first, models = united(toys["base"], tuned, config)
    assert isinstance(first, UnitedCheckpoint)
    assert list(first.tokens)[-4:] == ["<a>", "<b>", "<c>", "<new>"]
    x, y, z = first.tensor(EMBEDDING), models["one"].tensor(EMBEDDING), models["two"].tensor(EMBEDDING)
    assert x.shape == y.shape == z.shape == (12, WIDTH)
    assert torch.equal(x[1:8], base[1:8])
    for mine in (x, y, z):
        assert torch.equal(mine[0], two[0])
        assert torch.equal(mine[11], one[2])
    mean = ((one[8].double() + two[10].double()) / 2).bfloat16()
    assert torch.equal(x[8], mean)
    assert torch.equal(y[8:10], one[8:10])
    assert torch.equal(z[8:11], two[[10, 8, 9]])
    assert torch.equal(y[10], one[7])
    assert first.rewritten["config.json"]["vocab_size"] == 12
    notes = "\n".join(united_notes(toys["base"], tuned, config))
    assert "Tokens: 12 in 12 rows, cut as by the tokenizer of pretrained" in notes
    assert "one: has no row for 2 of them ('<c>', '<new>')" in notes

    padded = FusionConfig(method="linear", vocabulary="one", pad_to_multiple_of=16)
    first, models = united(toys["base"], tuned, padded)
    assert first.rewritten["config.json"]["eos_token_id"] == 7
    rows = models["one"].tensor(EMBEDDING)
    assert torch.equal(rows[:10], one)
    assert torch.equal(rows[10:], one.double().mean(0).bfloat16().repeat(6, 1))
    assert torch.equal(models["one"].tensor("lm_head.weight")[:10], toys["one"].tensor("lm_head.weight"))


def test_means_leave_the_pretrained_model_out_where_asked_for(tmp_path: Path) -> None:
    for number, tokens in enumerate((("<a>",), ("<a>",), ("<a>",), ())):
        make_toy(tmp_path / str(number), number, layers=1, tokens=tokens, tied=True)
    base, *tuned = (Checkpoint(tmp_path / str(number)) for number in range(4))
    named = dict(zip("xyz", tuned, strict=True))
    wanted = {"pretrained": base.tensor(EMBEDDING)[8]}
    wanted["mean"] = (
        (named["x"].tensor(EMBEDDING)[8].double() + named["y"].tensor(EMBEDDING)[8].double()) / 2
    ).bfloat16()
    for missing, row in wanted.items():
        config = FusionConfig(method="linear", vocabulary="union", missing_tokens=missing)
        first, models = united(base, named, config)
        assert torch.equal(models["z"].tensor(EMBEDDING)[8], row)
        assert torch.equal(first.tensor(EMBEDDING), base.tensor(EMBEDDING))
        assert "lm_head.weight" not in first.tensors


def test_an_adapter_with_new_tokens_is_a_model_of_them(toys: dict[str, Checkpoint], tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_tokenizer(adapter, ("<new>",))
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    config |= {"modules_to_save": ["embed_tokens", "lm_head"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    before = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    rows = formula((9, WIDTH), 5)
    factors = {"A": torch.ones(1, WIDTH), "B": torch.ones(WIDTH, 1)}
    tensors = {f"{before}{part}.weight": values for part, values in factors.items()}
    tensors |= {f"base_model.model.{name}.weight": rows.clone() for name in ("model.embed_tokens", "lm_head")}
    save_file(tensors, adapter / "adapter_model.safetensors")
    config_of = FusionConfig(method="linear", vocabulary="union")
    base, tuned = open_merged(toys["base"].folder, {"lora": adapter, "one": toys["one"].folder}, config_of)
    assert torch.equal(tuned["lora"].tensor(EMBEDDING)[:8], rows[:8])
    assert torch.equal(tuned["lora"].tensor(EMBEDDING)[8], rows[8])
    assert torch.equal(base.tensor(EMBEDDING)[8], rows[8])
    assert torch.equal(tuned["lora"].tensor(EMBEDDING)[9:], toys["one"].tensor(EMBEDDING)[8:])
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(tuned["lora"].tensor(name), (toys["base"].tensor(name).float() + 1).bfloat16())


def test_tokens_that_a_model_has_not_are_refused_by_name(toys: dict[str, Checkpoint]) -> None:
    tuned = {name: toys[name] for name in ("one", "two")}
    tokens = {"<c>": TokenConfig(source="one"), "<b>": TokenConfig(source="two", token_id=11)}
    with pytest.raises(CheckpointError) as caught:
        united(toys["base"], tuned, FusionConfig(method="linear", vocabulary="union", tokens=tokens))
    assert "fusion.tokens.<c>: asks for '<c>' of one, which has no such token" in str(caught.value)
    assert "fusion.tokens.<b>: asks for row 11 of two, which has 11" in str(caught.value)


def test_rows_of_tokens_are_found_where_files_name_them_otherwise_than_the_class(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=5, **sizes)).save_pretrained(tmp_path)
    assert token_tensors(Checkpoint(tmp_path)) == {"gpt_neox.embed_in.weight", "embed_out.weight"}
