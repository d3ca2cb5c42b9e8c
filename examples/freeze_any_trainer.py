"""Train a model further while the core region of an earlier task stays as it is, bit for bit.

    python examples/freeze_any_trainer.py BASE MATHS OUT

MATHS is a fine-tune of BASE. What it learned most is frozen while it learns something else. The callback works in
transformers' Trainer and in all that follow it: TRL's SFTTrainer, DPOTrainer, …; alone, under DDP and under FSDP2.
"""

import sys

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import cpift

ROWS = [
    f"The capital of {land} is {town}." for land, town in (("France", "Paris"), ("Peru", "Lima"), ("Iran", "Tehran"))
]


def main(base: str, maths: str, out: str) -> None:
    cores = cpift.regions(base, {"maths": maths}, p=0.01)
    model = AutoModelForCausalLM.from_pretrained(maths, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(maths)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    freeze = cpift.FreezeCallback(cores["maths"])
    trainer = Trainer(
        model=model,
        args=TrainingArguments(out, max_steps=4, per_device_train_batch_size=2, learning_rate=1e-3, report_to=[]),
        train_dataset=[tokenizer(row) for row in ROWS],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[freeze],
    )
    trainer.train()
    print(f"{freeze.frozen_elements:,} elements were frozen, {freeze.moved} moved")
    trainer.save_model(out)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
