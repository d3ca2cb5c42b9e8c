"""CPI-FT beside what else the same tokens could have bought.

`config` (a comparison's file), `methods` (the contenders), `budgets`, `work` (all of it, with every seed),
`record`, `findings`, `page`, `plots`; `run_baselines` (the baselines of an ordinary run).
"""
