"""Checks of csrc/ that no other tool makes: which layer includes which, and whether sources have tests."""

from __future__ import annotations

import re
import sys
from pathlib import Path

CSRC, TESTS = Path("csrc"), Path("tests/cpp")
# The layers that a layer may include besides itself. kernels, schedule and transport are independent.
MAY_INCLUDE = {
    "common": set[str](),
    "kernels": {"common"},
    "schedule": {"common"},
    "transport": {"common"},
    "runtime": {"common", "kernels", "schedule", "transport"},
    "bindings": {"common", "kernels", "schedule", "transport", "runtime"},
}
INCLUDE = re.compile(r'^#include "(\w+)/', re.MULTILINE)
TESTED = re.compile(r"^// Tests: ([^.]+\.cc(?:, [\w/]+\.cc)*)\.$", re.MULTILINE)


def wrong_includes() -> list[str]:
    """Files that include a layer which their own may not include."""
    found = []
    for file in sorted(CSRC.rglob("*.*")):
        layer = file.relative_to(CSRC).parts[0]
        for included in dict.fromkeys(INCLUDE.findall(file.read_text())):
            if included != layer and included not in MAY_INCLUDE[layer]:
                found.append(
                    f"{file}: {layer} may not include {included} (CONTRIBUTING.md, Where things are)"
                )
    return found


def untested() -> list[str]:
    """Sources that have no test by their name or their folder's and that no test names.

    bindings/ is tested from Python. The sources compiled for each instruction set are tested with the code
    that chooses among them.
    """
    named = {
        source.strip()
        for test in TESTS.glob("test_*.cc")
        for line in TESTED.findall(test.read_text())
        for source in line.split(",")
    }
    found = []
    for source in sorted(CSRC.rglob("*.cc")):
        path = source.relative_to(CSRC)
        if path.parts[0] == "bindings" or "cpu" in path.parts or str(path) in named:
            continue
        names = {path.stem, path.parent.name, f"{path.parent.name}_{path.stem}"}
        if not any((TESTS / f"test_{name}.cc").exists() for name in names):
            found.append(f"{source}: no tests/cpp/test_{path.stem}.cc, and no test says `// Tests: {path}.`")
    missing = [
        f"tests/cpp: a test says that it tests {name}, which is not there"
        for name in sorted(named)
        if not (CSRC / name).exists()
    ]
    return found + missing


if __name__ == "__main__":
    faults = wrong_includes() + untested()
    print("\n".join(faults), end="\n" if faults else "")
    sys.exit(bool(faults))
