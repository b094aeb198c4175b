"""Imported before the native module, which would hang forever in a subinterpreter: raises ImportError
there."""

import sys

try:
    _interpreters = __import__("_interpreters" if sys.version_info >= (3, 13) else "_xxsubinterpreters")
    _is_main = bool(_interpreters.get_main() == _interpreters.get_current())
except ImportError:
    _is_main = True

if not _is_main:
    raise ImportError("pycomm works only in the main interpreter of a process, whose lock its threads take")
