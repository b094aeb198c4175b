"""Scripts for interpreters that need not have pycomm: worker.py runs with one of the engines."""
