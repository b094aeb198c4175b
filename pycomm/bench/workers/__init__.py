"""Run as scripts, by interpreters that need not have pycomm: worker.py with one of the engines."""
