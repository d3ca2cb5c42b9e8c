"""Files that other tools read, in the place of ours.

`answers` knows whose a file is, and the command here that does the same; `mergekit` reads mergekit's.

    >>> from cpift.other_tools import answered
    >>> (answer,) = answered({"base_model": "org/base", "datasets": [{"path": "org/rows"}]})
    >>> print(answer.remedy.partition(", then")[0])
    cpift init org/rows --model org/base
    >>> answered({"tasks": []})
    []
"""

from typing import TYPE_CHECKING

from cpift.lazy import handed_out

if TYPE_CHECKING:
    from cpift.other_tools.answers import answered as answered
else:
    __getattr__, __dir__ = handed_out(__name__)
