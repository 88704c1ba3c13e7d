"""`make bench`: how fast every layer, network, step and command is, each beside what it has to be held against.

One module a table; each runs alone (`python -m benchmarks.networks --quick`), goes on where it stopped, and keeps its
numbers as JSON in `results/`. `python -m benchmarks.report` makes docs/benchmarks.md of them.
"""
