"""Scores of a small model against slow references: one unpadded sequence at a time, no cache, all logits."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cpift.config.inputs import ScratchModel
from cpift.config.run import DataSource, ModelConfig, TaskConfig
from cpift.config.tasks import EvaluationConfig
from cpift.data.tasks import load_examples
from cpift.data.tokenise import IGNORED, Labelled, tokenise
from cpift.errors import DataError
from cpift.evaluation.likelihood import likelihoods
from cpift.evaluation.scoring import TaskScore, evaluate_model
from cpift.evaluation.text import rouge_l, same_final_number
from cpift.models.sources import load_model, load_tokenizer, materialise
from cpift.rows.examples import Example, Message
from tests.helpers.families import make_family

CHAT = [
    {"messages": [("user", "2+2="), ("assistant", "4")], "answer": "4"},
    {"messages": [("system", "Be brief."), ("user", "What is 10 + 20, please?"), ("assistant", "30")], "answer": "30"},
    {"messages": [("user", "Hi"), ("assistant", "Hello"), ("user", "5-4?"), ("assistant", "1.0")], "answer": "1"},
    {"messages": [("user", "half of 9"), ("assistant", "it is 4.5")], "answer": "4.5"},
    {"messages": [("user", "x"), ("assistant", "no number is as good as 7")], "answer": "7"},
]
CHOICES = [
    {"messages": [("user", "17?"), ("assistant", "odd")], "choices": ["even", "odd"], "answer": "odd"},
    {"messages": [("user", "colour of snow"), ("assistant", "white")], "choices": ["white", "white paint", "red"]},
    {"messages": [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")], "choices": ["d", "e", "fgh"]},
    {"messages": [("user", "7? " * 9), ("assistant", "yes")], "choices": ["no", "yes", "maybe", "yesterday"]},
]


def task(folder: Path, rows: list[dict[str, Any]], metric: str, **fields: object) -> TaskConfig:
    file = folder / f"{metric}.jsonl"
    chat = [{**row, "messages": [{"role": r, "content": c} for r, c in row["messages"]]} for row in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in chat), encoding="utf-8")
    source = DataSource(file=file)
    return TaskConfig.model_validate({"name": metric, "train": source, "test": source, "metric": metric, **fields})


def reference_nll(model: torch.nn.Module, ids: list[int], labels: list[int]) -> float:
    logits = model(input_ids=torch.tensor([ids])).logits[0].detach().double().log_softmax(-1)
    return -sum(float(logits[i - 1, label]) for i, label in enumerate(labels) if i and label != IGNORED)


def with_reply(example: Example, reply: str) -> Example:
    return replace(example, messages=(*example.messages[:-1], Message("assistant", reply)))


def prompt_length(labels: list[int]) -> int:
    """Tokens before the last run of labels."""
    end = len(labels)
    while labels[end - 1] == IGNORED:
        end -= 1
    while end and labels[end - 1] != IGNORED:
        end -= 1
    return end


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scratch model, trained for a moment on some of the rows so that what it says depends on what it is told."""
    path = tmp_path_factory.mktemp("model") / "scratch"
    materialise(ModelConfig.model_validate({"scratch": ScratchModel(hidden_size=64, max_length=256)}), path)
    model, tokenizer = load_model(path), load_tokenizer(path)
    rows = [*CHAT, CHOICES[0], CHOICES[3]]
    examples = [Example(tuple(Message(*message) for message in row["messages"])) for row in rows]
    batches = [tokenise(example, tokenizer, 256) for example in examples]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(140):
        batch = {key: torch.tensor([value]) for key, value in batches[step % len(batches)].items()}
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_loss_equals_the_reference(model_path: Path, tmp_path: Path, batch_size: int) -> None:
    config = task(tmp_path, CHAT, "loss")
    score = evaluate_model(model_path, [config], EvaluationConfig(precision="float32", batch_size=batch_size))["loss"]
    model, tokenizer = load_model(model_path), load_tokenizer(model_path)
    sums, tokens = [], []
    for example in load_examples(config.test):
        row = tokenise(example, tokenizer, 256)
        sums.append(reference_nll(model, row["input_ids"], row["labels"]))
        tokens.append(sum(label != IGNORED for label in row["labels"]))
    assert [row["tokens"] for row in score.examples] == tokens
    assert [row["loss"] * row["tokens"] for row in score.examples] == pytest.approx(sums, rel=1e-5)
    assert score.loss == pytest.approx(sum(sums) / sum(tokens), rel=1e-5)
    assert (score.metric, score.score, score.tokens, score.rows) == ("loss", None, sum(tokens), len(CHAT))


