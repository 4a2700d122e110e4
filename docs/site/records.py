"""What the site says of speed, from the records in benchmarks/results: one picture, and a table a record."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from plot import RESULTS, read_rows

Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """What is told of a record: ``field`` of the newest run of each case."""

    name: str
    title: str
    field: str
    unit: str
    digits: int = 0


TABLES = [
    Table("attention_h100", "Attention", "tflops", "TFLOP/s of allowed pairs"),
    Table("attention_families_h200", "Attention, each family of kernels", "tflops", "TFLOP/s of allowed pairs"),
    Table("module_h100", "The whole layer", "ms", "milliseconds", digits=2),
    Table("qk_norm_rope_h100", "qk_norm_rope", "gbps", "GB/s"),
    Table("finetune_hf_h200", "Fine-tuning with transformers", "ms", "milliseconds", digits=1),
    Table("lora_h200", "A layer with adapters", "ms", "milliseconds", digits=2),
    Table("scale_h200", "Two GPUs beside one", "efficiency", "the time of one GPU over twice that of two", digits=2),
    Table("attention_cpu", "Attention on the CPU", "ms", "milliseconds", digits=1),
    Table("decode_h200", "Attention over a KV cache", "us", "microseconds", digits=1),
    Table("decode_h200", "A stack of layers that decodes", "tokens_per_s", "tokens a second"),
    Table("decode_h200", "Host time over a KV cache", "host_us", "microseconds until a call returns", digits=1),
    Table("decode_cpu", "Attention over a KV cache on the CPU", "ms", "milliseconds", digits=1),
]
NAMES = {
    "selfattn": "selfattn",
    "sdpa_cudnn": "cuDNN",
    "fa2_varlen": "FlashAttention 2 (varlen)",
}
PICTURE = {
    "docs mean256 D128 S16384 B1": "documents,\nmean 256",
    "docs mean512 D128 S8192 B2": "documents,\nmean 512",
    "docs mean1024 D128 S16384 B1": "documents,\nmean 1,024",
    "docs mean4096 D128 S32768 B1": "documents,\nmean 4,096",
    "dense causal D128 S16384 B1": "one document\nof 16,384",
}
INKS = {"light": "#24292f", "dark": "#d0d7de"}
COLOURS = {"selfattn": "#2f6fdb", "sdpa_cudnn": "#9aa3af", "fa2_varlen": "#c9a15a"}


def kind_of(row: Row) -> str:
    """What a row measures, but its implementation."""
    threads = f"{row['threads']} thread{'s' * (row['threads'] > 1)}" if "threads" in row else None
    return ", ".join(filter(None, (row["case"], row.get("dtype"), row.get("family"), threads)))


def sources_of(rows: list[Row]) -> str:
    """Where and when rows were measured."""
    facts = []
    for what, field in (("", "device"), ("torch ", "torch"), ("commit ", "commit")):
        facts.append(what + ", ".join(dict.fromkeys(row[field] for row in rows)))
    days = sorted({row["date"][:10] for row in rows})
    return "; ".join([*facts, " to ".join(dict.fromkeys((days[0], days[-1])))])


def newest(rows: list[Row], field: str) -> dict[str, dict[str, dict[str, Row]]]:
    """pass -> case -> implementation -> row, of the newest run of the case."""
    found: dict[str, dict[str, dict[str, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in sorted((row for row in rows if row.get(field) is not None), key=lambda row: row["date"]):
        case = found[row.get("pass", "")][kind_of(row)]
        if any(other["commit"] != row["commit"] for other in case.values()):
            case.clear()
        case[row["impl"]] = row
    return found


def markdown(table: Table, rows: list[Row]) -> str:
    passes = newest(rows, table.field)
    told = [row for cases in passes.values() for impls in cases.values() for row in impls.values()]
    lines = [f"## {table.title}", "", f"{table.unit[:1].upper()}{table.unit[1:]}. {sources_of(told)}.", ""]
    for which, cases in passes.items():
        implementations = list(dict.fromkeys(impl for impls in cases.values() for impl in impls))
        lines += [
            f"| {which.replace('_', ' + ') or 'case'} | " + " | ".join(f"`{impl}`" for impl in implementations) + " |"
        ]
        lines += ["|---|" + "---:|" * len(implementations)]
        for case, impls in cases.items():
            values = (f"{impls[i][table.field]:.{table.digits}f}" if i in impls else "" for i in implementations)
            lines += [f"| {case} | " + " | ".join(values) + " |"]
        lines += [""]
    return "\n".join(lines)


def draw(passes: dict[str, dict[str, dict[str, Row]]], which: str, ink: str, path: Path) -> None:
    """The landing page's picture of one pass, in one colour of text and lines."""
    plt.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "selfattn"})
    figure, axes = plt.subplots(figsize=(5.2, 3.4), layout="constrained")
    for at, case in enumerate(PICTURE):
        for shift, (impl, row) in zip((-0.2, 0.2), passes[which][case].items(), strict=True):
            bar = axes.bar(at + shift, row["tflops"], 0.38, color=COLOURS[impl], label=NAMES[impl])
            axes.bar_label(bar, fmt="%.0f", fontsize=8, padding=1, color=ink)
    axes.set_title(which, fontsize=11, color=ink)
    axes.set_xticks(range(len(PICTURE)), PICTURE.values(), fontsize=7.5)
    axes.set_yticks([])
    axes.tick_params(colors=ink, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(ink)
    axes.margins(y=0.12)
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    figure.legend(
        once.values(), once.keys(), loc="outside lower center", ncols=3, fontsize=8, frameon=False, labelcolor=ink
    )
    figure.savefig(path, transparent=True, metadata={"Date": None})
    plt.close(figure)


def rows_of(table: Table) -> list[Row]:
    """Those that have its field: none while there is no record."""
    path = RESULTS / f"{table.name}.jsonl"
    return [row for row in read_rows(path) if row.get(table.field) is not None] if path.is_file() else []


def write(folder: Path) -> None:
    """All of it, for the pages to include."""
    folder.mkdir(parents=True, exist_ok=True)
    found = ((table, rows_of(table)) for table in TABLES)
    tables = (markdown(table, rows) for table, rows in found if rows)
    (folder / "tables.md").write_text("\n".join(tables))
    rows = [row for row in read_rows(RESULTS / "attention_h100.jsonl") if row["case"] in PICTURE]
    passes = newest(rows, "tflops")
    for which in passes:
        for theme, ink in INKS.items():
            draw(passes, which, ink, folder / f"{which}_{theme}.svg")
    (folder / "source.md").write_text(
        "TFLOP/s of allowed pairs, bfloat16, 16,384 tokens (32,768 of mean 4,096), head dimension 128, all in one run: "
        f"{sources_of(rows)}. [How it was measured](performance.md), [all records](records.md).\n"
    )
