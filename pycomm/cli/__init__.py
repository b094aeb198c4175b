"""The command line: one file a command.

Each file has `configure(parser)`, which adds its arguments, and `run(args)`, which returns the exit code.
Only the requested command is imported. values.py: the meaning of options that several commands have.
"""
