"""Given models on given rows: what is recognised, what is scored once, what the figures say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

from cpift.console.view import quiet
from cpift.errors import ConfigError
from cpift.given_models import ToScore, check, score, to_score
from cpift.pipeline.engine import NoEngine
from cpift.pipeline.inprocess import InProcessEngine
from cpift.scorecard.show import write_card
from tests.helpers.toys import WIDTH, formula, make_toy, write_tokenizer


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Two files of rows: answers that are numbers, and plain replies."""
    sums = [f"{n}+1?,{n + 1}" for n in range(6)]
    (tmp_path / "sums.csv").write_text("\n".join(["question,answer", *sums]) + "\n")
    said = [{"prompt": f"Say {word}", "completion": " ".join([word] * 40)} for word in ("red", "blue", "green")]
    (tmp_path / "said.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said))
    return tmp_path


def asked_of(models: Path, rows: Path, *names: str) -> ToScore:
    tests = [f"one={rows / 'sums.csv'}", str(rows / "said.jsonl")]
    return to_score({name: models / name for name in names}, tests, base=models / "base", output=rows / "scores")


def test_models_are_scored_on_rows_that_are_recognised_and_once(models: Path, rows: Path) -> None:
    asked = asked_of(models, rows, "one", "two")
    assert [(test.name, test.guess.metric) for test in asked.tests] == [("one", "number"), ("said", "loss")]
    assert asked.config.evaluation.max_length >= max(test.longest for test in asked.tests)
    assert check(asked) == []
    card = score(asked, InProcessEngine(), quiet())
    assert card.models == ["base", "one", "two"]
    assert card.own == {}  # `said` has no fine-tune of its name, and nothing is merged
    merged = score(asked.with_merged("mean", models / "two"), InProcessEngine(), quiet())
    assert merged.scores["mean"] == merged.scores["two"]
    assert set(merged.own) == {"one", "said"}
    assert merged.own["one"] == "one"
    assert merged.chosen == ("said",)
    again = score(asked.with_merged("mean", models / "two"), NoEngine(), quiet())  # which would score nothing
    assert again.scores == merged.scores
    page = write_card(again, rows / "scores")
    kept = json.loads((rows / "scores" / "scores.json").read_text())
    assert kept["models"]["one"]["scores"]["one"]["rows"] == 6
    assert "no difference shown on" in " ".join(again.sentences())
    assert again.sentences()[0][:40] in page.read_text()
    assert "said.jsonl" in (rows / "scores" / "reports").glob("scores-*.html").__next__().read_text()


def test_what_cannot_be_scored_is_one_list(models: Path, rows: Path) -> None:
    (rows / "bad.csv").write_text("question,answer\n")
    arguments = [f"one={rows / 'missing.csv'}", f"two={rows / 'bad.csv'}"]
    with pytest.raises(ConfigError) as error:
        to_score({"one": models / "one"}, arguments, base=models / "base")
    assert [problem.where.split("=")[0] for problem in error.value.problems] == ["--test one", "--test two"]
    with pytest.raises(ConfigError, match="base: is the name of another model here"):
        to_score({"base": models / "one"}, [str(rows / "sums.csv")], base=models / "base")
    with pytest.raises(ConfigError, match="sums: is the name of two tests"):
        to_score({"one": models / "one"}, [str(rows / "sums.csv")] * 2)
    for name in ("", "..", "a|b", "[red]x"):
        with pytest.raises(ConfigError, match=r"names a model: .* → name it otherwise"):
            to_score({name: models / "one"}, [str(rows / "sums.csv")], base=models / "base")
    adapter = rows / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="--base MODEL"):
        to_score({"one": adapter}, [str(rows / "sums.csv")])


def test_an_adapter_with_tokens_of_its_own_is_scored_with_them(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    base = make_toy(tmp_path / "base", 0, layers=1)
    settings = {**json.loads((base / "tokenizer_config.json").read_text()), "chat_template": template}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_tokenizer(adapter, ("<new>",))  # without a template: the base's
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    config |= {"modules_to_save": ["embed_tokens", "lm_head"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    rows = {f"base_model.model.{name}.weight": formula((9, WIDTH), 5) for name in ("model.embed_tokens", "lm_head")}
    save_file(rows, adapter / "adapter_model.safetensors")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "ab", "completion": "<new>"}\n' * 3)
    asked = to_score({"own": adapter}, [str(tmp_path / "rows.jsonl")], base=base, output=tmp_path / "scores")
    card = score(asked, InProcessEngine(), quiet())
    assert card.scores["own"]["rows"]["tokens"] == 6  # <new> and the end of each row
    assert card.scores["base"]["rows"]["tokens"] == 3
