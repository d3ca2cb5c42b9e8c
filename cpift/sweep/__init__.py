"""Many runs over a space of fields, on Ray Tune, with what they share made once.

`config` is a sweep's file, `points` says which are tried, `search` runs Ray Tune, `trial` is one of its trials. `keep`
says whose weights stay, `record` how each trial went, `learning` what the probes learnt. `results` gathers the figures,
which are defined in `scores`. `verdict`, `picture` and `plots` show them, in a `page` and in text `files`.
"""
