"""The entry point `torch.backends`: `import torch` registers the backend, and loads nothing for it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

import pycomm.torch  # noqa: F401
from pycomm import autoload

PACKAGE = Path(autoload.__file__).parent
ROOT = Path(__file__).parent.parent.parent

ONE_RANK = """
import sys, torch
import torch.distributed as dist
print(sorted(name for name in sys.modules if name.startswith("pycomm")))
dist.init_process_group("pycomm", store=dist.HashStore(), rank=0, world_size=1)
x = torch.ones(3)
dist.all_reduce(x)
print(dist.get_backend(), x.tolist())
"""


@pytest.fixture
def info(tmp_path: Path) -> Path:
    """A folder with what an installation puts beside the package: the entry points of pyproject.toml."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    folder = tmp_path / "site" / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    points = project["entry-points"]["torch.backends"].items()
    lines = [f"{name} = {value}\n" for name, value in points]
    (folder / "entry_points.txt").write_text("[torch.backends]\n" + "".join(lines))
    return folder.parent


def python(code: str, *path: Path, **environment: str) -> tuple[str, str]:
    """What `code` prints, and its error, when Python looks in the folders of `path` first."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))} | environment,
        cwd=path[0],
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout, done.stderr


def test_import_torch_is_enough(info: Path) -> None:
    out, error = python(ONE_RANK, info, PACKAGE.parent)
    assert out.splitlines() == [
        "['pycomm', 'pycomm.autoload', 'pycomm.interpreter']",
        "pycomm [1.0, 1.0, 1.0]",
    ], error


def test_switched_off(info: Path) -> None:
    """An import registers the backend then."""
    off = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    out, error = python(ONE_RANK, info, PACKAGE.parent, **off)
    assert out == "[]\n" and "pycomm" in error.splitlines()[-1]
    out, error = python("import pycomm.torch\n" + ONE_RANK, info, PACKAGE.parent, **off)
    assert out.endswith("pycomm [1.0, 1.0, 1.0]\n"), error


def test_without_the_compiled_module(info: Path) -> None:
    """As in a folder of sources: torch is as it was, and a group says what is missing."""
    shutil.copytree(PACKAGE, info / "pycomm", ignore=shutil.ignore_patterns("_native.*.so", "__pycache__"))
    (info / "sitecustomize.py").write_text(  # an editable install would find the compiled module elsewhere
        "import sys\n"
        "sys.meta_path = [each for each in sys.meta_path if 'editable' not in type(each).__module__]\n"
    )
    out, error = python(ONE_RANK, info)
    assert out == "['pycomm', 'pycomm.autoload', 'pycomm.interpreter']\n"
    assert "ImportError" in error and "without the compiled module: leave it" in error


def test_a_torch_without_distributed(tmp_path: Path) -> None:
    """Nor does the entry point need NumPy."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("from torch import distributed\n")
    (tmp_path / "torch" / "distributed.py").write_text("def is_available():\n    return False\n")
    call = "import sys; from pycomm import autoload; autoload.register(); print('numpy' in sys.modules)\n"
    out, error = python(call + "import pycomm.torch", tmp_path, PACKAGE.parent)
    assert out == "False\n"
    assert "ImportError: this build of torch has no torch.distributed" in error


def test_registers_once(recwarn: pytest.WarningsRecorder) -> None:
    before = dist.Backend._plugins["PYCOMM"]
    autoload.register()
    autoload.register()
    assert dist.Backend._plugins["PYCOMM"] is before
    assert dist.Backend.backend_capability["pycomm"] == ["cpu"]
    assert dist.Backend.backend_list.count("pycomm") == 1 and not list(recwarn)
    assert dist.Backend.default_device_backend_map["cpu"] == "gloo"  # as it was
