"""Other people's models as transformers knows them, without running their code.

`loading` is the only place that has transformers, peft, datasets or lm-eval load anything. `architecture` (the
class of a `config.json`), `conversion` (how transformers renames a file's tensors), `fields` (what each field of
`config.json` means), `tying`, `tokenizer_files`, `sharded_state`.
"""
