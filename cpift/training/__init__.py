"""One fine-tune, inside one worker: a sequence of stages, each a transformers.Trainer on the model of the last.

`spec` (a fine-tune, described), `fit` (done), `speed` (how fast), `rows` (what a stage goes over), `adapters` (LoRA),
`fsdp` (over several workers), `tracking` (logs and curves).
"""
