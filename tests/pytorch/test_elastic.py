"""torchrun starts all ranks again after one was killed: they resume from a checkpoint, and nothing stays."""

import os
import secrets
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import torch

PROGRAM = """
import os, signal, sys, time
from pathlib import Path
import torch, torch.distributed as dist
import pycomm.torch
from torch.nn.parallel import DistributedDataParallel

folder = Path(sys.argv[1])
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
rank = int(os.environ["RANK"])
dist.init_process_group("pycomm")
torch.manual_seed(0)
model = DistributedDataParallel(torch.nn.Linear(4, 1, bias=False))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
first = 0
if (folder / "state.pt").exists():
    state = torch.load(folder / "state.pt")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    first = state["step"] + 1
for step in range(first, 8):
    if attempt == 0 and step == 5 and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    optimizer.zero_grad()
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(step))
    model(x.chunk(2)[rank]).square().mean().backward()
    optimizer.step()
    if step % 2 == 1:  # the last one is that of step 3: step 4 is taken twice
        if rank == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state, folder / "new.pt")
            (folder / "new.pt").rename(folder / "state.pt")
        dist.barrier()
torch.save([first, model.module.weight.detach()], folder / f"end-{attempt}-{rank}.pt")
dist.destroy_process_group()
"""


def processes_with(variable: str) -> list[int]:
    """Those that have this in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # ended meanwhile, or somebody else's
            if variable.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def test_torchrun_starts_again(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    mark = {"TEST_JOB": secrets.token_hex(8)}
    done = subprocess.run(
        [*launcher, str(script), str(tmp_path)],
        env={**os.environ, **mark},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert processes_with("=".join(*mark.items())) == []

    model = torch.nn.Linear(4, 1, bias=False)
    torch.manual_seed(0)
    model.reset_parameters()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(8):
        optimizer.zero_grad()
        model(torch.randn(12, 4, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
    assert not list(tmp_path.glob("end-0-*"))
    for rank in range(2):
        first, weight = torch.load(tmp_path / f"end-1-{rank}.pt")
        assert first == 4
        torch.testing.assert_close(weight, model.weight.detach(), rtol=1e-5, atol=1e-6)
