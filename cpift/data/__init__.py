"""Tasks' rows as tokens: loaded, checked, sampled, mixed, written in the model's chat template, packed.

`tasks` (rows of a task), `sources` (files, the hub, a generator), `templates` and `chat_templates`, `tokenise`
(token ids with labels), `packing`, `on_disk`, `use` (how much of the rows a fine-tune learns from), `preview`,
`shared_rows`.
"""
