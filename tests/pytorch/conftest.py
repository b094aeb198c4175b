"""The folder is not called torch: where torch is not installed, `import torch` would find it."""

import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "python"))  # for processes.py

if find_spec("torch") is None:
    collect_ignore_glob = ["test_*.py"]
