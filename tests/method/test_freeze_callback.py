"""Frozen cores in other people's trainers: no frozen bit moves, the rest trains, what cannot be frozen is refused."""

from __future__ import annotations

import gc
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from cpift_kernels import pack_mask
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import cpift
from cpift.method.freeze_callback import bare, unwrapped
from cpift.method.regions import core_size

LENGTH, VOCABULARY = 6, 37


@pytest.fixture(autouse=True)
def _few_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def llama(tied: bool = False, **settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=tied, **sizes, **settings)
    return LlamaForCausalLM(config)


def masks_of(model: torch.nn.Module, share: float = 0.3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.rand(p.shape, generator=generator) < share for name, p in model.named_parameters()}


def rows() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(VOCABULARY, (LENGTH,), generator=generator) for _ in range(16)]
    return [{"input_ids": one, "labels": one.clone()} for one in ids]


def arguments(**settings: Any) -> TrainingArguments:
    told = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    told |= {"weight_decay": 0.1, "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 0}
    return TrainingArguments(**{"output_dir": "out"} | told | settings)


def train(
    model: Any, callback: Any, resume: str | None = None, before: list[Any] | None = None, **settings: Any
) -> None:
    trainer = Trainer(
        model=model, args=arguments(**settings), train_dataset=rows(), callbacks=[*(before or []), callback]
    )
    trainer.train(resume_from_checkpoint=resume)


def require_held(model: torch.nn.Module, origin: torch.nn.Module, masks: dict[str, torch.Tensor]) -> None:
    """By plain indexing: frozen elements have the bits of `origin`, most others do not."""
    at_first, trained = dict(origin.named_parameters()), 0
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter[masks[name]], at_first[name][masks[name]]), name
        trained += int((parameter != at_first[name]).sum())
    assert trained > 0.5 * sum(int((~mask).sum()) for mask in masks.values())


SETTINGS: dict[str, dict[str, Any]] = {
    "accumulation": {"gradient_accumulation_steps": 2},
    "bf16": {"bf16": True, "max_grad_norm": 0.01},
    "adafactor": {"optim": "adafactor"},
    "best model": {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_no_frozen_bit_moves_in_a_trainer(name: str) -> None:
    model, origin = llama(tied=name == "bf16"), llama(tied=name == "bf16")
    masks = masks_of(model)
    freeze = cpift.FreezeCallback(masks)
    trainer = Trainer(
        model=model, args=arguments(**SETTINGS[name]), train_dataset=rows(), eval_dataset=rows(), callbacks=[freeze]
    )
    trainer.train()
    require_held(model, origin, masks)
    assert (freeze.moved, freeze.frozen_elements) == (0, sum(int(mask.sum()) for mask in masks.values()))
    assert not unwrapped(trainer.optimizer)._optimizer_step_post_hooks, "nothing is left behind"


@pytest.mark.slow
def test_a_resumed_training_holds_the_checkpoint_and_not_what_the_model_drifted_to() -> None:
    model, masks = llama(), masks_of(llama())
    train(model, cpift.FreezeCallback(masks))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    freeze = cpift.FreezeCallback(masks)
    train(model, freeze, resume="out/checkpoint-2")
    assert freeze.moved == 0
    require_held(model, llama(), masks)
    whole = llama()
    train(whole, cpift.FreezeCallback(masks), save_strategy="no")
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), whole.parameters(), strict=True))


class _Meddler(TrainerCallback):
    """Writes weights where no optimizer's hook sees it."""

    def __init__(self, step: int):
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        if state.global_step == self._step:
            with torch.no_grad():
                kw["model"].lm_head.weight.add_(1.0)


