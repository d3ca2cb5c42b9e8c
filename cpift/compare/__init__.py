"""CPI-FT beside what else the same tokens could have bought.

`config` is a comparison's file, `methods` are the contenders, `budgets` what each may spend, `work` does all of it with
every seed. `record` keeps the scores, `findings` says what they show, `contrasts` tests what was named beforehand, and
`words` puts differences into sentences. `arrivals` are ways to learn a task that arrives after another, `frontier` what
these cost. `tables` and `plots` show it, in a `page` and in text `files`. `run_baselines`
has the baselines of an ordinary run.

    >>> from cpift.compare import in_stages
    >>> in_stages(["sums", "poems", "code"], 2)
    (('sums', 'poems'), ('code',))
"""

from typing import TYPE_CHECKING

from cpift.lazy import handed_out

if TYPE_CHECKING:
    from cpift.compare.config import CompareConfig as CompareConfig
    from cpift.compare.config import Comparison as Comparison
    from cpift.compare.config import load_comparison as load_comparison
    from cpift.compare.files import comparison_table as comparison_table
    from cpift.compare.files import write_comparison as write_comparison
    from cpift.compare.methods import ComparedMethod as ComparedMethod
    from cpift.compare.methods import in_stages as in_stages
    from cpift.compare.methods import methods_of as methods_of
    from cpift.compare.run_baselines import make_baselines as make_baselines
    from cpift.compare.run_baselines import plan_all as plan_all
    from cpift.compare.work import run_comparison as run_comparison
else:
    __getattr__, __dir__ = handed_out(__name__)
