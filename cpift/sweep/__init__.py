"""Many runs over a space of fields, on Ray Tune, with what they share made once.

`config` (a sweep's file), `points` (which are tried), `search` (Ray Tune), `trial`, `keep`, `record`, `results`,
`scores`, `verdict`, `learning`, `page`, `plots`.
"""
