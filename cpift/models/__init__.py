"""θ0 from wherever it comes (a folder, the hub, a GGUF file, random weights), as one folder of safetensors.

`sources` (where it comes from, and loading it), `checks` (what is wrong with its files, without reading weights),
`tokenizer`, `scratch` (a small one, made on the spot).
"""
