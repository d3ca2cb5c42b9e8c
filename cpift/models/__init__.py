"""θ0 from wherever it comes (a folder, the hub, a GGUF file, random weights), as one folder of safetensors.

`sources` (one class for each, and θ0 made of it), `base` (what they have in common), `loading` (networks from files),
`checks` (what is wrong with its files, without reading weights), `tokenizer`, `scratch` (a small one).
"""
