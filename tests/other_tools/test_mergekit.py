"""Files as mergekit's documentation describes them: read, planned and merged, or refused with all that is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from typer.testing import CliRunner

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.cli.main import app
from cpift.config.settings import layer_of
from cpift.errors import ConfigError
from cpift.merging.registry import METHODS as OURS
from cpift.other_tools.mergekit import METHODS, read_mergekit
from cpift.other_tools.mergekit_flags import FLAGS, understood
from cpift.untrusted.yaml import parse_yaml

FILES = sorted((Path(__file__).parent / "mergekit").glob("*.yml"))
REFUSED: dict[str, tuple[str, ...]] = {
    "foreign_adapter": (
        "models.0.model: org/other+org/lora: cpift puts an adapter onto base_model, which is org/base@main",
        "parameters.rescale: is False, and cpift rescales what DARE keeps",
        "parameters.lamda: is no field of mergekit's that cpift knows → did you mean 'lambda'?",
        "dtype: is 'int8' → one of bfloat16",
        "tokenizer.source: is 'org/third', which is none of the models → name one of them, or union, or base",
        "tokenizer.tokens.<x>.source: is {'kind': 'mean'} → give a model, or a kind: model_token, zero",
        "chat_template: is 'mistral-v9' → one of chatml, llama3, alpaca, or a template's text",
    ),
    "multimodal": ("modules: name parts of models", "models: is not there"),
    "part_of_the_layers": (
        "fusion.slices.0.sources.0.layer_range: is [0, 32], and one has 2 layers → end at 2 at most",
        "pad_to_multiple_of: is no field of mergekit's",
        "int8_mask: stands outside of `parameters`",
    ),
}
VERIFIED = (
    "linear",
    "ties_gradient",
    "dare_ties",
    "ties_of_layers",
)  # by its definition too, which reads settings by tensor
LAYERS = {  # of what comes out: the models and layers that each is of
    "frankenmerge": [("one", 0), ("one", 1), ("two", 1)],
    "depth_up": [("base", 0), ("base", 1), ("base", 1)],
    "ties_of_layers": [("base", 0), ("base", 0), ("base", 1)],
}
MERGED = [path.stem for path in FILES if path.stem not in REFUSED]


@pytest.fixture
def here(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the models and an adapter of `base`."""
    for name in ("base", "one", "two"):
        (tmp_path / name).symlink_to(models / name)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    draws = torch.Generator().manual_seed(5)
    before = "base_model.model.model.layers.0.self_attn.q_proj"
    parts = {"A": torch.randn(2, 64, generator=draws), "B": torch.randn(64, 2, generator=draws)}
    save_file(
        {f"{before}.lora_{part}.weight": 0.1 * x for part, x in parts.items()}, adapter / "adapter_model.safetensors"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def merge(*words: str | Path) -> str:
    result = CliRunner().invoke(app, ["merge", *map(str, words)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def file(name: str) -> Path:
    return next(path for path in FILES if path.stem == name)


@pytest.mark.slow
@pytest.mark.parametrize("name", MERGED)
def test_a_file_is_planned_and_merged(name: str, here: Path) -> None:
    if name.startswith(("ties", "dare")):
        pytest.importorskip("peft")
    planned = merge(file(name), "out", "--dry-run")
    assert "Would write" in planned
    assert not (here / "out").exists()
    merge(file(name), "out", *([] if name in VERIFIED else ["--no-verify"]))
    base, out = Checkpoint(here / "base"), Checkpoint(here / "out")
    layers = LAYERS.get(name, [("base", 0), ("base", 1)])
    wanted = {n: base.tensors[m].shape for n, m in named(base, layers)}
    if name == "union_tokenizer":
        wanted |= {"model.embed_tokens.weight": (320, 64)}
        assert out.config["vocab_size"] == 320
    assert {n: x.shape for n, x in out.tensors.items()} == wanted
    assert out.config["num_hidden_layers"] == len(layers)
    dtype = parse_yaml(file(name).read_text())
    kind = {"float16": "F16", "float32": "F32"}.get(dtype.get("out_dtype") or dtype.get("dtype"), "BF16")
    assert {info.kind for info in out.tensors.values()} == {kind}
    if name in WANTED:
        compare(here, WANTED[name])


def named(model: Checkpoint, layers: Sequence[tuple[str, int]]) -> Iterator[tuple[str, str]]:
    """Names of a model of such layers, with those of a model that they are taken from."""
    yield from ((name, name) for name in model.names if layer_of(name) is None)
    for number, (_, of) in enumerate(layers):
        before = f"model.layers.{of}."
        yield from ((f"model.layers.{number}.{n[len(before) :]}", n) for n in model.names if n.startswith(before))


@pytest.mark.parametrize("name", ["frankenmerge", "depth_up"])
def test_layers_are_those_of_their_models(name: str, here: Path) -> None:
    told = merge(file(name), "out", "--no-verify")
    layers, out = LAYERS[name], Checkpoint(here / "out")
    models = {label: Checkpoint(here / label) for label in ("base", "one", "two")}
    for new, old in named(models["base"], layers):
        source = models[layers[layer[1] if (layer := layer_of(new)) else 0 if "embed" in new else -1][0]]
        wanted = source.tensor(old).to(out.tensors[new].dtype)
        nothing = name == "depth_up" and new.startswith("model.layers.2.") and ("o_proj" in new or "down_proj" in new)
        assert torch.equal(out.tensor(new), torch.zeros_like(wanted) if nothing else wanted), new
    assert "Merged model" in told
    planned = merge(file(name), "other", "--dry-run")
    assert "Layers: 3, of " in planned
    assert f"Parameters: {out.numel:,}" in planned


Models = dict[str, torch.Tensor]
Formula = Callable[[str, float, Models], torch.Tensor]


def compare(here: Path, formula: Formula) -> None:
    """Every tensor with what a formula gives of its name, its layer's place, and the models in fp64."""
    models = {name: Checkpoint(here / name) for name in ("base", "one", "two", "out")}
    for name in models["base"].names:
        layer = layer_of(name)
        place = float(layer[1]) if layer else 0.0 if "embed" in name else 1.0
        values = {label: model.tensor(name).double() for label, model in models.items()}
        torch.testing.assert_close(values["out"], formula(name, place, values), rtol=1e-2, atol=1e-3)


def slerped(name: str, place: float, x: Models) -> torch.Tensor:
    points = [0, 0.5, 0.3, 0.7, 1] if "self_attn" in name else [1, 0.5, 0.7, 0.3, 0] if "mlp" in name else [0.5]
    t = points[0] if place == 0 else points[-1]
    cosine = (x["one"] * x["two"]).sum() / x["one"].norm() / x["two"].norm()
    angle = torch.arccos(cosine.clamp(-1, 1))
    if angle < 0.0316:
        return (1 - t) * x["one"] + t * x["two"]
    return (torch.sin((1 - t) * angle) * x["one"] + torch.sin(t * angle) * x["two"]) / torch.sin(angle)


def elected(weights: tuple[float, float], densities: tuple[float, float], normalize: bool, scale: float) -> Formula:
    def formula(name: str, place: float, x: Models) -> torch.Tensor:
        moved = []
        for task, weight, density in zip(("one", "two"), weights, densities, strict=True):
            update = (x[task] - x["base"]).flatten()
            kept = torch.zeros_like(update)
            largest = update.abs().argsort(descending=True, stable=True)[: int(density * update.numel() + 1e-9)]
            kept[largest] = update[largest]
            moved.append(weight * kept)
        total = moved[0] + moved[1]
        agrees = [one.sign() == torch.where(total >= 0, 1.0, -1.0) for one in moved]
        found = sum(one * agree for one, agree in zip(moved, agrees, strict=True))
        by = sum(weight * agree for weight, agree in zip(weights, agrees, strict=True))
        found = found / torch.where(by == 0, 1.0, by) if normalize else found
        return x["base"] + scale * found.view_as(x["base"])

    return formula


def added(one: float, two: float) -> Formula:
    return lambda name, place, x: x["base"] + one * (x["one"] - x["base"]) + two * (x["two"] - x["base"])


WANTED: dict[str, Formula] = {
    "linear": lambda name, place, x: (x["one"] + 0.3 * x["two"]) / 1.3,
    "linear_sum": lambda name, place, x: 0.6 * x["one"] + (0.2 + 0.4 * place) * x["two"],
    "slerp_slices": slerped,
    "task_arithmetic": added(0.35, -0.14),
    "task_arithmetic_normalised": added(0.5, 0.5),
    "ties": elected((0.5, 0.3), (0.5, 0.5), normalize=True, scale=1.0),
    "ties_sum": elected((0.8, 0.6), (0.4, 0.4), normalize=False, scale=1.2),
}


BY_TASK = {"weights": {"one": 0.5, "two": [0.2, 0.8]}, "densities": {"one": 0.6, "two": 0.9}}
DENSITIES = {"densities": {"one": 0.6, "two": 0.4}}
READ: dict[str, dict[str, Any]] = {
    "breadcrumbs": {"gamma": 0.02, "normalize": True, "scale": 0.9, "dtype": "bfloat16", **BY_TASK},
    "breadcrumbs_ties": {"gamma": 0.05, "weight": 0.5, "density": 0.7, "normalize": False},
    "della": {"window": 0.1, "weight": 0.5, "normalize": False, "scale": 1.1, "dtype": "bfloat16", **DENSITIES},
    "della_linear": {"window": 0.15, "weight": 0.5, "density": 0.5, "dtype": "bfloat16"},
    "sce": {"density": 0.5},
    "arcee_fusion": {},
    "ramplus_tl": {"method": "ram_plus", "threshold": 0.0001, "rescale": 0.2, "rescale_limit": 1.5},
}


@pytest.mark.parametrize("name", READ)
def test_parameters_have_our_names(name: str) -> None:
    read = read_mergekit(parse_yaml(file(name).read_text()))
    assert not read.problems
    assert read.fields == {"method": name} | READ[name]
    assert read.models == {task: task for task in (["one"] if name == "arcee_fusion" else ["one", "two"])}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_one_list(name: str, here: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        merge(file(name), "out")
    for told in REFUSED[name]:
        assert told in str(caught.value)
    assert sorted(path.name for path in here.iterdir()) == ["adapter", "base", "one", "two"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("merge_method: [ties]", "merge_method: is a list"),
        ("merge_method: tise\nmodels: [a]", "did you mean 'ties'?"),
        ("merge_method: linear\nmodels: 3", "models: is a number"),
        ("merge_method: linear\nmodels: []", "models: is empty"),
        ("merge_method: linear\nmodels: [a, 3]", "models.1: is a number"),
        ("merge_method: linear\nmodels: [{parameters: {weight: 1}}]", "models.0.model: is not there"),
        ("merge_method: linear\nmodels: [{model: a, weight: 1}]", "models.0.weight: is no field of mergekit's"),
        ("merge_method: linear\nmodels: [{model: a, parameters: 3}]", "models.0.parameters: is a number"),
        ("merge_method: linear\nmodels: [{model: a+b+c}]", "models.0.model: is 'a+b+c'"),
        ("merge_method: linear\nmodels: [{model: {model: {}}}]", "models.0.model: is {'model': {}}"),
        ("merge_method: linear\nmodels: [a]\nparameters: [1]", "parameters: is a list"),
        ("merge_method: linear\nmodels: [a]\nparameters: {normalize: maybe}", "parameters.normalize: is 'maybe'"),
        ("merge_method: ties\nbase_model: b\nmodels: [a]\nparameters: {lambda: [1]}", "parameters.lambda: is [1]"),
        ("merge_method: ties\nbase_model: b\nmodels: [a]\nparameters: {density: []}", "density: is an empty list"),
        ("merge_method: linear\nmodels: [a]\nparameters: {weight: [1, x]}", "a list with more than numbers in it"),
        ("merge_method: linear\nmodels: [a]\nparameters: {weight: [{filter: x}]}", "among its cases"),
        ("merge_method: linear\nmodels: [a]\nparameters: {weight: much}", "parameters.weight: is a text"),
        ("merge_method: ties\nmodels: [a]", "base_model: is not there"),
        ("merge_method: ties\nbase_model: a\nmodels: [a]", "models: name no model beside base_model"),
        ("merge_method: slerp\nbase_model: a\nmodels: [a, b]", "parameters.t: is not there"),
        ("merge_method: slerp\nbase_model: a\nmodels: [b, c]\nparameters: {t: 1}", "models: are 3"),
        ("merge_method: linear\nslices: []", "slices: is a list, not slices"),
        ("merge_method: linear\nslices: [{sources: 3}]", "slices.0.sources: is a number"),
        ("merge_method: linear\nslices: [{sources: [{model: a, layer_range: [4, 2]}]}]", "layer_range: is [4, 2]"),
        ("merge_method: linear\nslices: [{sources: [a]}, {sources: [a]}]", "slices.0.sources: have no layer_range"),
        (
            "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [1, 2]}, {model: b}]}]",
            "slices.0.sources: are 2 beside base_model's part, and it takes 1",
        ),
        ("merge_method: linear\nmodels: [a]\nslices: [{sources: [a]}]", "slices: stand beside `models`"),
        ("merge_method: linear\nmodels: [a]\nout_dtype: 16", "out_dtype: is 16"),
        ("merge_method: linear\nmodels: [a]\ntokenizer: union", "tokenizer: is a text"),
        ("merge_method: linear\nmodels: [a]\ntokenizer_source: b", "tokenizer_source: is 'b', which is none of the"),
        ("merge_method: linear\nmodels: [a]\ntokenizer_source: a\ntokenizer: {}", "tokenizer_source: stands beside"),
        ("merge_method: linear\nmodels: [a]\ntokenizer: {tokens: {x: 3}}", "tokenizer.tokens.x: is a number"),
        ("merge_method: linear\nmodels: [a]\ntokenizer: {pad_to_multiple_of: 0}", "pad_to_multiple_of: is 0"),
        (
            "merge_method: linear\nmodels: [a]\ntokenizer: {tokens: {x: {source: {kind: model_token, model: a}}}}",
            "tokenizer.tokens.x.source: has neither token nor token_id",
        ),
        ("merge_method: linear\nmodels: [a]\nbase_model: b+c", "base_model: b+c: has an adapter"),
    ],
)
def test_what_is_wrong_has_a_name(text: str, told: str) -> None:
    problems = read_mergekit(parse_yaml(text)).problems
    assert told in "\n".join(map(str, problems))
    assert all(problem.remedy for problem in problems)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is empty"),
        ("- a", "holds a list, not fields"),
        ("merge_method: [", "is no YAML"),
        ("a: &a [*a]", "an alias of what it stands in"),
        (
            "x: &x [0,0,0,0,0,0,0,0,0,0]\n"
            + "\n".join(
                f"x{i}: &x{i} [{'*x' + str(i - 1 if i else '')},".replace("*x-1", "*x")
                + ",".join([f"*x{i - 1 if i else ''}"] * 9)
                + "]"
                for i in range(6)
            ),
            "holds more than",
        ),
        (
            "merge_method: linear\nmodels: [{model: one, parameters: {weight: [" + "1," * 10**6 + "]}}]",
            "has more than 262,144 bytes",
        ),
        ("merge_method: linear\nmodels: [one, two]\nparameters: {weight: [" + "1," * 2000 + "]}", "has 2,000 entries"),
        (
            "merge_method: linear\nmodels: [one, two]\nparameters: {weight: [{filter: atn, value: 1}, {value: 2}]}",
            "the filter 'atn' is in no tensor's name",
        ),
        ("merge_method: linear\nmodels: [" + "one," * 4000 + "]", "models: are 4,000 → give at most 17"),
        ("merge_method: linear\nmodels: [one]\n" + "".join(f"k{i}: 1\n" for i in range(500)), "k8: and 491 more"),
        (
            "merge_method: linear\nmodels: ['https://me:secret@host/x', one]",
            "  - x: 'https://***@host/x' is no",
        ),
        ("merge_method: linear\nmodels: [one, nowhere]", "'nowhere' is no model folder and no hub id"),
        ("tasks: []", "is a run's file"),
        ("base_model: a\nexperts: []", "mergekit-moe's file"),
    ],
)
def test_a_hostile_file_is_refused_and_leaves_nothing(text: str, told: str, here: Path) -> None:
    (here / "hostile.yml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        merge("hostile.yml", "out")
    assert told in str(caught.value)
    assert not [path for path in here.iterdir() if "out" in path.name]


@pytest.mark.parametrize(("base", "space"), [("base_model: c\n", "delta"), ("", "weights")])
def test_a_base_that_is_optional_says_what_is_interpolated(base: str, space: str) -> None:
    text = f"merge_method: nuslerp\n{base}models: [{{model: a, parameters: {{weight: 1}}}}, {{model: b}}]\n"
    read = read_mergekit(parse_yaml(text + "parameters: {weight: [0, 1]}"))
    assert not read.problems
    assert read.fields == {"space": space, "weights": {"a": 1, "b": [0, 1]}, "method": "nuslerp"}
    (problem,) = read_mergekit(parse_yaml(text + "parameters: {nuslerp_flatten: false}")).problems
    assert "parameters.nuslerp_flatten: is False, and cpift takes a tensor as one vector" in str(problem)


def test_mergekits_options_are_understood_or_answered() -> None:
    given = {"cuda": True, "random-seed": "7", "out-shard-size": "5B", "lazy-unpickle": True, "copy-tokenizer": True}
    found = understood(given, "float32")
    assert found.settings == {"resources.device": "cuda", "seed": 7, "fusion.shard_size": 20 * 10**9}
    assert not found.problems
    assert len(found.notes) == 3
    refused = understood({name: True for name, flag in FLAGS.items() if flag.remedy} | {"copy-tokenizer": False}, None)
    assert {problem.where for problem in refused.problems} >= {"--transformers-cache", "--no-copy-tokenizer"}
    assert understood({"out-shard-size": "many"}, None).problems
    assert all(bool(flag.field) + bool(flag.said) + bool(flag.remedy) == 1 for flag in FLAGS.values())


def test_options_go_before_the_file_and_its_dtype_counts(here: Path) -> None:
    told = merge(file("linear"), "out", "--dry-run", "--out-shard-size", "1M", "--lazy-unpickle", "--weight", "2")
    assert "--shard-size 2000000 of bytes" in told
    assert "nothing is unpickled" in told
    with pytest.raises(ConfigError, match="--load-in-4bit"):
        merge(file("linear"), "out", "--load-in-4bit")
    with pytest.raises(ConfigError, match="OUT: is not clear"):
        merge(file("linear"))
    with pytest.raises(ConfigError, match="--out: is not there"):
        merge("base", "one")


@pytest.mark.slow
def test_the_text_of_a_template_is_the_outputs(here: Path) -> None:
    """With what would be a variable of the environment in a path, and longer than a file's name may be."""
    template = "{% for message in messages %}{{ message.content + '${HOME}' }}{% endfor %}{# " + "x" * 300 + " #}\n"
    raw = {"merge_method": "linear", "base_model": "base", "chat_template": template}
    raw["models"] = [{"model": name, "parameters": {"weight": 1}} for name in ("one", "two")]
    (here / "mine.yml").write_text(yaml.safe_dump(raw))
    merge("mine.yml", "out", "--dry-run")
    merge("mine.yml", "out", "--no-verify")
    assert (here / "out" / "chat_template.jinja").read_text() == template


def test_each_method_of_mergekits_is_one_of_ours() -> None:
    assert {method.ours for method in METHODS.values()} <= set(OURS)


def test_the_one_module_of_a_text_model_is_the_model() -> None:
    inside = {"models": [{"model": "org/a"}, {"model": "org/b"}], "parameters": {"weight": 0.5}}
    plain = {"merge_method": "linear", "dtype": "bfloat16"}
    found, wanted = read_mergekit(plain | {"modules": {"default": inside}}), read_mergekit(plain | inside)
    assert found == wanted
    assert not found.problems
    twice = read_mergekit(plain | {"models": inside["models"], "modules": {"default": inside}})
    assert [problem.where for problem in twice.problems] == ["models"]
    parts = read_mergekit(plain | {"modules": {"text_decoder": inside, "vision_tower": inside}})
    assert "--into NAME=model.language_model" in parts.problems[0].remedy
