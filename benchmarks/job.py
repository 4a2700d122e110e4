"""What benchmarks over several ranks share: the job, times in turns of which the slowest rank counts, and what a
device did in a call."""

import gzip
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measure import Call, describe_run
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

_SECONDS_OF_A_COLLECTIVE = 120
_MOST_REPEATS = 200
_PROFILED_CALLS = 3
_DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of events in a Chrome trace


@dataclass(frozen=True)
class Job:
    """One rank, and how many there are: NCCL with a GPU a rank, Gloo on the CPU."""

    device: torch.device
    rank: int
    size: int

    @classmethod
    def begin(cls) -> "Job":
        """Under torchrun; a process group that was begun before is taken as it is."""
        if not dist.is_initialized():
            options: dict[str, Any] = {"timeout": timedelta(seconds=_SECONDS_OF_A_COLLECTIVE)}
            if torch.cuda.is_available():
                local_rank = int(os.environ["LOCAL_RANK"])
                torch.cuda.set_device(local_rank)
                options["device_id"] = torch.device("cuda", local_rank)
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", **options)
        is_cuda = dist.get_backend() == "nccl"
        device = torch.device("cuda", torch.cuda.current_device()) if is_cuda else torch.device("cpu")
        return cls(device, dist.get_rank(), dist.get_world_size())

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.is_cuda else torch.float32

    @cached_property
    def mesh(self) -> DeviceMesh:
        """Of every rank, with one dimension."""
        return init_device_mesh(self.device.type, (self.size,), mesh_dim_names=("ranks",))

    def synchronise(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def say(self, *words: object) -> None:
        if self.rank == 0:
            print(*words, flush=True)

    def slowest(self, milliseconds: float) -> float:
        longest = torch.tensor(milliseconds, dtype=torch.float64, device=self.device)
        dist.all_reduce(longest, op=dist.ReduceOp.MAX)
        return longest.item()

    def gather(self, value: Any) -> list[Any]:
        """What every rank has."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def try_together(self, attempt: Callable[[], Any]) -> tuple[Any, str | None]:
        """What ``attempt`` returns; or None, and on every rank why the first rank that failed did."""
        result, failure = None, None
        try:
            result = attempt()
            self.synchronise()
        except Exception as error:  # an implementation that cannot is left out, whatever its reason
            failure = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        failure = next(filter(None, self.gather(failure)), None)
        return (None, failure) if failure else (result, None)

    def describe(self, commit: str | None) -> dict[str, Any]:
        """As ``measure.describe_run``, with what communicates: versions, and the environment that steers it."""
        steering = {name: value for name, value in os.environ.items() if name.startswith(("NCCL_", "TORCH_NCCL_"))}
        nccl = ".".join(map(str, torch.cuda.nccl.version())) if self.is_cuda else None
        return describe_run(commit) | {"world_size": self.size, "nccl": nccl, "environment": steering}


# ---------------------------------------------------------------- times


def times_in_turns(
    job: Job, calls: dict[str, Call | None], rounds: int, milliseconds: int, pause: float
) -> dict[str, float]:
    """Milliseconds of each call, the median of its rounds, in which the calls take turns in a turning order. None is a
    call that this rank has no part in."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            time.sleep(pause)
            once = time_of_repeats(job, calls[name], 1)
            repeats = min(_MOST_REPEATS, max(1, round(milliseconds / max(once, 1e-3))))
            times[name].append(time_of_repeats(job, calls[name], repeats))
    return {name: statistics.median(values) for name, values in times.items()}


def time_of_repeats(job: Job, call: Call | None, repeats: int) -> float:
    """Milliseconds of one of ``repeats`` calls behind one another, on the slowest rank; all begin together."""
    dist.barrier()
    job.synchronise()
    if call is None:
        return job.slowest(0.0)
    if job.is_cuda:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        job.synchronise()
        elapsed = begin.elapsed_time(end)
    else:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        elapsed = 1e3 * (time.perf_counter() - start)
    return job.slowest(elapsed / repeats)


# ---------------------------------------------------------------- where the time goes


def profile_call(job: Job, call: Call, path: Path) -> dict[str, list[float]] | None:
    """Writes a Chrome trace of the first rank's calls to ``path``, and gives ``device_times`` of every rank, by rank;
    None where no device was at work. A collective's time has the waiting for slower ranks in it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if job.is_cuda else []
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(_PROFILED_CALLS):
            call()
        job.synchronise()
    with tempfile.TemporaryDirectory() as folder:
        written = path if job.rank == 0 else Path(folder) / path.name
        written.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(written))
        with gzip.open(written, "rt") as file:
            own = device_times(json.load(file)["traceEvents"], _PROFILED_CALLS)
    by_rank = job.gather(own)
    return None if None in by_rank else {name: [times[name] for times in by_rank] for name in own}


def device_times(events: Iterable[dict[str, Any]], calls: int) -> dict[str, float] | None:
    """Milliseconds a call, of the events of a Chrome trace; None where there are none of a device.

    ``kernels`` and ``collectives``: in which such ran, several at once counted once; ``exposed``: in which collectives
    ran and no other kernel did; ``idle``: in which nothing ran, between the first and the last.
    """
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for event in events:
        if event.get("cat") in _DEVICE_WORK:
            spans["nccl" in event["name"].lower()].append((event["ts"], event["ts"] + event["dur"]))
    everything = spans[True] + spans[False]
    if not everything:
        return None
    busy, kernels, collectives = map(covered, (everything, spans[False], spans[True]))
    whole = max(end for _, end in everything) - min(begin for begin, _ in everything)
    times = {"kernels": kernels, "collectives": collectives, "exposed": busy - kernels, "idle": whole - busy}
    return {name: round(microseconds / calls / 1e3, 4) for name, microseconds in times.items()}


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
