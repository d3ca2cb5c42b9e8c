"""Weights in 4 bits under adapters (QLoRA): what is kept is θ0 as it is stored plus the adapters, to the bit again
after a kill; what cannot be held so is refused by name."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.layout import checkpoint_layout
from cpift.config.inputs import ScratchModel
from cpift.config.run import ModelConfig, TrainingConfig
from cpift.config.training import LoraConfig
from cpift.errors import ConfigError
from cpift.models.sources import materialise
from cpift.pipeline.preflight import preflight
from cpift.training.adapters import load_adapted, merge_adapters, merged_weights, with_adapters
from cpift.training.fit import FitHooks, fit
from cpift.training.memory import training_memory
from cpift.training.possible import impossible, missing_here
from cpift.training.spec import FitSpec, StageSpec, read_training
from cpift.training.weights.quantised import Merged, nf4_bytes, quantisable
from cpift.training.weights.reading import load_whole
from tests.helpers.families import make_family
from tests.helpers.fits import spec, weights
from tests.helpers.held import held
from tests.helpers.small_runs import run_of, turns

pytest.importorskip("peft")
NEEDS_4BIT = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
LORA = LoraConfig(rank=3, alpha=6, base="nf4")
STAGES = (StageSpec(("add",)), StageSpec(("rev", "add")))


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers in one dtype and the other."""
    folder = tmp_path_factory.mktemp(request.param)
    scratch = ScratchModel(hidden_size=64, intermediate_size=96, heads=2, layers=2)
    materialise(ModelConfig(scratch=scratch, dtype=request.param), folder)
    return folder


def asked(lora: LoraConfig = LORA, **fields: Any) -> TrainingConfig:
    return TrainingConfig(**({"steps": 1, "batch_size": 2, "max_length": 24, "lora": lora} | fields))


def nf4_spec(base: Path, out: Path, *stages: StageSpec, **fields: Any) -> FitSpec:
    return spec(base, out, *stages, **({"lora": LORA, "precision": "bfloat16"} | fields))


def spread(adapted: Any) -> None:
    """Factors of adapters that add what can be seen."""
    for number, (name, parameter) in enumerate(adapted.named_parameters()):
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))


# ---- what is kept ----------------------------------------------------------------------------------------------------


