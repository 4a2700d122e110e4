"""Predicts how efficient several ranks are, from what scale.py measured on two or more: Markdown tables.

    python benchmarks/scale_model.py --records benchmarks/results/scale.jsonl

Measured: the times of one rank, and a line through the times of each collective, latency + bytes / bandwidth. Not
measured, and to be named with the result: what the network between nodes carries (--network-gbps, --network-us).
Computed: how documents fall on ranks, by the library's own layout. Where the records have more ranks, their efficiency
stands beside the prediction; so this tests the model on 8 GPUs:

    torchrun --nproc-per-node 8 benchmarks/scale.py --set operator --set layer --set tensor --set step \
        --out benchmarks/results/scale_8.jsonl
    python benchmarks/scale_model.py --records benchmarks/results/scale.jsonl --test benchmarks/results/scale_8.jsonl

What is modelled: kernels take time in proportion to pairs; a collective that runs beside kernels costs what they do not
cover, and nothing else. What is not: that kernels and collectives slow each other down, copies before and after
collectives, host time, cards that differ.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import ROOT
from scale_contenders import Attention, ContextLayer, Row
from scale_sets import ALONE, COLLECTIVES, bus_bytes

import selfattn  # noqa: F401  registers the operators

FORWARD = 2 / 7
"""Its share of the operations of both passes: 4 D of 14 D a pair and head."""
RANKS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
FEWEST_TOKENS = 1024
"""Of a rank, where one row is spread over ever more: below, kernels are no longer in proportion to pairs."""
ELEMENT, FLOAT = 2, 4  # bytes
Records = list[dict[str, Any]]


# ---------------------------------------------------------------- what was measured


class Link(NamedTuple):
    """What a collective takes: seconds, and bytes as ``bus_bytes`` counts them a second."""

    latency: float
    bandwidth: float

    def seconds(self, bytes_: float) -> float:
        return self.latency + bytes_ / self.bandwidth if bytes_ else 0.0


class Links(NamedTuple):
    """Within a node of ``node`` ranks, by collective, and between nodes."""

    of_node: dict[str, Link]
    network: Link
    node: int

    def of(self, collective: str, ranks: int) -> Link:
        return self.of_node[collective] if ranks <= self.node else self.network


def fit(points: list[tuple[float, float]]) -> Link:
    """Through (bytes, seconds), by the least squares of relative errors."""
    sizes, seconds = torch.tensor(points, dtype=torch.float64).unbind(1)
    lines = torch.stack((1 / seconds, sizes / seconds), 1)
    latency, per_byte = (
        torch.linalg.lstsq(lines, torch.ones(len(points), 1, dtype=torch.float64)).solution[:, 0].tolist()
    )
    if per_byte <= 0:
        raise ValueError(f"expected times that grow with bytes, got (bytes, seconds) {points}")
    return Link(max(latency, 0.0), 1 / per_byte)


def fit_links(records: Records, network: Link, node: int) -> Links:
    points: dict[str, list[tuple[float, float]]] = {}
    for row in newest(records, "primitives").values():
        if row["impl"] == "alone":
            moved = bus_bytes(row["collective"], row["bytes"], row["ranks"])
            points.setdefault(row["collective"], []).append((moved, row["ms"] / 1e3))
    return Links({name: fit(of_one) for name, of_one in points.items()}, network, node)


def newest(records: Records, set_name: str) -> dict[tuple[str, str], dict[str, Any]]:
    """(case, implementation) -> row, of the last run of each."""
    rows = sorted((row for row in records if row["set"] == set_name and "ms" in row), key=lambda row: row["date"])
    return {(row["case"], row["impl"]): row for row in rows}


# ---------------------------------------------------------------- context parallelism


class Deal(NamedTuple):
    """How the tokens of a row fall on ranks: pairs of one head."""

    local: list[float]
    """Of each rank, within documents that it holds whole."""
    shared: list[float]
    """Of each rank, of its queries in split documents."""
    slots: int
    """Of a shard, that travel."""

    def slowest(self, method: str) -> float:
        """Pairs of the rank with the most. By heads the shared ones are the same on every rank."""
        if method == "heads":
            return max(self.local) + sum(self.shared) / len(self.shared)
        return max(map(sum, zip(self.local, self.shared, strict=True)))

    def balance(self, method: str) -> float:
        """Pairs of the mean rank over those of the slowest: no efficiency is above it."""
        return (sum(self.local) + sum(self.shared)) / len(self.local) / self.slowest(method)


def deal(row: Row, ranks: int) -> Deal:
    ids, local, shared = row.ids(), [], []
    for rank in range(ranks):
        layout = torch.ops.selfattn.context_layout(ids, rank, ranks)
        _, own_ids, _, document_positions, kv_ids, _, _, _, slots, _, _ = layout
        pairs = (document_positions[0] + 1).double() * (own_ids[0] >= 0)
        is_split = torch.zeros(len(pairs), dtype=torch.bool)
        is_split[:slots] = kv_ids[0, rank * slots : (rank + 1) * slots] >= 0
        local.append(pairs[~is_split].sum().item())
        shared.append(pairs[is_split].sum().item())
    return Deal(local, shared, slots)


def deal_one_document(length: int, ranks: int) -> Deal:
    """Evenly, of any length."""
    return Deal([0.0] * ranks, [length**2 / 2 / ranks] * ranks, length // ranks)


def groups_of_heads(key_heads: int, smallest: float, bytes_: float, keys: int, dim: int) -> int:
    """In how many groups heads travel, as csrc/distributed/context_problem.cpp has it: key heads of a rank, bytes of
    the smallest transfer and of all in a forward pass, keys of the row."""
    return 2 if key_heads % 2 == 0 and smallest >= 2 * 2**26 and 8 * bytes_ >= 128 * keys * dim else 1


def until_computed(local: float, shared: float, come: float, groups: int) -> float:
    """Until the shared part is computed, whose `come` seconds of transfers run beside the local part, and those of a
    group of heads beside the group before."""
    return max(max(local, come / groups) + shared, come + shared / groups)


def exposed(shared: float, go: float, groups: int) -> float:
    """Of `go` seconds in which results go back, those that the groups behind do not hide."""
    return max((groups - 1) * (go - shared) / groups, 0.0) + go / groups


@dataclass(frozen=True)
class Context:
    """Attention of one row over ranks: seconds of both passes, as csrc/distributed/context_parallel.cpp does it."""

    case: Attention
    seconds_per_pair: float
    """Of a head, in both passes."""
    links: Links

    def compute(self, pairs: float, heads: float) -> tuple[float, float]:
        """Forward, backward."""
        seconds = self.seconds_per_pair * pairs * heads
        return FORWARD * seconds, (1 - FORWARD) * seconds

    def by_keys(self, dealt: Deal, ranks: int) -> float:
        """Gathered keys arrive beside the local part, or where there is none in groups of heads, each beside the group
        before. In the backward pass they come again, in groups, and the sums of one run beside the next."""
        case, links = self.case, self.links
        features = 2 * case.key_heads * case.dim * dealt.slots * ranks  # keys and values of all ranks
        gathered = bus_bytes("all_gather", ELEMENT * features, ranks)
        groups = groups_of_heads(case.key_heads, gathered, gathered, ranks * dealt.slots, case.dim)
        summed = bus_bytes("reduce_scatter", (FLOAT if ranks > 2 else ELEMENT) * features, ranks)
        all_gather, reduce_scatter = links.of("all_gather", ranks), links.of("reduce_scatter", ranks)
        come, go = groups * all_gather.seconds(gathered / groups), groups * reduce_scatter.seconds(summed / groups)
        slowest = 0.0
        for local, shared in zip(dealt.local, dealt.shared, strict=True):
            first, local_back = self.compute(local, case.heads)
            second, shared_back = self.compute(shared, case.heads)
            if any(dealt.local):
                forward = until_computed(first, second, all_gather.seconds(gathered), 1)
            else:
                forward = until_computed(first, second, come, groups)
            backward = until_computed(local_back, shared_back, come, groups) + exposed(shared_back, go, groups)
            slowest = max(slowest, forward + backward)
        return slowest

    def by_heads(self, dealt: Deal, ranks: int) -> float | None:
        """Shared tokens arrive beside the local part and go back behind the shared part, a group of heads beside the
        other; None where they cannot."""
        case = self.case
        key_heads = max(case.key_heads, ranks)
        if case.heads % ranks or key_heads % ranks or key_heads % case.key_heads:
            return None
        link = self.links.of("all_to_all", ranks)
        of_head = ELEMENT * case.dim * dealt.slots  # bytes of a rank's tokens
        of_out, of_all = (
            bus_bytes("all_to_all", heads * of_head, ranks) for heads in (case.heads, case.heads + 2 * key_heads)
        )
        groups = groups_of_heads(key_heads // ranks, of_out, of_out + of_all, ranks * dealt.slots, case.dim)
        queries, all_heads = (groups * link.seconds(bytes_ / groups) for bytes_ in (of_out, of_all))
        passes = zip(
            self.compute(max(dealt.local), case.heads),
            self.compute(sum(dealt.shared), case.heads / ranks),
            ((all_heads, queries), (queries, all_heads)),
            strict=True,
        )
        return sum(
            until_computed(local, shared, come, groups) + exposed(shared, go, groups)
            for local, shared, (come, go) in passes
        )

    def by_heads_and_keys(self, length: int, ranks: int) -> float | None:
        """One document, heads exchanged within each node, the keys of a rank's heads gathered between nodes."""
        node = self.links.node
        if ranks <= node or ranks % node or self.case.heads % node:
            return None
        nodes = ranks // node
        key_heads = max(1, self.case.key_heads // node)
        of_rank = Attention(self.case.row, self.case.heads // node, key_heads, self.case.dim)
        between = Context(of_rank, self.seconds_per_pair, self.links._replace(node=1))
        seconds = between.by_keys(deal_one_document(length, nodes), nodes)
        within = Context(self.case, 0.0, self.links).by_heads(deal_one_document(length // nodes, node), node)
        return None if within is None else seconds + within


def pairs_of(row: Row) -> float:
    return sum(deal(row, 1).local)


def contexts(records: Records, links: Links) -> list[tuple[Context, float]]:
    """Those of the cases of the set "operator", and the seconds of one rank."""
    found = []
    for (_, impl), row in newest(records, "operator").items():
        if impl == ALONE:
            case = Attention(**row["problem"] | {"row": Row(**row["problem"]["row"])})
            seconds = row["ms"] / 1e3
            found.append((Context(case, seconds / pairs_of(case.row) / case.heads, links), seconds))
    return found


# ---------------------------------------------------------------- tables

Table = list[list[str]]


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f}"


def beside(predicted: float | None, measured: float | None) -> str:
    return percent(predicted) + ("" if measured is None else f" ({percent(measured)})")


def measured_efficiency(records: Records, set_name: str) -> dict[tuple[str, str, int], float]:
    rows = [row for row in records if row["set"] == set_name and "efficiency" in row]
    return {(row["case"], row["impl"], row["ranks"]): row["efficiency"] for row in rows}


def context_table(records: Records, links: Links) -> Table:
    """One row over ranks, and the layers over it."""
    header = ["one row over ranks", "ranks", "tokens that travel", "balance, keys", "balance, heads"]
    table = [[*header, "keys", "heads", "layer, keys", "layer, heads"]]
    of_operator, of_layer = (measured_efficiency(records, name) for name in ("operator", "layer"))
    layers = [row for (_, impl), row in newest(records, "layer").items() if impl == ALONE]
    for context, alone in contexts(records, links):
        case = context.case
        over_it = [row for row in layers if is_layer_over(row, case)]
        for ranks in RANKS:
            if case.row.length / ranks < FEWEST_TOKENS:
                break
            dealt = deal(case.row, ranks)
            balances = [percent(dealt.balance(method)) for method in ("keys", "heads")]
            cells = [case.name, str(ranks), percent(dealt.slots * ranks / case.row.length), *balances]
            seconds = {"keys": context.by_keys(dealt, ranks), "heads": context.by_heads(dealt, ranks)}
            for method, spent in seconds.items():
                predicted = None if spent is None else alone / (ranks * spent)
                cells.append(beside(predicted, of_operator.get((case.name, method, ranks))))
            for method, spent in seconds.items():
                if not over_it or spent is None:
                    cells.append("")
                    continue
                whole = over_it[0]["ms"] / 1e3
                predicted = whole / (whole - alone + ranks * spent)
                cells.append(beside(predicted, of_layer.get((over_it[0]["case"], method, ranks))))
            table.append(cells)
    return table


def is_layer_over(row: dict[str, Any], case: Attention) -> bool:
    layer = ContextLayer(**row["problem"] | {"row": Row(**row["problem"]["row"])})
    heads = layer.embedding_dim // layer.dim
    return (layer.row, heads, layer.key_heads, layer.dim) == (case.row, case.heads, case.key_heads, case.dim)


def growing_table(records: Records, links: Links) -> Table:
    """One document that grows with the ranks."""
    table = [["one document, tokens a rank", "ranks", "keys", "heads", "heads in nodes, keys between"]]
    for context, _ in contexts(records, links):
        if context.case.row.mean:
            continue
        for ranks in RANKS:
            length = context.case.row.length * ranks
            dealt = deal_one_document(length, ranks)
            ideal = sum(context.compute(length**2 / 2 / ranks, context.case.heads))
            name = f"H{context.case.heads}:{context.case.key_heads} S{context.case.row.length} a rank"
            seconds = (
                context.by_keys(dealt, ranks),
                context.by_heads(dealt, ranks),
                context.by_heads_and_keys(length, ranks),
            )
            table.append([name, str(ranks), *(percent(spent and ideal / spent) for spent in seconds)])
    return table


def tensor_table(records: Records, links: Links) -> Table:
    """Two sums over ranks: both exposed, or of the first half, the other half and the second hidden."""
    table = [["a layer's heads over ranks", "ranks", "serial", "overlap"]]
    measured = measured_efficiency(records, "tensor")
    for (case, impl), row in newest(records, "tensor").items():
        for ranks in RANKS:
            if impl != ALONE or ranks > links.node:
                continue
            size = row["tokens"] * row["embedding_dim"] * ELEMENT
            link, ideal = links.of("all_reduce", ranks), row["ms"] / 1e3 / ranks
            cells = [case, str(ranks)]
            for plan, exposed in (
                ("serial", 2 * link.seconds(bus_bytes("all_reduce", size, ranks))),
                ("overlap", link.seconds(bus_bytes("all_reduce", size / 2, ranks))),
            ):
                cells.append(beside(ideal / (ideal + exposed), measured.get((case, plan, ranks))))
            table.append(cells)
    return table


def step_table(records: Records, links: Links) -> Table:
    """FSDP2 with rows of their own: each layer's weights are gathered twice and its gradients scattered once, beside
    the layers' work but for the first gather of each pass and the last scatter."""
    table = [["a training step, rows of their own", "ranks", "FSDP2"]]
    measured = measured_efficiency(records, "step")
    for (case, impl), row in newest(records, "step").items():
        if impl != ALONE or "parameters" not in row:
            continue
        weights, layers, alone = row["parameters"] / row["layers"], row["layers"], row["ms"] / 1e3
        for ranks in RANKS:
            gather = links.of("all_gather", ranks).seconds(bus_bytes("all_gather", ELEMENT * weights, ranks))
            scatter_bytes = bus_bytes("reduce_scatter", FLOAT * weights, ranks)
            scatter = links.of("reduce_scatter", ranks).seconds(scatter_bytes)
            forward = gather + max(alone / 3, (layers - 1) * gather)
            backward = gather + max(2 * alone / 3, (layers - 1) * (gather + scatter)) + scatter
            predicted = alone / (forward + backward)
            table.append([case, str(ranks), beside(predicted, measured.get((case, "FSDP2", ranks)))])
    return table


def link_table(links: Links) -> Table:
    table = [["collective", "latency, us", "bandwidth, GB/s"]]
    for name, link in (links.of_node | {"between nodes (assumed)": links.network}).items():
        table.append([name, f"{1e6 * link.latency:.0f}", f"{link.bandwidth / 1e9:.0f}"])
    return table


def markdown(table: Table) -> str:
    header, *rows = table
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def read(paths: list[Path]) -> Records:
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=Path, nargs="+", default=[ROOT / "results" / "scale.jsonl"])
    parser.add_argument("--test", type=Path, nargs="+", default=[], help="records to compare with, not to fit")
    parser.add_argument("--node", type=int, default=8, help="ranks within a node")
    parser.add_argument("--network-gbps", type=float, default=42.0, help="GB/s a rank, between nodes")
    parser.add_argument("--network-us", type=float, default=60.0, help="latency of a collective between nodes")
    arguments = parser.parse_args()
    records = read(arguments.records)
    missing = [name for name in COLLECTIVES if not any(row.get("collective") == name for row in records)]
    if missing:
        parser.error(f"--records: expected rows of the set primitives, got none of {', '.join(missing)}")
    network = Link(arguments.network_us / 1e6, arguments.network_gbps * 1e9)
    links = fit_links(records, network, arguments.node)
    known = records + [row for row in read(arguments.test) if "efficiency" in row]
    print("Efficiency, percent: predicted (measured)\n")
    for table in (
        link_table(links),
        context_table(known, links),
        growing_table(records, links),
        tensor_table(known, links),
        step_table(known, links),
    ):
        print(markdown(table) + "\n")


if __name__ == "__main__":
    main()
