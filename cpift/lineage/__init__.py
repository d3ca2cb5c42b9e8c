"""Runs that go on from a finished run: a task more, or a task less.

`parent` reads what a finished run left, `derive` makes the config of the run that goes on from it, `history` tells
where a run comes from and what became of the tasks that the model had before. The run itself is one like any other
(`pipeline/`): its config has a section `parent`.

    >>> from pathlib import Path
    >>> from cpift.lineage import read_parent
    >>> read_parent(Path("/no/run"))
    Traceback (most recent call last):
    cpift.errors.ConfigError: run /no/run: 1 problem
      - RUN: /no/run is no folder → give the output folder of a finished run
"""

from typing import TYPE_CHECKING

from cpift.lazy import handed_out

if TYPE_CHECKING:
    from cpift.lineage.derive import extended as extended
    from cpift.lineage.derive import forgotten as forgotten
    from cpift.lineage.history import generations as generations
    from cpift.lineage.parent import Parent as Parent
    from cpift.lineage.parent import read_parent as read_parent
else:
    __getattr__, __dir__ = handed_out(__name__)
