"""CPI-FT beside what else the same tokens could have bought.

`config` is a comparison's file, `methods` are the contenders, `budgets` what each may spend, `work` does all of it with
every seed. `record` keeps the scores, `findings` says what they show. `tables` and `plots` show it, in a `page` and in
text `files`. `run_baselines` has the baselines of an ordinary run.
"""
