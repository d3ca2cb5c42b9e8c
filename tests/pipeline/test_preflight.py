"""What plan accepts, a run finishes; what it refuses, it refuses before anything is made, in one message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from cpift.config.inputs import ScratchModel
from cpift.config.loading import load_config
from cpift.config.needs import require_extra
from cpift.config.run import RunConfig
from cpift.config.training import LoraConfig
from cpift.console.view import quiet
from cpift.data.use import RowUse, use_sentences
from cpift.errors import ConfigError, DataError
from cpift.models.scratch import make_scratch_tokenizer
from cpift.pipeline.inprocess import InProcessEngine
from cpift.pipeline.pipeline import Pipeline
from cpift.pipeline.preflight import examined, preflight
from cpift.pipeline.report import report
from cpift.training.fit import fit
from cpift.training.spec import StageSpec
from tests.helpers.families import VISION_LANGUAGE, make_family
from tests.helpers.fits import fit_spec
from tests.helpers.small_runs import run_of, turns

SCRATCH = str(make_scratch_tokenizer(ScratchModel()).chat_template)
TEMPLATES = {
    "plain": SCRATCH,
    "no system": "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + SCRATCH,
    "thoughts": SCRATCH.replace("message['content']", "message['content'].split('</think>')[-1]"),
    "endless": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "none": "",
}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family("gpt2", tmp_path_factory.mktemp("gpt2"))


def with_template(folder: Path, template: str, out: Path) -> dict[str, str]:
    """The model with another chat template."""
    out.mkdir()
    for file in folder.iterdir():
        (out / file.name).symlink_to(file)
    (out / "chat_template.jinja").unlink()
    if template:
        (out / "chat_template.jinja").write_text(template)
    return {"path": str(out)}


ROWS = [turns(f"{i}+1?", str(i + 1)) for i in range(6)]


@pytest.mark.parametrize(
    ("template", "rows", "message"),
    [
        ("none", ROWS, "the tokenizer has no chat template"),
        ("no system", [*ROWS, turns("x", "y", system=True)], r"train.jsonl, row 7: .*refuses the conversation: no sys"),
        ("thoughts", [*ROWS, turns("x", "<think>z</think>y")], r"row 7: .*`reasoning_content`"),
        ("plain", [*ROWS, turns("x", "y\ud83d")], "row 7: .*surrogate"),
        ("thoughts", [*ROWS * 30, turns("x", "<think>z</think>y"), *ROWS], r"row 181: .*`reasoning_content`"),
        ("no system", [*ROWS * 30, turns("x", "y", system=True)], r"row 181: .*no system"),
        ("plain", [turns("x" * 50, "y")] * 3, "no reply begins within probe.max_length = 48 tokens in any of"),
    ],
)  # fmt: skip
def test_rows_that_the_template_does_not_take(
    gpt2: Path, tmp_path: Path, template: str, rows: list[Any], message: str
) -> None:
    config = run_of(tmp_path, rows, with_template(gpt2, TEMPLATES[template], tmp_path / "model"))
    with pytest.raises(ConfigError, match=message):
        preflight(config)
    assert not (tmp_path / "out").exists()


def test_models_that_have_no_row_or_place_for_a_token(gpt2: Path, tmp_path: Path) -> None:
    rows = [*ROWS, turns("x" * 130, "y" * 30)]
    fields = {"probe__max_length": 200, "evaluation__max_length": 200}
    with pytest.raises(ConfigError, match=r"probe.max_length: 200 is more than the 128 places"):
        preflight(run_of(tmp_path, rows, {"path": str(gpt2)}, test=ROWS, **fields))
    model = with_template(gpt2, SCRATCH, tmp_path / "model")
    tokenizer = make_scratch_tokenizer(ScratchModel())
    tokenizer.add_tokens(["<new>"])
    (tmp_path / "model" / "tokenizer.json").unlink()
    tokenizer.backend_tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    preflight(run_of(tmp_path, ROWS, model))
    with pytest.raises(ConfigError, match=r"token 259 \('<new>'\) has no row in 259"):
        preflight(run_of(tmp_path, [*ROWS, turns("<new>", "x")], model))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", -1),
        ("seed", 2**31),
        ("seed", 2**70),
        ("probe__steps", 2**40),
        ("probe__learning_rate", float("inf")),
        ("probe__max_length", 2**31),
        ("resources__memory_budget", -1),
        ("resources__memory_budget", 2**63),
        ("model__scratch__layers", 10**6),
        ("name", "𝒜" * 60),
    ],
)
def test_numbers_and_names_out_of_range_are_refused_by_the_config(tmp_path: Path, field: str, value: Any) -> None:
    more = {"resources": {}, "fusion": {"method": "linear"}}
    with pytest.raises(ConfigError, match="model.scratch" if "layers" in field else field.split("__")[-1]):
        run_of(tmp_path, ROWS, **more, **{field: value})


@pytest.mark.parametrize(
    ("fusion", "said"),
    [
        ({"method": "linear", "weights": {"a": 1.0, "b": -1.0}}, r"fusion.weights: sum to 0, and linear divides by it"),
        ({"method": "linear", "weight": 0.0}, r"fusion.weights: sum to 0"),
    ],
)
def test_what_a_method_cannot_do_is_told_first(tmp_path: Path, fusion: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        preflight(run_of(tmp_path, ROWS, fusion=fusion))
    preflight(run_of(tmp_path, ROWS, fusion=fusion), stage="regions")


def test_adapters_that_the_model_does_not_take_are_told_first(gpt2: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    run = run_of(tmp_path, ROWS, model={"path": str(gpt2)})

    def with_targets(*names: str) -> RunConfig:
        return run.model_copy(update={"probe": run.probe.model_copy(update={"lora": LoraConfig(targets=names)})})

    preflight(with_targets("c_attn"))
    with pytest.raises(ConfigError, match=r"probe\.lora\.targets: .*q_proj.* → name modules"):
        preflight(with_targets("q_proj", "x_proj"))


def test_rows_beyond_the_first_of_which_an_evaluation_or_a_sample_would_fail(gpt2: Path, tmp_path: Path) -> None:
    model = {"path": str(gpt2)}
    long = [*ROWS * 25, turns("x" * 100, "y" * 40), *ROWS]
    with pytest.raises(ConfigError, match=r"evaluation.max_length: a row of \d+ tokens, .* model's 128 places"):
        preflight(run_of(tmp_path, ROWS, model, test=long, evaluation__max_length=200))
    preflight(run_of(tmp_path, ROWS, model, test=ROWS * 25, evaluation__max_length=200))
    with pytest.raises(ConfigError, match=r"tasks.a.test row 151: no answer token"):
        preflight(run_of(tmp_path, ROWS, model, test=long))
    lost = [*ROWS, *[turns("x" * 60, "y")] * 60]
    sample = {"integration__samples_per_task": 1}
    with pytest.raises(ConfigError, match=r"integration.samples_per_task: a sample of 1 of 66 rows of task a may have"):
        preflight(run_of(tmp_path, lost, model, test=ROWS, **sample))
    preflight(run_of(tmp_path, lost, model, test=ROWS, integration__samples_per_task=66))


def test_a_row_that_only_the_run_meets_ends_it_before_a_fine_tune(gpt2: Path, tmp_path: Path) -> None:
    picky = "{% if 'q' in messages[0].content %}{{ raise_exception('no q') }}{% endif %}" + SCRATCH
    rows = [*ROWS * 25, turns("q", "1"), *ROWS]
    config = run_of(tmp_path, rows, with_template(gpt2, picky, tmp_path / "model"), test=ROWS)
    preflight(config)  # nothing tells this row from the others
    with pytest.raises(DataError, match=r"row 151: .*no q"):
        Pipeline(config, InProcessEngine(), quiet()).probe()
    assert not list((tmp_path / "out").glob("probe/*/*/export"))


def test_an_extra_that_is_not_installed_is_told_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for word, extra in (("optuna", "optuna"), ("standard", "eval")):
        with pytest.raises(ConfigError, match=rf"search: {word} needs .* pip install 'cpift\[{extra}\]'"):
            require_extra(word, "search")
    require_extra("grid", "search")


def test_a_budget_in_which_no_slice_fits(gpt2: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"resources.memory_budget: .* too little to merge 3 models"):
        preflight(run_of(tmp_path, ROWS, {"path": str(gpt2)}, resources={"memory_budget": 1000}))


def test_an_output_that_can_be_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no folder's name"):
        preflight(run_of(tmp_path, ROWS, output=str(tmp_path / ("x" * 300))))


def test_rows_used_cut_and_left_out_are_told(tmp_path: Path) -> None:
    rows = [*ROWS, turns("x" * 60, "y"), turns("x" * 30, "y" * 30)]
    notes = preflight(run_of(tmp_path, rows, test=ROWS[:2]))
    sentence = "7 of 8 rows used, 1 of them cut at 48 tokens; 1 left out, for the prompt alone fills max_length"
    assert f"tasks.a.train at probe.max_length = 48: {sentence}" in notes
    assert "tasks.a.test: 2 of 2 rows have a prompt that tasks.b.train has too" in " ".join(notes)
    found = fit(
        fit_spec(make_family("llama", tmp_path / "model"), tmp_path / "fit", run_of(tmp_path, rows).tasks,
                 (StageSpec(("a", "b")),), run_of(tmp_path, rows).probe_training, seed=0)
    )  # fmt: skip
    wanted = {"max_length": 48, "rows": 8, "left_out": 1, "cut": 1, "used": 7}
    assert found["rows"] == [{"a": wanted, "b": wanted}]
    assert next(use_sentences("probe a", found["rows"])) == (
        f"probe a, task a: {sentence}. Raise max_length, or shorten the rows",
        True,
    )


@given(st.lists(st.tuples(st.integers(1, 30), st.booleans()), max_size=20), st.integers(8, 20))
def test_uses_add_up(rows: list[tuple[int, bool]], length: int) -> None:
    use = RowUse(length)
    for size, learnable in rows:
        use.add(size, learnable)
    assert use.used + use.left_out == use.rows == len(rows)
    assert use.cut <= use.used == sum(learnable for _, learnable in rows)
    assert RowUse.of(use.record) == use


@pytest.mark.slow
@settings(
    max_examples=6,
    phases=[Phase.generate],
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(data=st.data())
def test_what_plan_accepts_a_run_finishes(
    gpt2: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    draw = data.draw
    tmp_path = tmp_path_factory.mktemp("run")
    family = draw(st.sampled_from(["gpt2", "scratch"]))
    template = draw(st.sampled_from([name for name in TEMPLATES if name != "endless"]))
    assume(family == "gpt2" or template == "plain")
    model = with_template(gpt2, TEMPLATES[template], tmp_path / "model") if family == "gpt2" else None
    row = st.builds(
        turns,
        st.sampled_from(["1+1?", "x" * 60, "y\n" * 8, "{% raw %}"]),
        st.sampled_from(["2", "<think>a</think>2", "z" * 40, "  ", "\ud800", "<|end|>"]),
        system=st.sampled_from([False, False, False, True]),
    )
    rows = draw(st.lists(row, min_size=1, max_size=3))
    fields = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "probe__max_length": st.sampled_from([8, 24, 200]),
                "probe__packing": st.booleans(),
                "integration__max_length": st.sampled_from([8, 64]),
                "integration__samples_per_task": st.integers(1, 4),
                "evaluation__max_length": st.sampled_from([16, 64, 500]),
                "regions__p": st.sampled_from([1e-6, 0.5, 1.0]),
                "backbone__source": st.just("staged"),
                "fusion": st.sampled_from([{"granularity": "row"}, {"space": "delta"}, {"method": "ties"}]),
                "seed": st.sampled_from([0, 2**31 - 1]),
            },
        )
    )
    config = run_of(tmp_path, rows, model, test=draw(st.sampled_from([rows, ROWS])), **fields)
    try:
        preflight(config, stage="run")
    except ConfigError:
        return
    scores = Pipeline(config, InProcessEngine(), quiet()).evaluate()
    assert {"base", "fused", "final"} <= set(scores)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma2", "qwen3_moe"])
def test_what_plan_accepts_of_a_family_a_run_finishes(tmp_path: Path, family: str) -> None:
    """With core regions by second moments; of experts the report says which each core touches."""
    short = {"probe__steps": 1, "integration__steps": 1, "fusion": {"granularity": "row"}}
    short |= {
        "probe__keep_moments": True,
        "probe__warmup": "exact",
        "regions__measure": "curvature",
        "regions__scope": "tensor",
    }
    config = run_of(tmp_path, ROWS, {"path": str(make_family(family, tmp_path / "model"))}, **short)
    preflight(config, stage="run")
    run = Pipeline(config, InProcessEngine(), quiet())
    assert {"base", "fused", "final"} <= set(run.evaluate())
    found = report(run)
    assert "the elements of largest (θi − θ0)²·vi (measure: curvature)" in found.page.read_text()
    touched = {row["expert"] for row in found.data.experts if any(row["core"].values())}
    assert (len(touched) > 1) == (family == "qwen3_moe")


def test_training_a_vision_language_model_is_refused(gpt2: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText

    fields = VISION_LANGUAGE["llava"]
    fields = fields | {"text_config": {"vocab_size": 259, **fields["text_config"]}}
    AutoModelForImageTextToText.from_config(AutoConfig.for_model("llava", **fields)).save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "model" / name).write_bytes((gpt2 / name).read_bytes())
    for stage in (None, "run", "probe"):
        with pytest.raises(ConfigError, match=r"model.path: .*only models of text alone are trained"):
            preflight(run_of(tmp_path, ROWS, {"path": str(tmp_path / "model")}), stage=stage)


def test_long_rows_are_a_smaller_sample(smoke_config: Path, tmp_path: Path) -> None:
    rows = tmp_path / "long.jsonl"
    rows.write_text(f'{{"prompt": "spell ba", "completion": "{"b a " * 2500}b"}}\n' * 20, encoding="utf-8")
    task = {"name": "long", "metric": "loss", "train": {"file": str(rows)}}
    config = load_config(smoke_config, [], {"tasks": [task], "integration": None, "output": str(tmp_path / "run")})
    (seen,) = [row for row in examined(config, stage="probe").rows if row["field"] == "probe.max_length"]
    assert (seen["in_all"], seen["all"]) == (20, False)
    assert 4 <= seen["rows"] < 20