def exact(adapted: Any, name: str, stored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """θ0 + s·B·A in float64 of one tensor, and the same of magnitudes, to which the sum's rounding is relative."""
    layer: Any = dict(adapted.get_base_model().named_modules()).get(name.removesuffix(".weight"))
    if not hasattr(layer, "lora_A"):
        return stored.double(), stored.double().abs()
    b, a = (factor["default"].weight.detach().double() for factor in (layer.lora_B, layer.lora_A))
    scale = LORA.alpha / LORA.rank
    return stored.double() + scale * (b @ a), stored.double().abs() + scale * (b.abs() @ a.abs())


def merged_is_exact(adapted: Any, base: Path, dtype: torch.dtype) -> None:
    origin = Checkpoint(base)
    state = Merged(adapted, checkpoint_layout(origin), origin).state_dict()
    assert set(state) == set(origin.names)
    moved = 0
    for name in state:
        before = origin.tensor(name)
        wanted, size = exact(adapted, name, before)
        moved += int(not torch.equal(state[name].to(dtype), before))
        # One rounding to what is stored, half a unit of its last place, of a sum of products in float32.
        bound = 0.5 * torch.finfo(dtype).eps * wanted.abs() + 4 * torch.finfo(torch.float32).eps * size
        assert bool(((state[name].to(dtype).double() - wanted).abs() <= bound).all()), name
    assert moved == 14  # all linear layers but the head


def test_what_is_kept_is_theta0_and_the_exact_product_of_the_adapters(stored: Path) -> None:
    plain = LORA.model_copy(update={"base": "stored"})
    adapted: Any = with_adapters(load_whole(stored, torch.float32, "cpu", True), plain, 0)
    spread(adapted)
    origin = Checkpoint(stored)
    dtype = origin.tensor(origin.names[0]).dtype
    merged_is_exact(adapted, stored, dtype)
    layout = checkpoint_layout(origin)
    state = Merged(adapted, layout, origin).state_dict()
    lazily = {name: state[name].to(dtype) for name in origin.names}
    at_once = merge_adapters(adapted).state_dict()  # the bits of adapters beside weights as they are stored
    assert all(torch.equal(lazily[name], at_once[name].to(dtype)) for name in origin.names)


@NEEDS_4BIT
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_weights_in_four_bits_are_not_what_is_kept(stored: Path, precision: Any) -> None:
    adapted: Any = load_adapted(stored, asked(precision=precision), "cpu", 0)
    spread(adapted)
    layer = adapted.get_base_model().model.layers[0].mlp.down_proj.get_base_layer()
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    assert (layer.weight.dtype, layer.compute_dtype, layer.weight.quant_state.dtype) == (torch.uint8, dtype, dtype)
    origin = Checkpoint(stored)
    kept = merged_weights(adapted, checkpoint_layout(origin), origin)
    assert isinstance(kept, Merged)
    merged_is_exact(adapted, stored, origin.tensor(origin.names[0]).dtype)


@NEEDS_4BIT
def test_products_and_gradients_are_those_of_the_dequantised_weights(stored: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit

    adapted: Any = load_adapted(stored, asked(precision="float32"), "cpu", 0).eval()
    plain: Any = load_whole(stored, torch.float32, "cpu").eval()
    for name, layer in quantisable(plain).items():
        held_in = adapted.get_base_model().get_submodule(name).get_base_layer().weight
        read = dequantize_4bit(held_in.data, held_in.quant_state)
        assert 0 < float((read - layer.weight.detach()).norm() / read.norm()) < 0.12  # NF4's error of normal weights
        with torch.no_grad():
            layer.weight.copy_(read)
    embedded = torch.randn((1, 12, 64), generator=torch.Generator().manual_seed(0))
    gradients, logits = [], []
    for model in (adapted, plain):
        inputs = embedded.clone().requires_grad_()
        logits.append(model(inputs_embeds=inputs).logits)
        logits[-1].square().sum().backward()
        gradients.append(inputs.grad)
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-4)


# ---- fine-tunes ------------------------------------------------------------------------------------------------------


@NEEDS_4BIT
@pytest.mark.slow
def test_a_fine_tune_learns_and_changes_what_its_adapters_say(stored: Path, tmp_path: Path) -> None:
    each = nf4_spec(stored, tmp_path, steps=12, learning_rate=1e-2)
    fit(each)
    log = read_training(each.export)["log"]
    assert log[-1]["loss"] < log[0]["loss"]
    before, after = Checkpoint(stored), Checkpoint(each.export)
    assert [i.dtype for i in before.tensors.values()] == [i.dtype for i in after.tensors.values()]
    for name in before.names:
        update = after.tensor(name).double() - before.tensor(name).double()
        if "_proj" not in name:
            assert not update.any()
        elif before.tensor(name).dtype == torch.float32:  # bf16 rounds the sum
            assert torch.linalg.svdvals(update)[3] < 1e-5


class _Killed(Exception):
    pass


@NEEDS_4BIT
@pytest.mark.slow
@pytest.mark.parametrize("stop", [(0, -1), (1, 2)])
def test_a_resumed_fit_ends_with_the_same_bits_and_looking_changes_none(
    base: Path, tmp_path: Path, stop: tuple[int, int]
) -> None:
    kept: list[Path] = []

    def on_checkpoint(folder: Path, metrics: dict[str, int]) -> None:
        if (metrics["stage"], metrics["step"]) == stop:
            kept.append(folder)
            raise _Killed

    fields: dict[str, Any] = {"steps": 4, "checkpoint_every": 2, "validation": {"rows": 8}}
    whole = nf4_spec(base, tmp_path / "whole", *STAGES, evaluate_every=100, gradient_checkpointing=True, **fields)
    fit(whole)
    broken = nf4_spec(base, tmp_path / "broken", *STAGES, evaluate_every=1, gradient_checkpointing=True, **fields)
    with pytest.raises(_Killed):
        fit(broken, FitHooks(on_checkpoint=on_checkpoint))
    fit(broken, FitHooks(resume_from=kept[0]))
    assert weights(broken.export) == weights(whole.export) != weights(base)


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_four_bits_are_counted(stored: Path) -> None:
    assert nf4_bytes(64 * 256) == 64 * 128 + 256 + 4
    assert nf4_bytes(65) == 33 + 2 + 4
    linear = quantisable(load_whole(stored, torch.float32, "cpu"))
    assert len(linear) == 14
    counted = {base: training_memory(stored, asked({"base": base}), 1, True) for base in ("nf4", "stored")}  # type: ignore[arg-type]
    width = next(iter(Checkpoint(stored).tensors.values())).dtype.itemsize
    saved = sum(width * layer.weight.numel() - nf4_bytes(layer.weight.numel()) for layer in linear.values())
    assert counted["stored"].weights - counted["nf4"].weights == saved
    assert counted["nf4"].optimizer == counted["stored"].optimizer


@NEEDS_4BIT
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_what_is_counted_is_what_is_held(stored: Path, precision: Any) -> None:
    training = asked(precision=precision)
    adapted: Any = load_adapted(stored, training, "cpu", 0).train()
    counted = training_memory(stored, training, 1, precision == "bfloat16")
    in_four = [one for one in adapted.parameters() if hasattr(one, "quant_state")]
    scales = sum(one.quant_state.absmax.nbytes + one.quant_state.state2.absmax.nbytes for one in in_four)
    assert counted.weights == sum(parameter.nbytes for parameter in adapted.parameters()) + scales
    assert counted.activations == held(adapted, training)


# ---- what cannot be --------------------------------------------------------------------------------------------------


def test_a_library_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_of(tmp_path, [turns("a", "b"), turns("c", "d")], probe__lora={"base": "nf4", "rank": 2})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name))
    with pytest.raises(
        ConfigError, match=r"lora\.base: nf4 needs bitsandbytes, which is not installed.*cpift\[qlora\]"
    ):
        preflight(config)
    assert missing_here([asked(LoraConfig())], "cpu") == []
    with pytest.raises(ValueError, match=r"lora\.base: nf4 is not known with compiled layers"):
        asked(compile=True)


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("llama", None),
        ("gpt2", "weights inside the model's layers 0 are linear layers'"),
        ("mixtral", "are linear layers', which alone it holds"),
        ("mamba", "reads weights of linear layers by itself"),
    ],
)
def test_a_class_whose_layers_are_not_held_so_is_refused(family: str, said: str | None, tmp_path: Path) -> None:
    folder = make_family(family, tmp_path, {} if family == "mamba" else None)
    problems = impossible(folder, asked(), "probe")
    if said is None:
        assert problems == []
    else:
        assert str(problems[0]).startswith("probe.lora.base: is nf4, and ")
        assert said in str(problems[0])


def test_a_model_that_is_made_is_looked_at_before(tmp_path: Path) -> None:
    scratch = {"hidden_size": 16, "intermediate_size": 15, "layers": 1, "heads": 2}
    rows = [turns("a", "b"), turns("c", "d")]
    for lora, said in (
        ({"base": "nf4"}, r"probe\.lora\.base: is nf4, and .* takes an odd number of inputs"),
        ({"targets": ["x_proj"]}, r"probe\.lora\.targets: .*x_proj"),
        ({"targets": ["lm_head"]}, r"probe\.lora\.targets: lm_head shares its weights with another layer"),
    ):
        config = run_of(tmp_path, rows, {"scratch": scratch}, probe__lora={"rank": 2} | lora)
        with pytest.raises(ConfigError, match=said):
            preflight(config)
