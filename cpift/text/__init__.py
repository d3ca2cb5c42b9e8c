"""Text as others may read it: escaped for each medium, without secrets, sizes as people write them.

Everything that is shown or written passes here once: `escaping` (terminal, Markdown, HTML, YAML), `redaction`
(secrets), `units`. Imports nothing of cpift.

    >>> from cpift.text import html, one_line, redacted, show_size
    >>> one_line("two\\nlines"), html("<b>"), show_size(3 << 20)
    ('two lines', '&lt;b&gt;', '3.15 MB')
    >>> redacted("HF_TOKEN=hf_abcdefghijklmnopqrstuvwxyz0123456789")
    'HF_TOKEN=***'
"""

from typing import TYPE_CHECKING

from cpift.lazy import handed_out

if TYPE_CHECKING:
    from cpift.text.escaping import code as code
    from cpift.text.escaping import html as html
    from cpift.text.escaping import markdown as markdown
    from cpift.text.escaping import one_line as one_line
    from cpift.text.escaping import terminal as terminal
    from cpift.text.redaction import holds_secret as holds_secret
    from cpift.text.redaction import redacted as redacted
    from cpift.text.redaction import redacted_values as redacted_values
    from cpift.text.redaction import secret_fields as secret_fields
    from cpift.text.units import parse_size as parse_size
    from cpift.text.units import show_size as show_size
else:
    __getattr__, __dir__ = handed_out(__name__)
