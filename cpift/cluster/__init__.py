"""Ray: fine-tunes, evaluations and merges side by side, and jobs on a cluster.

`engine` is the pipeline's. It gives work to a `group` of workers that stay for a whole run (`work` is what they do,
`desk` and `work_queue` hand it out), or starts a Ray Train run for each fine-tune (`fits`). `tasks` does the work of
sweeps and comparisons. `placement` says which fine-tunes fit at once. `merging` marks regions and merges, range by
range; `cards` has a process for each GPU that does so, `stored_merge` what differs over an object store. `session` is
the connection, `storage` where checkpoints go, `submit` sends jobs, `choice` says where a run's merges are computed.

    >>> from cpift.cluster import Outcome, WorkItem, WorkQueue
    >>> queue = WorkQueue()
    >>> queue.put([WorkItem("probe a", b"...", failures=1)])
    >>> _ = queue.take("worker 1")
    >>> queue.lose("worker 1", "its node left")  # so that another one takes it
    >>> _ = queue.take("worker 2")
    >>> queue.finish("worker 2", Outcome("trained"))
    >>> queue.outcomes()
    {'probe a': Outcome(result='trained', failure=None)}
"""

from typing import TYPE_CHECKING

from cpift.lazy import handed_out

if TYPE_CHECKING:
    from cpift.cluster.engine import RayEngine as RayEngine
    from cpift.cluster.merging import merging_of as merging_of
    from cpift.cluster.placement import Nodes as Nodes
    from cpift.cluster.session import ray_session as ray_session
    from cpift.cluster.tasks import TaskEngine as TaskEngine
    from cpift.cluster.work_queue import Outcome as Outcome
    from cpift.cluster.work_queue import WorkItem as WorkItem
    from cpift.cluster.work_queue import WorkQueue as WorkQueue
else:
    __getattr__, __dir__ = handed_out(__name__)
