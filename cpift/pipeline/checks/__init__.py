"""What a config alone tells before a run, whatever its rows and models hold.

`idle` has the fields that are given and change nothing beside the others; a plan says them by name.

    >>> from pathlib import Path
    >>> from cpift.config.loading import parse_config
    >>> from cpift.pipeline.checks import idle_notes
    >>> task = {"name": "a", "train": {"procedural": "echo", "size": 40}}
    >>> fields = {"name": "x", "model": {"scratch": {}}, "tasks": [task], "probe": {"steps": 2}}
    >>> fusion = {"method": "linear", "omega": 0.3}
    >>> list(idle_notes(parse_config({**fields, "fusion": fusion}, Path.cwd(), "x")))
    ['fusion.omega does nothing: method linear does not read it']
"""

from typing import TYPE_CHECKING

from cpift.lazy import handed_out

if TYPE_CHECKING:
    from cpift.pipeline.checks.idle import idle_notes as idle_notes
else:
    __getattr__, __dir__ = handed_out(__name__)
