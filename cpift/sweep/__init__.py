"""Many runs over a space of fields, on Ray Tune, with what they share made once.

`config` is a sweep's file, `searching` how points are chosen and on which rows, `points` says which are tried, `search`
runs Ray Tune, `trial` is one of its trials. `keep` says whose weights stay, `record` how each trial went, `judging`
what probes learnt, and what rows show that the search never saw. `objectives` is the table of figures, `results`
gathers them, `scores` has them as data. `verdict` and `plots` show them, in a `page` and in text `files`.

    >>> from cpift.sweep import SweepConfig, choose_points
    >>> space = {"regions.p": [0.01, 0.02], "groups.tau": [0.1]}
    >>> choose_points(SweepConfig.model_validate({"run": "my-run.yaml", "space": space}))
    [{'regions.p': 0.01, 'groups.tau': 0.1}, {'regions.p': 0.02, 'groups.tau': 0.1}]
"""

from typing import TYPE_CHECKING

from cpift.lazy import handed_out

if TYPE_CHECKING:
    from cpift.sweep.config import Objective as Objective
    from cpift.sweep.config import Range as Range
    from cpift.sweep.config import SweepConfig as SweepConfig
    from cpift.sweep.config import load_sweep as load_sweep
    from cpift.sweep.points import Trial as Trial
    from cpift.sweep.points import choose_points as choose_points
    from cpift.sweep.results import gather as gather
    from cpift.sweep.results import results_table as results_table
    from cpift.sweep.results import write_results as write_results
    from cpift.sweep.scores import SweepData as SweepData
    from cpift.sweep.search import run_sweep as run_sweep
else:
    __getattr__, __dir__ = handed_out(__name__)
