"""The sets of cases of scale.py: who takes turns, and what follows from their times."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from cases import Case
from job import Job
from scale_contenders import (
    HEAVY_TAIL,
    Attention,
    Contender,
    ContextLayer,
    Ready,
    Row,
    Step,
    TensorParallelLayer,
    attention_alone,
    attention_in_context,
)
from scale_peers import flex_gathered, sdpa_ring

import selfattn

ALONE = "one rank"
OURS = "selfattn"
COLLECTIVES = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")
CARVEOUTS = (0, 8, 16)
"""SMs that kernels leave to others."""
METHODS = ("auto", "heads", "keys")
Facts = dict[str, Any]


class Contest(NamedTuple):
    """A case, who takes turns at it, what follows from the times for each, and what else a row says."""

    set: str
    case: str
    contenders: dict[str, Contender]
    derive: Callable[[dict[str, float], str, Job], Facts]
    facts: Facts
    is_timed: bool = True
    is_traced: bool = True


# ---------------------------------------------------------------- what follows from times


def efficiency(contenders: dict[str, Contender]) -> Callable[[dict[str, float], str, Job], Facts]:
    def derive(times: dict[str, float], name: str, job: Job) -> Facts:
        if contenders[name].is_alone or ALONE not in times:
            return {}
        facts = {"efficiency": round(times[ALONE] * contenders[name].work / (job.size * times[name]), 4)}
        if OURS in times and name != OURS:
            facts["ratio"] = round(times[name] / times[OURS], 4)
        return facts

    return derive


def bus_bytes(collective: str, size: float, ranks: int) -> float:
    """What a link carries, as nccl-tests counts it, of a tensor of ``size`` bytes: the whole one, not a rank's part."""
    return size * (ranks - 1) / ranks * (2 if collective == "all_reduce" else 1)


def rates(collective: str, size: int) -> Callable[[dict[str, float], str, Job], Facts]:
    def derive(times: dict[str, float], name: str, job: Job) -> Facts:
        if name == "alone":
            return {"busbw_gbps": round(bus_bytes(collective, size, job.size) / times[name] / 1e6, 2)}
        kernels = {"before": 1, "between": 2}.get(name.split()[0], 0) * times["kernel carveout 0"]
        return {"added_ms": round(times[name] - kernels, 4)} if kernels else {}

    return derive


# ---------------------------------------------------------------- the sets


def start_of(collective: str, size: int, job: Job) -> Callable[[], dist.Work]:
    elements = size // job.dtype.itemsize
    whole = torch.zeros(elements, device=job.device, dtype=job.dtype)
    part = torch.zeros(elements // job.size, device=job.device, dtype=job.dtype)
    starts = {
        "all_gather": lambda: dist.all_gather_into_tensor(whole, part, async_op=True),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole, async_op=True),
        "all_reduce": lambda: dist.all_reduce(whole, async_op=True),
        "all_to_all": lambda: dist.all_to_all_single(torch.empty_like(whole), whole, async_op=True),
    }
    return starts[collective]


def beside_attention(
    case: Attention,
    collective: str,
    size: int,
    kernels: tuple[int, int],
    carveout: int = 0,
    has_collective: bool = True,
) -> Callable[[Job], Ready]:
    """The collective, started behind the first of ``kernels`` passes of attention and beside the others."""

    def make(job: Job) -> Ready:
        q, k, v, _ = case.tensors(job)
        start = start_of(collective, size, job)

        @torch.no_grad()
        def call() -> None:
            torch._C._set_sm_carveout_experimental(carveout or None)
            for _ in range(kernels[0]):
                selfattn.multihead_attention(q, k, v)
            work = start() if has_collective else None
            for _ in range(kernels[1]):
                selfattn.multihead_attention(q, k, v)
            if work is not None:
                work.wait()
            torch._C._set_sm_carveout_experimental(None)

        return Ready(call)

    return make


def primitives(job: Job, tiny: bool) -> Iterator[Contest]:
    case = Attention(Row(256), 2, 1, 32) if tiny else Attention(Row(16384), 32, 8)
    for collective in COLLECTIVES:
        for kib in (64, 256) if tiny else (1024, 4096, 16384, 65536, 262144):
            size = kib * 1024

            def on(*kernels: int, of: tuple[Any, ...] = (case, collective, size), **options: Any) -> Contender:
                return Contender(beside_attention(*of, kernels, **options))

            contenders = {"alone": on(0, 0)}
            for carveout in CARVEOUTS:
                contenders[f"kernel carveout {carveout}"] = on(0, 1, carveout=carveout, has_collective=False)
                contenders[f"before carveout {carveout}"] = on(0, 1, carveout=carveout)
                contenders[f"between carveout {carveout}"] = on(1, 1, carveout=carveout)
            name = f"{collective} {kib // 1024} MiB" if kib >= 1024 else f"{collective} {kib} KiB"
            facts = {"collective": collective, "bytes": size, "kernel": case.name}
            yield Contest("primitives", name, contenders, rates(collective, size), facts, is_traced=kib >= 65536)


def rows(tiny: bool) -> list[Row]:
    if tiny:
        return [Row(256), Row(256, 64), Row(256, 64, HEAVY_TAIL)]
    return [Row(32768), Row(32768, 4096), Row(32768, 1024), Row(32768, 2048, HEAVY_TAIL)]


