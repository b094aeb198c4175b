"""Imported before the native module, which would wait for ever in a subinterpreter: an ImportError there."""

import sys

try:
    _interpreters = __import__("_interpreters" if sys.version_info >= (3, 13) else "_xxsubinterpreters")
    _is_main = bool(_interpreters.get_main() == _interpreters.get_current())
except ImportError:
    _is_main = True

if not _is_main:
    raise ImportError(
        "pycomm works in a process's main interpreter alone: the lock that its threads take is that one's"
    )
