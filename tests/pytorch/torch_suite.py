"""torch's own tests of a distributed backend, which its wheel brings, for a backend that they do not know.

The tests know backends by name, and ask less of one that they do not know: they skip themselves, or do not
look at what a profiler has recorded. So the backend's name is added to their text wherever Gloo's stands.
"""

from __future__ import annotations

import ast
import importlib.util
import multiprocessing
import os
import signal
import sys
import traceback
import types
import unittest
from contextlib import suppress
from typing import Any, NamedTuple

_NAME = "torch.testing._internal.distributed.distributed_test"
_FORK = multiprocessing.get_context("fork")  # ranks need not import torch and the tests, each for seconds


class Outcome(NamedTuple):
    test: str
    status: str  # "passed", "failed" or "skipped"
    reason: str  # of a failure or of a skip


def load(backend: str, world_size: int, timeout: int) -> type[unittest.TestCase]:
    """The tests as a class, for `run`. A process can load one: they read the environment when imported.

    A test that takes longer than `timeout` seconds ends with the stacks of its ranks.
    """
    os.environ.update(
        BACKEND=backend,
        WORLD_SIZE=str(world_size),
        DISTRIBUTED_TESTS_DEFAULT_TIMEOUT=str(timeout),
        PYTORCH_PRINT_REPRO_ON_FAILURE="0",  # an error ends with its message
    )
    import torch
    from torch.testing._internal import common_distributed

    import pycomm.torch  # noqa: F401

    torch.set_num_threads(1)  # a child of fork has no other threads of torch's pool
    features = common_distributed.DistTestCases
    for backends in [*features.backend_feature.values(), *features.skip_collective.values()]:
        if "gloo" in backends:
            backends.add(backend)
    features.backend_feature["plugin"].add(backend)
    tests = _read(backend)

    class Suite(tests.TestDistBackend, tests.DistributedTest._DistTestBase):  # type: ignore[misc,name-defined]
        def setUp(self) -> None:
            super().setUp()
            self._start_processes(_FORK.Process)

    return Suite


def names(suite: type[unittest.TestCase]) -> list[str]:
    return unittest.TestLoader().getTestCaseNames(suite)


def run(suite: type[unittest.TestCase], test: str, patience: float, log: str) -> Outcome:
    """Runs one test in a process group of its own, of which nothing is left. It prints into the file `log`.

    A test that crashes, or is still at it after `patience` seconds, has failed.
    """
    ours, theirs = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_run, args=(suite, test, log, theirs))
    process.start()
    theirs.close()
    try:
        if ours.poll(patience):
            return Outcome(test, *ours.recv())
        return Outcome(test, "failed", f"no end within {patience} s")
    except EOFError:
        process.join()
        return Outcome(test, "failed", f"the test's process ended with {process.exitcode}")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()  # in case that it has no group yet
        process.join()
        ours.close()


def _run(suite: type[unittest.TestCase], test: str, log: str, outcome: Any) -> None:
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    result = unittest.TestResult()
    try:
        suite(test).run(result)
        errors = [text for _, text in result.errors + result.failures]
    except BaseException:
        errors = [traceback.format_exc()]
    if errors:
        outcome.send(("failed", errors[0]))
    elif result.skipped:
        outcome.send(("skipped", result.skipped[0][1]))
    else:
        outcome.send(("passed", ""))


def _read(backend: str) -> types.ModuleType:
    spec = importlib.util.find_spec(_NAME)
    assert spec is not None and spec.origin is not None
    with open(spec.origin) as file:
        tree = ast.parse(file.read())
    if backend != "gloo":
        tree = ast.fix_missing_locations(_LikeGloo(backend).visit(tree))
    module = importlib.util.module_from_spec(spec)
    sys.modules[_NAME] = module  # where objects that tests send to each other are found
    exec(compile(tree, spec.origin, "exec", dont_inherit=True), module.__dict__)
    return module


class _LikeGloo(ast.NodeTransformer):
    """Adds `backend` to what BACKEND is compared with, and to collections of names, where Gloo is there.

    More is asked of it in what are tests for MPI alone: those of all_to_all between CPUs. And less in one
    thing: Gloo's events are all asynchronous, but a blocking call may run on the thread that makes it.
    """

    def __init__(self, backend: str) -> None:
        self._backend = backend

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        comparison = ast.unparse(node)
        if comparison in ("BACKEND == 'gloo'", "BACKEND != 'gloo'", "BACKEND != 'mpi'"):
            node.ops = [ast.In() if " == " in comparison else ast.NotIn()]
            node.comparators = [ast.Set([*node.comparators, ast.Constant(self._backend)])]
        return node

    def visit_Set(self, node: ast.Set | ast.List) -> ast.AST:
        self.generic_visit(node)
        if any(_is_gloo(item) for item in node.elts):
            node.elts.append(ast.Constant(self._backend))
        return node

    visit_List = visit_Set

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        self.generic_visit(node)
        call = node.value
        if isinstance(call, ast.Call) and any(ast.unparse(arg).endswith(".is_async") for arg in call.args):
            return ast.Pass()
        return node


def _is_gloo(node: ast.expr) -> bool:
    return ast.unparse(node) in {"'gloo'", "dist.Backend.GLOO"}