def attention_cases(tiny: bool) -> list[Attention]:
    one, *documents = rows(tiny)
    heads, key_heads, dim = (4, 2, 16) if tiny else (32, 8, 128)
    of_groups = [Attention(row, heads, key_heads, dim) for row in (one, *documents)]
    return [of_groups[0], Attention(one, heads // 2, heads // 2, dim), *of_groups[1:]]


def operator(job: Job, tiny: bool) -> Iterator[Contest]:
    for case in attention_cases(tiny):
        contenders = {ALONE: Contender(attention_alone(case), is_alone=True)}
        contenders |= {method: Contender(attention_in_context(case, method)) for method in METHODS}
        for heads_size in range(2, job.size):
            if job.size % heads_size == 0:
                name = f"heads {heads_size} x keys {job.size // heads_size}"
                contenders[name] = Contender(attention_in_context(case, "auto", heads_size))
        yield contest("operator", case.name, contenders, {"problem": dataclasses.asdict(case)})


def contest(set_name: str, name: str, contenders: dict[str, Contender], facts: Facts | None = None) -> Contest:
    return Contest(set_name, name, contenders, efficiency(contenders), facts or {})


def context_layers(tiny: bool) -> list[ContextLayer]:
    return [ContextLayer(row, 64, 2, 16) if tiny else ContextLayer(row, 4096, 8) for row in rows(tiny)]


def layer(job: Job, tiny: bool) -> Iterator[Contest]:
    for case in context_layers(tiny):
        contenders = {ALONE: Contender(case.alone, is_alone=True)}
        contenders |= {method: Contender(case.in_context(method)) for method in METHODS}
        yield contest("layer", case.name, contenders, {"problem": dataclasses.asdict(case)})


def tensor(job: Job, tiny: bool) -> Iterator[Contest]:
    for mean in (512, 0):
        if tiny:
            case = TensorParallelLayer(Case("docs", 16, 64, 2, mean=mean // 16), 64)
        else:
            case = TensorParallelLayer(Case("docs", 128, 8192, 2, mean=mean), 4096)
        contenders = {
            ALONE: Contender(case.alone, is_alone=True),
            "overlap": Contender(case.spread()),
            "serial": Contender(case.spread(overlap=False)),
            "sequence_parallel": Contender(case.spread(sequence_parallel=True)),
        }
        facts = {"embedding_dim": case.embedding_dim, "tokens": case.attention.batch * case.attention.length}
        yield contest("tensor", case.name, contenders, facts)


def steps(tiny: bool) -> tuple[list[Step], list[Step]]:
    """Those whose ranks have rows of their own, and those whose ranks share rows."""
    if tiny:
        return [Step(32, 2, 16, Row(64, 24), rows=2)], [Step(32, 2, 16, Row(128)), Step(32, 2, 16, Row(128, 32))]
    demo = Step(512, 8, 64, Row(2048, 512), rows=16)  # the large preset of examples/train_packed
    wide = {"embedding_dim": 4096, "layers": 2, "dim": 128, "key_heads": 8}
    shared = [Step(row=Row(32768, mean), **wide) for mean in (0, 1024)]
    return [demo, Step(row=Row(16384, 1024), **wide)], shared


def step(job: Job, tiny: bool) -> Iterator[Contest]:
    own_rows, shared_rows = steps(tiny)
    for case in own_rows:
        contenders = {
            ALONE: Contender(case.alone, is_alone=True),
            "FSDP2": Contender(case.spread(), work=job.size),
            "FSDP2, model at once": Contender(case.spread(fsdp_modules=()), work=job.size),
            "DDP": Contender(case.spread(by_ddp=True), work=job.size),
        }
        facts = {"parameters": parameters_of(case), "layers": case.layers, "tokens": case.rows * case.row.length}
        yield contest("step", case.name, contenders, facts)
    for case in shared_rows:
        contenders = {ALONE: Contender(case.alone, is_alone=True)}
        for context in range(2, job.size + 1):
            if job.size % context == 0:
                name = f"context {context} x FSDP2 {job.size // context}"
                contenders[name] = Contender(case.spread(context), work=job.size // context)
        yield contest("step", case.name, contenders)


def parameters_of(case: Step) -> int:
    model = case.model(Job(torch.device("meta"), 0, 1))
    return sum(parameter.numel() for parameter in model.parameters())


def peers(job: Job, tiny: bool) -> Iterator[Contest]:
    for case in attention_cases(tiny):
        contenders = {ALONE: Contender(attention_alone(case), is_alone=True)}
        contenders[OURS] = Contender(attention_in_context(case, "auto"))
        if not case.row.mean:
            ways = {" repeated keys": True, " enable_gqa": False} if case.heads != case.key_heads else {"": False}
            for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
                for way, repeats in ways.items():
                    contenders[f"context_parallel {backend}{way}"] = Contender(sdpa_ring(case, backend, repeats))
        contenders["flex_attention gathered"] = Contender(flex_gathered(case))
        yield contest("peers", case.name, contenders)


def memory(job: Job, tiny: bool) -> Iterator[Contest]:
    for contests in (operator(job, tiny), layer(job, tiny), step(job, tiny)):
        for one in contests:
            yield one._replace(set="memory", is_timed=False)


SETS = {
    "primitives": primitives,
    "operator": operator,
    "layer": layer,
    "tensor": tensor,
    "step": step,
    "peers": peers,
    "memory": memory,
}
