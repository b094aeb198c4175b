"""`pycomm bench`: the collectives measured beside their peers, in turn, in one run.

workers/    what a rank runs, in any interpreter: one engine each for pycomm, MPI and Gloo
sets.py     sets of ranks: starting them, telling them what to do, one set at a time
measure.py  sizes, checks, repetitions in turn; what comes out are rows
report.py   tables, JSON, CSV and the summary of ratios; plot.py the charts
"""
