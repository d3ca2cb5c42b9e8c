"""Models that stay in the memory of processes of Ray's from one point of a sweep to the next.

`actors` (what holds them, and how it is asked), `choosing` (whether they stay, and where).

    >>> from cpift.cluster.resident import staying_between
    >>> staying_between.__name__
    'staying_between'
"""

from typing import TYPE_CHECKING

from cpift.lazy import handed_out

if TYPE_CHECKING:
    from cpift.cluster.resident.actors import Actors as Actors
    from cpift.cluster.resident.choosing import staying_between as staying_between
else:
    __getattr__, __dir__ = handed_out(__name__)
