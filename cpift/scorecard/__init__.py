"""What models scored on tests: `card` as plain data with intervals, `show` as page, Markdown and a table.

>>> from cpift.scorecard import Scorecard
>>> def scored(*rows):
...     rows = [{"loss": 1.0, "tokens": 1, "score": row} for row in rows]
...     return {"metric": "number", "score": 0.0, "loss": 1.0, "tokens": 8, "rows": 8, "examples": rows}
>>> scores = {"base": {"sums": scored(*[0.0] * 8)}, "merged": {"sums": scored(*[1.0] * 7, 0.0)}}
>>> Scorecard("sums", {"sums": "sums.csv"}, scores, base="base").sentences()
['merged against base: better on sums (+87.5 [+57.9, +117.1] points).']
"""

from typing import TYPE_CHECKING

from cpift.lazy import handed_out

if TYPE_CHECKING:
    from cpift.scorecard.card import Scorecard as Scorecard
    from cpift.scorecard.card import outcome as outcome
    from cpift.scorecard.show import card_table as card_table
    from cpift.scorecard.show import write_card as write_card
else:
    __getattr__, __dir__ = handed_out(__name__)
