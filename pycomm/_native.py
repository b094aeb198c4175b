"""Stands where the compiled module is missing, which Python prefers to this file."""

from pathlib import Path

raise ImportError(
    f"{Path(__file__).parent} is the source folder of pycomm, without the compiled module: leave it to import"
    " an installed pycomm, or build one here with `pip install -e .`"
)
