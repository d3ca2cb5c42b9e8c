"""Files that hold tensors, as bytes: no network, no library's classes.

`safetensors` (header, views of a memory map, files written in any order), `gguf` (the head alone), `quantised`
(told and refused), `sizes` (what files state, compared with what they hold before anything of that size is built).
"""
