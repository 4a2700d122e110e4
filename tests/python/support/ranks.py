"""Processes that stand for the ranks of a job: started once for all tests, on the CPU over Gloo, or on a GPU each over
NCCL."""

import importlib.util
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo
import torch.distributed as dist
import torch.distributed.checkpoint
from torch.distributed.tensor._redistribute import clear_redistribute_planner_cache
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

import selfattn.distributed  # noqa: F401 -- these take long: once, before processes are forked off

_TIMEOUT = 60
"""Seconds after which a collective gives up, and with it a test that hangs."""
_MOST_CALLS = 30
"""Of one process: PyTorch keeps the groups that DTensors were on, with two threads each that poll for messages, and
some hundred of them leave little of a machine of two cores to the tests."""


def in_fake_job(world_size: int, function: Callable[[], None]) -> None:
    """In a group of so many ranks, of which this process is one and the others are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=world_size - 1, world_size=world_size)
    try:
        function()
    finally:
        dist.destroy_process_group()


class Ranks:
    """A pool of processes; those that a test ends are started again for the next, and after some calls all of them.

    A test hands a function of its own file to ``run``, which calls it once a rank, in a process group of so many ranks.
    On ``device_type`` "cuda" GPU r is the current device of rank r.
    """

    def __init__(self, device_type: str = "cpu") -> None:
        self._device_type = device_type
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])
        self._workers: list[tuple[multiprocessing.Process, Connection]] = []
        self._calls = 0

    def run(self, function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
        """What ``function(*arguments)`` returns on every rank.

        Raises:
            AssertionError: with the traceback of every rank that raised, or its exit code.
        """
        outcomes = self.outcomes(function, world_size, *arguments)
        failed = [f"rank {rank}: {text}" for rank, (succeeded, text) in enumerate(outcomes) if not succeeded]
        if failed:
            raise AssertionError("\n".join(failed))
        return [result for _, result in outcomes]

    def outcomes(self, function: Callable[..., Any], world_size: int, *arguments: Any) -> list[tuple[bool, Any]]:
        """As ``run``: (True, what the rank returned) or (False, its traceback or exit code) for every rank."""
        self._start(world_size)
        workers = self._workers[:world_size]
        with tempfile.TemporaryDirectory() as folder:
            call = (sys.modules[function.__module__].__file__, function.__name__, arguments)
            for rank, (_, connection) in enumerate(workers):
                connection.send((f"{folder}/store", rank, world_size, *call))
            return [_outcome(process, connection) for process, connection in workers]

    def _start(self, count: int) -> None:
        self._calls += 1
        if self._calls % _MOST_CALLS == 0:
            self.close()
        self._workers = [worker for worker in self._workers if worker[0].is_alive()]
        with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # the fork server takes no other
            while len(self._workers) < count:
                ours, theirs = self._context.Pipe()
                process = self._context.Process(target=_serve, args=(theirs, self._device_type), daemon=True)
                process.start()
                self._workers.append((process, ours))

    def close(self) -> None:
        for process, connection in self._workers:
            if process.is_alive():
                connection.send(None)
                process.join()
        self._workers = []


def _outcome(process: multiprocessing.Process, connection: Connection) -> tuple[bool, Any]:
    hangs = not connection.poll(2 * _TIMEOUT)
    try:
        return connection.recv() if not hangs else (False, "hung, and was killed")
    except EOFError:
        process.join()
        return False, f"ended with exit code {process.exitcode}"
    finally:
        if hangs:
            process.kill()
            process.join()


def _serve(connection: Connection, device_type: str) -> None:
    torch.set_num_threads(1)
    modules: dict[str, ModuleType] = {}
    while (call := connection.recv()) is not None:
        store, rank, world_size, file, name, arguments = call
        try:
            if file not in modules:
                modules[file] = _load(file)
            outcome = True, _call(device_type, store, rank, world_size, getattr(modules[file], name), arguments)
        except Exception:
            outcome = False, traceback.format_exc()
        connection.send(outcome)


def _load(file: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def _call(
    device_type: str,
    store: str,
    rank: int,
    world_size: int,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> Any:
    if device_type == "cuda":
        torch.cuda.set_device(rank)
    torch.manual_seed(0)
    for clear in (_clear_sharding_prop_cache, clear_redistribute_planner_cache):  # of the groups of the call before
        clear()
    dist.init_process_group(
        "gloo" if device_type == "cpu" else "cpu:gloo,cuda:nccl",
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=_TIMEOUT),
    )
    try:
        return function(*arguments)
    finally:
        torch.use_deterministic_algorithms(False)
        dist.destroy_process_group()