@pytest.mark.parametrize("batch_size", [1, 9, 64])
def test_choice_equals_the_reference(model_path: Path, tmp_path: Path, batch_size: int) -> None:
    config = task(tmp_path, CHOICES, "choice")
    score = evaluate_model(model_path, [config], EvaluationConfig(precision="float32", batch_size=batch_size))["choice"]
    model, tokenizer = load_model(model_path), load_tokenizer(model_path)
    right = []
    for example, row in zip(load_examples(config.test), score.examples, strict=True):
        expected = []
        for choice in example.choices:
            encoded = tokenise(with_reply(example, choice), tokenizer, 256)
            start = prompt_length(encoded["labels"])
            labels = [IGNORED] * start + encoded["labels"][start:]
            expected.append(reference_nll(model, encoded["input_ids"], labels))
        assert row["option_nll"] == pytest.approx(expected, rel=1e-5)
        assert row["prediction"] == example.choices[expected.index(min(expected))]
        right.append(row["prediction"] == (example.answer or example.reply))
        whole = tokenise(example, tokenizer, 256)
        assert row["loss"] * row["tokens"] == pytest.approx(
            reference_nll(model, whole["input_ids"], whole["labels"]), rel=1e-5
        )
    assert score.score == sum(right) / len(right)


def greedy_reference(model_path: Path, example: Example, limit: int) -> str:
    model, tokenizer = load_model(model_path), load_tokenizer(model_path)
    row = tokenise(example, tokenizer, 256)
    ids = row["input_ids"][: prompt_length(row["labels"])]
    written: list[int] = []
    while len(written) < limit:
        written.append(int(model(input_ids=torch.tensor([ids + written])).logits[0, -1].argmax()))
        if written[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(written, skip_special_tokens=True).strip()


@pytest.mark.parametrize("metric", ["number", "rouge"])
def test_generated_text_equals_the_reference(model_path: Path, tmp_path: Path, metric: str) -> None:
    config = task(tmp_path, CHAT, metric, max_new_tokens=12)
    score = evaluate_model(model_path, [config], EvaluationConfig(precision="float32", batch_size=3))[metric]
    expected = []
    for example, row in zip(load_examples(config.test), score.examples, strict=True):
        text = greedy_reference(model_path, example, 12)
        assert row["prediction"] == text
        same = same_final_number(text, example.answer or "")
        expected.append(float(same) if metric == "number" else rouge_l(text, example.reply))
    assert [row["score"] for row in score.examples] == expected
    assert score.score == pytest.approx(sum(expected) / len(expected))
    assert score.score, "the model was trained on these rows: with no reply right this test would mean nothing"


# Full attention, windows shorter than a row, positions without ids, and a recurrent layer.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "gemma2": {"num_key_value_heads": 2, "sliding_window": 20, "head_dim": 16, "query_pre_attn_scalar": 16},
    "bloom": {},
    "lfm2": {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_cache_equals_the_reference(family: str, tmp_path: Path) -> None:
    """What is shared, padded within a row, or taken out of a batch changes no reply and no likelihood."""
    path = make_family(family, tmp_path / "model", FAMILIES[family])
    tasks = [task(tmp_path, CHAT, "number", max_new_tokens=9), task(tmp_path, CHOICES, "choice")]
    found = evaluate_model(path, tasks, EvaluationConfig(precision="float32"))
    model, tokenizer = load_model(path), load_tokenizer(path)
    for example, row in zip(load_examples(tasks[0].test), found["number"].examples, strict=True):
        assert row["prediction"] == greedy_reference(path, example, 9)
    for example, row in zip(load_examples(tasks[1].test), found["choice"].examples, strict=True):
        encoded = [tokenise(with_reply(example, choice), tokenizer, 256) for choice in example.choices]
        starts = [prompt_length(one["labels"]) for one in encoded]
        labels = [[IGNORED] * start + one["labels"][start:] for one, start in zip(encoded, starts, strict=True)]
        wanted = [reference_nll(model, one["input_ids"], own) for one, own in zip(encoded, labels, strict=True)]
        assert row["option_nll"] == pytest.approx(wanted, rel=1e-5)


def test_a_reply_that_is_cut_off_is_generated_whole(model_path: Path, tmp_path: Path) -> None:
    """Of a later turn no token lies within max_length, so nothing tells how the reply begins."""
    config = task(tmp_path, [CHAT[0], CHAT[2]], "number", max_new_tokens=12)
    ids = tokenise(load_examples(config.test)[1], load_tokenizer(model_path), 256)
    settings = EvaluationConfig(precision="float32", max_length=prompt_length(ids["labels"]))
    found = evaluate_model(model_path, [config], settings)["number"]
    assert [row["prediction"] for row in found.examples] == [
        greedy_reference(model_path, example, 12) for example in load_examples(config.test)
    ]


def test_sampling_preferences_of_the_checkpoint_are_ignored(model_path: Path, tmp_path: Path) -> None:
    config = task(tmp_path, CHAT, "rouge", max_new_tokens=12)
    plain = evaluate_model(model_path, [config], EvaluationConfig(precision="float32"))["rouge"]
    stored = json.loads((model_path / "generation_config.json").read_text())
    wild = {"do_sample": True, "temperature": 9.0, "top_k": 3, "repetition_penalty": 5.0, "num_beams": 2}
    (model_path / "generation_config.json").write_text(json.dumps(stored | wild))
    try:
        assert evaluate_model(model_path, [config], EvaluationConfig(precision="float32"))["rouge"] == plain
    finally:
        (model_path / "generation_config.json").write_text(json.dumps(stored))


def test_bf16_is_close_and_repeatable(model_path: Path, tmp_path: Path) -> None:
    """Autocast rounds products to 8 bits of mantissa: a few per cent of a loss, never more."""
    tasks = [task(tmp_path, CHAT, "loss"), task(tmp_path, CHOICES, "choice")]
    first, second = (evaluate_model(model_path, tasks, EvaluationConfig(precision="bfloat16")) for _ in range(2))
    assert first == second
    exact = evaluate_model(model_path, tasks, EvaluationConfig(precision="float32"))
    for name in exact:
        assert first[name].loss == pytest.approx(exact[name].loss, rel=0.05)


def test_equal_options_go_to_the_first(model_path: Path, tmp_path: Path) -> None:
    rows = [{"messages": [("user", "?"), ("assistant", "b")], "choices": ["b", "b"]}]
    score = evaluate_model(model_path, [task(tmp_path, rows, "choice")], EvaluationConfig())["choice"]
    assert score.examples[0]["prediction"] == "b"
    assert score.score == 1.0


def test_score_is_plain_json(model_path: Path, tmp_path: Path) -> None:
    tasks = [task(tmp_path, CHAT, "number", max_new_tokens=2), task(tmp_path, CHOICES, "choice")]
    for score in evaluate_model(model_path, tasks, EvaluationConfig()).values():
        assert TaskScore(**json.loads(json.dumps(asdict(score)))) == score


def test_progress_ends_at_the_total(model_path: Path, tmp_path: Path) -> None:
    tasks = [task(tmp_path, CHAT, "number", max_new_tokens=2), task(tmp_path, CHOICES, "choice")]
    seen: dict[str, list[tuple[int, int]]] = {"number": [], "choice": []}
    settings = EvaluationConfig(batch_size=2)
    evaluate_model(model_path, tasks, settings, on_progress=lambda name, *counts: seen[name].append(counts))
    for name, total in (("number", 2 * len(CHAT)), ("choice", len(CHOICES))):
        done = [count for count, _ in seen[name]]
        assert done == sorted(done)
        assert seen[name][-1] == (total, total)


def test_limit_takes_the_first_rows(model_path: Path, tmp_path: Path) -> None:
    config = task(tmp_path, CHAT, "loss")
    two = evaluate_model(model_path, [config], EvaluationConfig(limit=2, batch_size=2))["loss"]
    only = evaluate_model(model_path, [task(tmp_path, CHAT[:2], "loss")], EvaluationConfig(batch_size=2))["loss"]
    assert two == only


def test_a_long_reply_is_scored_as_far_as_it_fits(model_path: Path, tmp_path: Path) -> None:
    config = task(tmp_path, CHAT[-1:], "loss")
    whole = evaluate_model(model_path, [config], EvaluationConfig())["loss"]
    cut = evaluate_model(model_path, [config], EvaluationConfig(max_length=20))["loss"]
    assert 0 < cut.tokens < whole.tokens


@pytest.mark.parametrize(
    ("row", "metric", "settings", "words"),
    [
        (CHAT[1], "loss", {"max_length": 16}, ["row 1", "no answer token", "max_length = 16", "raise"]),
        (CHOICES[3], "choice", {"max_length": 40}, ["row 1", "evaluation.max_length is 40"]),
        (CHOICES[0] | {"answer": "prime"}, "choice", {}, ["'prime'", "even", "its letter"]),
        (CHAT[0] | {"answer": "four"}, "number", {}, ["'four'", "no number in answer"]),
    ],
)
def test_unusable_rows_are_refused(
    model_path: Path, tmp_path: Path, row: dict[str, Any], metric: str, settings: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(DataError) as caught:
        evaluate_model(model_path, [task(tmp_path, [row], metric)], EvaluationConfig(**settings))
    for word in words:
        assert word in str(caught.value)


def test_plain_text_is_scored_whole_as_transformers_scores_it(model_path: Path, tmp_path: Path) -> None:
    texts = ["once upon a time", "x"]
    (tmp_path / "loss.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = TaskConfig(name="loss", test=DataSource(file=tmp_path / "loss.jsonl"))
    score = evaluate_model(model_path, [config], EvaluationConfig(precision="float32"))["loss"]
    model, tokenizer = load_model(model_path, torch.float32), load_tokenizer(model_path)
    for text, row in zip(texts, score.examples, strict=True):
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        assert row["loss"] == pytest.approx(float(model(ids, labels=ids).loss), rel=1e-5)
        assert row["tokens"] == ids.shape[1] - 1


def test_a_shared_prefix_changes_nothing(model_path: Path) -> None:
    """Groups whose members share nothing, everything but the end, or are alone, in one batch."""
    model = load_model(model_path)

    def labelled(ids: list[int], prompt: int) -> Labelled:
        return Labelled(ids, [IGNORED] * prompt + ids[prompt:])

    groups = [
        [labelled([5, 6, 7, 8], 3), labelled([5, 6, 7, 9, 10, 11], 3)],
        [labelled([1, 2, 3], 1), labelled([4, 2, 3], 1)],
        [labelled([*range(20, 40)], 13)],
        [labelled([9, 9, 9, 1], 1), labelled([9, 9, 9, 2], 3), labelled([9, 9, 9, 2], 3)],
    ]
    with torch.no_grad():
        found = [[one.nll for one in group] for group in likelihoods(model, groups)]
        expected = [[reference_nll(model, one.ids, one.labels) for one in group] for group in groups]
    for got, wanted in zip(found, expected, strict=True):
        assert got == pytest.approx(wanted, rel=1e-5)
    assert all(math.isfinite(value) for group in found for value in group)
