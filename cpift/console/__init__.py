"""What a person sees while a command works, and how it ends.

`terminal` (the only place that writes), `view` (one line a stage and one live part), `progress` (how far it is, in
memory and in the output folder), `screen` (that record as lines for a width), `ending` (Ctrl-C, SIGTERM, SIGHUP in
order).

    >>> from cpift.console import duration
    >>> duration(95)
    '1 min 35 s'
"""

from typing import TYPE_CHECKING

from cpift.lazy import handed_out

if TYPE_CHECKING:
    from cpift.console.ending import ended_in_order as ended_in_order
    from cpift.console.progress import OnProgress as OnProgress
    from cpift.console.progress import Progress as Progress
    from cpift.console.progress import ProgressMessage as ProgressMessage
    from cpift.console.progress import read_progress as read_progress
    from cpift.console.screen import duration as duration
    from cpift.console.terminal import Terminal as Terminal
    from cpift.console.terminal import say as say
    from cpift.console.view import View as View
    from cpift.console.view import quiet as quiet
else:
    __getattr__, __dir__ = handed_out(__name__)
