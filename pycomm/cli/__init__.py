"""The command line: one file a command.

Each has `configure(parser)`, which adds its arguments, and `run(args)`, which returns the exit code. It is
imported only when it is the one that was asked for. values.py: what options mean that several have.
"""
