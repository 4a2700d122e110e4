"""The score square of a row as a picture: allowed pairs over the blocks that the kernels visit."""

import textwrap
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from selfattn.packing_report.pairs import Runs, count_allowed_keys, find_runs

if TYPE_CHECKING:
    from selfattn.packing_report.report import PackingReport

_KERNELS = {"sm90": "CUDA", "sm80": "CUDA sm80", "cpu": "CPU"}
# Dark enough on paper, apart in grey and to the colour-blind.
NOT_VISITED = (1.0, 1.0, 1.0)
VISITED = (0.98, 0.82, 0.55)
ALLOWED = (0.09, 0.27, 0.52)
DOCUMENTS = ((0.45, 0.45, 0.45), (0.75, 0.75, 0.75))  # of the strips, in turn
PADDING = (0.86, 0.25, 0.2)

_WIDTH = 7.5  # inches
_CELLS = 900  # a side, at most
_SAMPLES = 3600  # tokens a side whose pairs are looked at, at most
_FAINTEST = 0.6  # how much of its colour a cell with few allowed pairs gets
_MOST_LINES = 48  # blocks a side whose edges are drawn
_MOST_NOTES, _NOTE_WIDTH = 3, 96  # characters


def score_square(report: "PackingReport", row: int) -> tuple[Tensor, int]:
    """The picture's colours, (query cells, key cells, 3), and the tokens a side of a cell.

    In a row of more than 3,600 tokens the pairs of a cell are sampled, evenly along both sides; visited blocks never
    are.
    """
    p = report.packing
    query_ids, key_ids = p.segment_ids[row], p.key_ids[row]
    length = max(report.query_length, report.key_length)
    cell = -(-length // _CELLS)
    stride = max(1, cell // max(1, _SAMPLES // -(-length // cell)))
    queries, keys = (torch.arange(0, size, stride) for size in (report.query_length, report.key_length))
    begin, end = (limit[queries, None] for limit in p.rules.key_limits(report.query_length, report.key_length))
    ids = query_ids[queries, None]
    allowed = (ids == key_ids[keys]) & (ids >= 0) & (keys >= begin) & (keys < end)
    shares = _mean_by(_mean_by(allowed.float(), queries // cell).T, keys // cell).T

    visited_blocks = p.visited(slice(row, row + 1)).matrix(0)
    query_cell, key_cell = (torch.arange(0, size, cell) for size in (report.query_length, report.key_length))
    key_blocks = key_cell // p.tiling.key_block
    last_query = (query_cell + cell).clamp(max=report.query_length) - 1
    first_tile = query_cell * p.tiling.group // p.tiling.query_tile
    last_tile = ((last_query + 1) * p.tiling.group - 1) // p.tiling.query_tile
    last_key_block = ((key_cell + cell).clamp(max=report.key_length) - 1) // p.tiling.key_block
    visited = torch.zeros(len(query_cell), len(key_cell), dtype=torch.bool)
    for tile in (first_tile, last_tile):  # a cell on an edge belongs to both
        for block in (key_blocks, last_key_block):
            visited |= visited_blocks[tile][:, block]

    ground, ink = (torch.tensor(colour) for colour in (VISITED, ALLOWED))
    colours = torch.where(visited[..., None], ground, torch.tensor(NOT_VISITED))
    weight = (_FAINTEST + (1 - _FAINTEST) * shares) * (shares > 0)
    return colours + weight[..., None] * (ink - colours), cell


def _mean_by(values: Tensor, group: Tensor) -> Tensor:
    """The mean of the rows of each group; groups are 0, 1, ... in order."""
    sums = torch.zeros(int(group[-1]) + 1, values.shape[1]).index_add_(0, group, values)
    return sums / torch.bincount(group)[:, None]


def draw(report: "PackingReport", path: str | PathLike, row: int) -> None:
    figure, _ = make_figure(report, row)
    figure.savefig(path, dpi=150)


def make_figure(report: "PackingReport", row: int = 0) -> tuple[Any, Any]:
    """A figure that no window shows, and the axes of the score square, whose units are tokens."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.legend_handler import HandlerTuple
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError(
            'selfattn: the picture of a packing needs matplotlib; install it with pip install "selfattn[report]"'
        ) from error
    if not 0 <= row < report.rows:
        raise IndexError(f"selfattn: row must be from 0 to {report.rows - 1}; got {row}")
    colours, cell = score_square(report, row)
    aspect = min(max(report.query_length / report.key_length, 0.3), 1.5)
    figure = Figure(figsize=(_WIDTH, _WIDTH * aspect * 0.9 + 1.6), layout="constrained")
    axes = figure.add_subplot()
    rows, columns = colours.shape[:2]
    axes.imshow(colours.numpy(), extent=(0, columns * cell, rows * cell, 0), interpolation="nearest", aspect="auto")
    axes.set(xlim=(0, report.key_length), ylim=(report.query_length, 0), xlabel="key", ylabel="query")
    axes.set_box_aspect(aspect)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda token, _: f"{token:,.0f}")
        axis.get_major_locator().set_params(integer=True)
    axes.tick_params(labelsize=8)
    _draw_block_edges(axes, report)
    p = report.packing
    _draw_strip(axes, find_runs(p.key_ids[row : row + 1]), p.key_ids[row], cell, is_horizontal=True)
    _draw_strip(axes, find_runs(p.segment_ids[row : row + 1]), p.segment_ids[row], cell, is_horizontal=False)

    size = f"{p.tiling.query_tile} x {p.tiling.key_block}"
    patches = [
        Patch(color=ALLOWED),
        Patch(color=VISITED),
        Patch(facecolor=NOT_VISITED, edgecolor="grey"),
        tuple(Patch(color=colour) for colour in DOCUMENTS),
        Patch(color=PADDING),
    ]
    labels = ["allowed pairs", f"visited blocks ({size}, {_KERNELS[p.tiling.kernels]} kernels)", "not visited",
              "documents, in turn dark and light", "padding"]  # fmt: skip
    figure.legend(patches, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False,
                  handler_map={tuple: HandlerTuple(ndivide=None, pad=0)})  # fmt: skip
    axes.set_title(_title(report, row), fontsize=9, loc="left")
    return figure, axes


def _title(report: "PackingReport", row: int) -> str:
    p = report.packing
    allowed, visited = _row_shares(report, row)
    lines = [f"Row {row} of {report.rows:,}, {p.rules}: allowed {allowed:.1%}, visited {visited:.1%}"]
    for note in report.notes[:_MOST_NOTES]:
        lines += textwrap.wrap(f"NOTE: {note}", _NOTE_WIDTH, max_lines=2, placeholder=" ...")
    return "\n".join(lines)


def _row_shares(report: "PackingReport", row: int) -> tuple[float, float]:
    p, part = report.packing, slice(row, row + 1)
    allowed = int(count_allowed_keys(p.segment_ids[part], p.key_ids[part], p.rules).sum())
    visited = int(p.visited(part).count())
    return allowed / (report.pairs // report.rows), visited / (report.blocks // report.rows)


def _draw_block_edges(axes: Any, report: "PackingReport") -> None:
    tiling = report.packing.tiling
    sides = (
        (axes.axhline, report.query_length, tiling.query_tile / tiling.group),
        (axes.axvline, report.key_length, tiling.key_block),
    )
    if all(length / size <= _MOST_LINES for _, length, size in sides):
        for draw_line, length, size in sides:
            for number in range(1, int(length / size) + 1):
                draw_line(number * size, color="black", linewidth=0.3, alpha=0.25)


def _draw_strip(axes: Any, runs: Runs, ids: Tensor, cell: int, is_horizontal: bool) -> None:
    """Documents and padding beside the axis, a cell's first token standing for it."""
    turn = (runs.is_first[0].cumsum(0) - 1) % 2
    colours = torch.tensor(DOCUMENTS)[turn]
    colours[ids < 0] = torch.tensor(PADDING)
    colours = colours[::cell].numpy()
    length = len(colours) * cell
    thickness = 0.018
    if is_horizontal:
        strip = axes.inset_axes((0, 1.006, 1, thickness), sharex=axes)
        strip.imshow(colours[None], extent=(0, length, 0, 1), aspect="auto", interpolation="nearest")
    else:
        strip = axes.inset_axes((1.006, 0, thickness, 1), sharey=axes)
        strip.imshow(colours[:, None], extent=(0, 1, length, 0), aspect="auto", interpolation="nearest")
    strip.tick_params(left=False, bottom=False, labelleft=False, labelbottom=False)
