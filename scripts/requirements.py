"""Print the requirements in pyproject.toml: those of the build, and of the extras named as arguments."""

import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

pyproject = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
extras = pyproject["project"]["optional-dependencies"]
wanted = pyproject["build-system"]["requires"] + pyproject["project"]["dependencies"]
wanted += [requirement for extra in sys.argv[1:] for requirement in extras[extra]]
print("\n".join(dict.fromkeys(wanted)))
