"""Tasks' rows as tokens: loaded, checked, sampled, mixed, written in the model's chat template, packed.

`tasks` (rows of a task), `sources` (files, the hub, a generator), `templates` and `chat_templates`, `written` (a
conversation as text, and where its replies are), `tokenise` (token ids with labels), `token_files` and `token_workers`
(made once, by several processes), `packing`, `on_disk`, `use` (how much of the rows a fine-tune learns from),
`preview`, `shared_rows`.

    >>> from cpift.config.inputs import DataSource
    >>> from cpift.data import load_examples
    >>> first, *_ = load_examples(DataSource(procedural="echo", size=3))
    >>> first.prompt[0].content, first.reply
    ('say duse', 'duse')
"""

from typing import TYPE_CHECKING

from cpift.lazy import handed_out

if TYPE_CHECKING:
    from cpift.data.chat_templates import TEMPLATES as TEMPLATES
    from cpift.data.sources import rows_of as rows_of
    from cpift.data.tasks import balanced_sample as balanced_sample
    from cpift.data.tasks import count_examples as count_examples
    from cpift.data.tasks import load_examples as load_examples
    from cpift.data.tasks import mixture as mixture
    from cpift.data.tasks import read_examples as read_examples
    from cpift.data.tokenise import IGNORED as IGNORED
    from cpift.data.tokenise import UNCUT as UNCUT
    from cpift.data.tokenise import Labelled as Labelled
    from cpift.data.use import RowUse as RowUse
else:
    __getattr__, __dir__ = handed_out(__name__)