class _Failing(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        raise KeyError


@pytest.mark.slow
def test_what_moves_all_the_same_is_an_error_and_a_failed_training_leaves_no_hooks() -> None:
    masks = masks_of(llama())
    for step in (1, 4):  # after the first step, and at the end
        with pytest.raises(cpift.StageError, match="frozen elements moved"):
            train(llama(), cpift.FreezeCallback(masks), before=[_Meddler(step)], save_strategy="no")
    model, freeze = llama(), cpift.FreezeCallback(masks)
    with pytest.raises(KeyError):
        train(model, freeze, before=[_Failing()], save_strategy="no")
    train(model, freeze, save_strategy="no")
    assert freeze.moved == 0
    assert all(not parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_loops_of_ones_own_with_accelerate_a_scaler_and_packed_words() -> None:
    model, origin = llama(), llama()
    masks = masks_of(model)
    parts = [{name: mask & (mask.cumsum(-1) % 2 == odd) for name, mask in masks.items()} for odd in (0, 1)]
    words = {name: pack_mask(mask.flatten()) for name, mask in parts[1].items()}
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    scaler = torch.amp.GradScaler("cpu")
    ids = torch.stack([row["input_ids"] for row in rows()])
    with cpift.frozen(model, optimizer, parts[0], words) as held:
        for _ in range(3):
            with torch.autocast("cpu", torch.float16):
                loss = model(input_ids=ids, labels=ids).loss
            scaler.scale(loss).backward()
            scaler.step(unwrapped(optimizer))
            scaler.update()
            optimizer.zero_grad()
    assert held.moved() == 0
    require_held(model, origin, masks)


def test_stacked_experts_are_frozen_by_the_names_of_the_files(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=VOCABULARY, num_local_experts=2, num_key_value_heads=1, **sizes)
    folders = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = MixtralForCausalLM(config)
        model.save_pretrained(tmp_path / str(seed))
        folders.append(tmp_path / str(seed))
    for folder in folders:
        (folder / "tokenizer.json").write_text("{}")
    core = cpift.regions(folders[0], {"a": folders[1]}, p=0.2)["a"]
    before = MixtralForCausalLM.from_pretrained(folders[1])
    freeze = cpift.FreezeCallback(core)
    train(model, freeze, save_strategy="no")
    assert freeze.frozen_elements == core.count == core_size(0.2, core.summary.space)
    model.save_pretrained(tmp_path / "after")
    from safetensors.torch import load_file

    old, new = (load_file(folder / "model.safetensors") for folder in (folders[1], tmp_path / "after"))
    assert sum(".experts." in name for name in core) == 6
    assert all(torch.equal(old[name][core[name]], new[name][core[name]]) for name in core)
    assert any(not torch.equal(old[name], new[name]) for name in core)
    assert before.config.num_local_experts == 2


def test_what_cannot_be_frozen_is_refused_by_name() -> None:
    from peft import IA3Config, LoraConfig, get_peft_model

    masks = masks_of(llama())
    lora = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    ia3 = get_peft_model(llama(), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    deepspeed, quantised = llama(), llama()
    deepspeed.lm_head.weight.ds_id = 1  # type: ignore[attr-defined]
    whole = torch.zeros(VOCABULARY, 16, dtype=torch.int8)
    quantised.lm_head.weight = torch.nn.Parameter(whole, requires_grad=False)
    step = torch.optim.SGD(llama().parameters())
    other = {name: torch.ones(3, dtype=torch.bool) for name in masks}
    floats = {name: mask.float() for name, mask in masks.items()}
    for model, chosen, words in (
        (lora, masks, "under LoRA or another adapter"),
        (ia3, masks, "under LoRA or another adapter"),
        (llama(), other, "its mask is of another size"),
        (llama(), floats, "give a bool mask"),
        (llama(), {"nothing.weight": other["lm_head.weight"]}, "the model has no parameter of that name"),
    ):
        with pytest.raises(cpift.CpiftError, match=words):
            train(model, cpift.FreezeCallback(chosen), save_strategy="no")
    for model, words in ((deepspeed, "under DeepSpeed"), (quantised, r"quantised \(int8\)")):
        with pytest.raises(cpift.CpiftError, match=words), cpift.frozen(model, step, masks):
            pass
    with pytest.raises(cpift.CpiftError, match="no cores are given"):
        cpift.FreezeCallback()
    with pytest.raises(cpift.CpiftError, match="no optimizer of torch's kind"):
        unwrapped(object())
    assert (
        bare("module._orig_mod.model.layers.0._checkpoint_wrapped_module.norm.weight") == "model.layers.0.norm.weight"
    )


# ---- two processes ---------------------------------------------------------------------------------------------------

SHARD: dict[str, Any] = {
    "fsdp_version": 2,
    "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    "state_dict_type": "FULL_STATE_DICT",
}
WHOLE = {"state_dict_type": "FULL_STATE_DICT"}
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp2": {"fsdp": "full_shard auto_wrap", "fsdp_config": SHARD | WHOLE},
}


def work(engine: str) -> None:
    """One process of two: train, then resume from a checkpoint with a model that drifted."""
    for resume in (None, f"{engine}/checkpoint-2"):
        model, origin = llama(), llama()
        masks = masks_of(model)
        if resume:
            with torch.no_grad():
                model.lm_head.weight.add_(1.0)
        freeze = cpift.FreezeCallback(masks)
        trainer = Trainer(
            model=model,
            args=arguments(output_dir=engine, **ENGINES[engine]),
            train_dataset=rows(),
            callbacks=[freeze],
        )
        trainer.train(resume_from_checkpoint=resume)
        assert freeze.moved == 0
        assert freeze.frozen_elements == sum(int(mask.sum()) for mask in masks.values())
        trainer.save_model(f"{engine}/end")
        if trainer.is_world_process_zero():
            trained = LlamaForCausalLM.from_pretrained(f"{engine}/end")
            require_held(trained, origin, masks)
            print(f"{engine} held, resume {resume}")


def work_alone() -> None:
    """A loop of one's own, sharded by accelerate, with recomputed activations."""
    shard = {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": ["LlamaDecoderLayer"]}
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, activation_checkpointing=True, **shard)
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin, gradient_accumulation_steps=2)
    model, origin = llama(), llama()
    masks = masks_of(model)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    ids = torch.stack([row["input_ids"] for row in rows()])
    with cpift.frozen(model, optimizer, masks):
        for _ in range(6):
            with accelerator.accumulate(model):
                accelerator.backward(model(input_ids=ids, labels=ids).loss)
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        trained = llama()
        trained.load_state_dict({bare(name): values for name, values in state.items()})
        require_held(trained, origin, masks)
        print("accelerate held")


def work_all() -> None:
    gc.freeze()  # see conftest.py
    work_alone()
    AcceleratorState._reset_state()
    for engine in ENGINES:
        work(engine)
        AcceleratorState._reset_state()  # the next trainer's accelerator is another


@pytest.mark.slow
def test_two_processes_and_a_resume() -> None:
    root = Path(cpift.__file__).parents[1]
    Path("work.py").write_text("from tests.method.test_freeze_callback import work_all; work_all()")
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "work.py"]
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(run, capture_output=True, text=True, env=environment, timeout=90)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(done.stdout.count(f"{engine} held") == 2 for engine in ENGINES)
    assert "accelerate held" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
def test_the_sft_trainer_of_trl(tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from cpift.config.inputs import ScratchModel
    from cpift.config.run import ModelConfig
    from cpift.models.sources import load_model, load_tokenizer, materialise

    materialise(ModelConfig(scratch=ScratchModel(hidden_size=16, intermediate_size=24)), tmp_path / "base")
    model, origin = (load_model(tmp_path / "base", torch.float32) for _ in range(2))
    masks = masks_of(model)
    talks = [{"prompt": f"{number}?", "completion": f"{number}!"} for number in range(8)]
    freeze = cpift.FreezeCallback(masks)
    told = {"max_steps": 3, "learning_rate": 1e-2, "use_cpu": True, "bf16": True, "save_strategy": "no"}
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig("sft", gradient_accumulation_steps=2, per_device_train_batch_size=2, report_to=[], **told),
        train_dataset=Dataset.from_list(talks),
        processing_class=load_tokenizer(tmp_path / "base"),
        callbacks=[freeze],
    )
    trainer.train()
    assert freeze.moved == 0
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter[masks[name]], dict(origin.named_parameters())[name][masks[name]])
