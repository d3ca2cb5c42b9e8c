"""Model folders and adapters as lazy tensors, written and read slice by slice.

`checkpoint` (a folder's tensors by name), `opening` (a path, a hub id or an adapter → one of these), `writing`
(shards), `slices` (a tensor in pieces; all tensors in runs), `layout`, `relaid` and `vocabulary` (a fine-tune under
θ0's names and rows), `lora`, `lora_config`, `lora_files`, `finite`.

    base = open_checkpoint(Path("base"))
    base.mapped("model.norm.weight")  # a view of the file, only to read; `tensor` gives a copy
"""
