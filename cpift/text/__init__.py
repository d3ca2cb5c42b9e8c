"""Text as others may read it: escaped for each medium, without secrets, sizes as people write them.

Everything that is shown or written passes here once: `escaping` (terminal, Markdown, HTML, YAML), `redaction`
(secrets), `units`. Imports nothing of cpift.
"""
