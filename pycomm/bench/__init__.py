"""`pycomm bench`: measures the collectives and their peers in turn, in one run.

workers/      what a rank runs, in any interpreter: an engine each for pycomm, MPI, Gloo and DeepSpeed; the
              memory that is sent, the data in it and their check
peers.py      which engines are measured beside pycomm, and how their ranks are started
sets.py       sets of ranks: starting them, telling them what to do, one set at a time
measure.py    sizes, checks, repetitions in turn; what comes out are rows
rows.py       rows: times, bandwidths, ratios and their means
addresses.py  the same calls at many addresses; overlap.py asynchronous calls during computation
report.py     tables for people and documents; record.py JSON and CSV; plot.py charts
machine.py    a description of the machine
kernels.py, codecs.py and the files of cases: `pycomm bench kernels` and `pycomm bench codecs`
"""
