"""What the benchmarks share: times in interleaved rounds, peak memory, host time, and what a record says of its run."""

import argparse
import datetime
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent
sys.path.append(str(ROOT.parent / "tests" / "python"))  # support: problems that the tests share
Call = Callable[[], object]
FAMILIES = ("sm80", "sm90")
FAMILY_VARIABLE = "SELFATTN_FLASH_FAMILY"


def median_times(calls: dict[str, Call], rounds: int, pause: float, milliseconds: int) -> dict[str, float]:
    """Milliseconds of each call: the median of its rounds, in which the calls take turns in a turning order, because a
    card's clock depends on what ran before."""
    times = times_of_rounds(calls, rounds, pause, milliseconds)
    return {name: statistics.median(values) for name, values in times.items()}


def times_of_rounds(calls: dict[str, Call], rounds: int, pause: float, milliseconds: int) -> dict[str, list[float]]:
    """Those rounds themselves."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            synchronise()
            time.sleep(pause)
            times[name].append(median_time(calls[name], milliseconds))
    return times


def median_time(call: Call, milliseconds: int) -> float:
    """Milliseconds of one call, the median over ``milliseconds`` of repetitions."""
    if torch.cuda.is_available():
        from triton.testing import do_bench

        return do_bench(call, warmup=milliseconds // 4, rep=milliseconds, return_mode="median")
    times: list[float] = []
    while not times or sum(times) < milliseconds:
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def peak_bytes(call: Call) -> int | None:
    """The most that one call has allocated at a time, above what was allocated before it; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def host_time(call: Call, repeats: int = 300) -> float:
    """Microseconds until a call returns, the median; the device is idle before each."""
    times = []
    for _ in range(repeats):
        synchronise()
        start = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - start))
    synchronise()
    return statistics.median(times)


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def flash_family() -> str | None:
    """The family of CUDA kernels that the backend ``flash`` takes here; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    own = "sm90" if torch.cuda.get_device_capability() == (9, 0) else "sm80"
    return os.environ.get(FAMILY_VARIABLE) or own


def describe_run(commit: str | None) -> dict[str, str | int | None]:
    """Device, software, commit and date, as every record has them."""
    has_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if has_gpu else torch.backends.cpu.get_cpu_capability(),
        "family": flash_family(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "commit": commit or head_commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def head_commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def sm_clock() -> str | None:
    """Clock and power of the card at this moment; None without one."""
    if not torch.cuda.is_available():
        return None
    query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()


def add_options(parser: argparse.ArgumentParser, implementations: list[str], out: str) -> None:
    """The options of a benchmark of many cases that takes turns."""
    parser.add_argument("--case", action="append", default=[], help="part of a case's name; may be repeated")
    parser.add_argument("--impl", action="append", choices=implementations, help="may be repeated")
    add_turn_options(parser, out)


def add_turn_options(parser: argparse.ArgumentParser, out: str) -> None:
    """How often and how long turns are taken, and the record."""
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ms", type=int, default=60, help="time spent on one implementation in one round")
    parser.add_argument("--pause", type=float, default=0.1, help="seconds of rest before each measurement")
    add_record_options(parser, out)


def add_record_options(parser: argparse.ArgumentParser, out: str) -> None:
    """Where a record goes, and what it says was built."""
    parser.add_argument("--commit", help="the commit that was built, where this folder is no git checkout")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / out)


class ForceFamily(argparse.Action):
    """Puts the family into the environment, which the library reads at its first call, and processes that are started
    from here inherit."""

    def __call__(self, parser: object, namespace: argparse.Namespace, value: str, option: str | None = None) -> None:
        os.environ[FAMILY_VARIABLE] = value
        setattr(namespace, self.dest, value)


def add_family_option(parser: argparse.ArgumentParser) -> None:
    """Which CUDA kernels are measured."""
    says = f"the family of CUDA kernels; sets {FAMILY_VARIABLE}"
    parser.add_argument("--family", choices=FAMILIES, action=ForceFamily, help=says)


def parse_with_tiny(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, with --tiny; ends the program where the whole cases are asked for and there is no GPU."""
    parser.add_argument("--tiny", action="store_true", help="small cases, also without a GPU: tries the script out")
    arguments = parser.parse_args()
    if not arguments.tiny and not torch.cuda.is_available():
        parser.error("the cases need a CUDA GPU, and there is none; --tiny tries the script out on the CPU")
    return arguments
