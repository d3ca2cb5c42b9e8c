"""Users' data as it is, row by row, each as a conversation whose last message is the reference reply.

A file's first bytes give its format (`formats`, by `texts` and `tables`), a row's columns its kind (`kinds`), each
turn what it becomes (`turns`), and `examples` the whole. `problems` says once what is wrong with many rows;
`holdout`, `shapes`, `synthetic`.

    >>> from cpift.rows import parse_row
    >>> example = parse_row({"instruction": "Add 1 and 2.", "output": "3"}, {})
    >>> example.prompt[0].content, example.reply
    ('Add 1 and 2.', '3')
"""

from typing import TYPE_CHECKING

from cpift.lazy import handed_out

if TYPE_CHECKING:
    from cpift.rows.examples import Example as Example
    from cpift.rows.examples import Message as Message
    from cpift.rows.examples import RowError as RowError
    from cpift.rows.examples import parse_row as parse_row
    from cpift.rows.formats import format_of as format_of
    from cpift.rows.formats import rows_in as rows_in
    from cpift.rows.kinds import columns_for as columns_for
    from cpift.rows.kinds import kind_of as kind_of
    from cpift.rows.problems import RowProblems as RowProblems
    from cpift.rows.shapes import Shapes as Shapes
    from cpift.rows.shapes import size_of as size_of
else:
    __getattr__, __dir__ = handed_out(__name__)
