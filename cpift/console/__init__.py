"""What a person sees while a command works, and how it ends.

`terminal` (the only place that writes), `view` (one line a stage and one live part), `progress` (how far it is, in
memory and in the output folder), `screen` (that record as lines for a width), `ending` (Ctrl-C, SIGTERM, SIGHUP in
order).
"""
