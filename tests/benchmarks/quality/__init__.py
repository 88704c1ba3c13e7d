"""`make study`: does a conversion pay? Static, fully dynamic and partially dynamic networks after equal fine-tunes.

`experiments` is the list of what is run, `tasks` are the data and networks, `arms` the variants, `study` runs what is
missing and appends one JSON line a run to `results/`, `report` makes docs/results.md of them.
"""
