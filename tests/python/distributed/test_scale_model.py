"""Promise: the model of scale.py's times finds the rates in records, and predicts from them what its formulas say."""

import dataclasses
import sys

import pytest
from support import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import scale_model
from scale_contenders import Attention, Row
from scale_model import Context, Link, Links, deal
from scale_sets import COLLECTIVES, bus_bytes

ONE_DOCUMENT = Attention(Row(4096), 8, 2, 64)
DOCUMENTS = Attention(Row(4096, 256), 8, 2, 64)
SECONDS_PER_PAIR = 1e-10
LINK = Link(20e-6, 200e9)
FREE = Link(0.0, float("inf"))


def context(case: Attention, link: Link) -> Context:
    return Context(case, SECONDS_PER_PAIR, Links(dict.fromkeys(COLLECTIVES, link), Link(60e-6, 40e9), node=8))


def records() -> list[dict]:
    """Of two ranks whose collectives take latency + bytes / bandwidth, and whose operator reaches 80 %."""
    rows = []
    for collective in COLLECTIVES:
        for size in (2**20, 2**24, 2**28):
            seconds = LINK.seconds(bus_bytes(collective, size, 2))
            rows.append({"set": "primitives", "case": f"{collective} {size}", "impl": "alone", "ms": 1e3 * seconds})
            rows[-1] |= {"collective": collective, "bytes": size}
    for case in (ONE_DOCUMENT, DOCUMENTS):
        problem = dataclasses.asdict(case)
        rows.append({"set": "operator", "case": case.name, "impl": "one rank", "ms": 2.0, "problem": problem})
        rows.append({"set": "operator", "case": case.name, "impl": "keys", "ms": 1.25, "efficiency": 0.8})
    return [{"ranks": 2, "date": "2026-01-01"} | row for row in rows]


def test_rates_are_those_of_the_records() -> None:
    links = scale_model.fit_links(records(), FREE, node=8)
    for name in COLLECTIVES:
        assert links.of_node[name] == pytest.approx(LINK, rel=1e-6)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("case", [ONE_DOCUMENT, DOCUMENTS], ids=["one document", "documents"])
def test_without_communication_only_the_balance_is_lost(case: Attention, ranks: int) -> None:
    free, dealt = context(case, FREE), deal(case.row, ranks)
    pairs = sum(n * (n + 1) / 2 for n in case.row.lengths())
    assert sum(dealt.local) + sum(dealt.shared) == pytest.approx(pairs)
    assert (sum(dealt.local) > 0) == (case is DOCUMENTS)
    alone = SECONDS_PER_PAIR * case.heads * pairs
    for method, seconds in (("keys", free.by_keys(dealt, ranks)), ("heads", free.by_heads(dealt, ranks))):
        assert alone / (ranks * seconds) == pytest.approx(dealt.balance(method)) and 0.5 < dealt.balance(method) <= 1


@pytest.mark.parametrize(
    ("case", "groups"), [(ONE_DOCUMENT, 1), (Attention(Row(131072), 16, 8, 128), 2)], ids=["one group", "two groups"]
)
def test_what_nothing_hides_is_added(case: Attention, groups: int) -> None:
    """Of each pass the first group of heads to come, and the last to go."""
    dealt = deal(case.row, 2)
    linked, free = context(case, LINK), context(case, FREE)
    of_head = 2 * case.dim * case.row.length / 2  # bytes of a rank's tokens: bfloat16
    keys = 2 * case.key_heads * of_head  # of the other rank
    every = case.heads * of_head + keys
    for seconds, bytes_ in (
        (linked.by_keys(dealt, 2) - free.by_keys(dealt, 2), (keys, keys, keys)),
        (linked.by_heads(dealt, 2) - free.by_heads(dealt, 2), [x / 2 for x in (every, every - keys) * 2]),
    ):
        assert seconds == pytest.approx(sum(20e-6 + x / groups / 200e9 for x in bytes_))


def test_many_ranks_need_heads_within_nodes() -> None:
    many = context(Attention(Row(16384), 64, 8, 128), LINK)
    dealt = scale_model.deal_one_document(64 * 16384, 64)
    assert many.by_heads_and_keys(64 * 16384, 64) < many.by_keys(dealt, 64)
    assert many.by_heads_and_keys(8 * 16384, 8) is None
    assert many.by_heads(scale_model.deal_one_document(128 * 16384, 128), 128) is None


def test_tables_show_predicted_beside_measured() -> None:
    links = scale_model.fit_links(records(), FREE, node=8)
    table = scale_model.context_table(records(), links)
    assert [row[:2] for row in table[1:]] == [[c.name, n] for c in (ONE_DOCUMENT, DOCUMENTS) for n in ("2", "4")]
    keys = table[0].index("keys")
    assert all(row[keys].endswith(" (80)") for row in table if row[1] == "2") and "(" not in table[2][keys]
    assert len({len(row) for row in table}) == 1
    assert scale_model.markdown(table).count("\n") == len(table)
