"""Files that others wrote, read within limits on depth, size, digits and repetition.

`json` (JSON and JSON lines), `yaml` (data alone), `patterns` (regular expressions without backtracking), `values`
(what a value is called, and as a word of a command). Whatever is in them, `UnreadableError` comes out, with the place
and the remedy.
"""
