"""python -m selfattn.packing_report batch.pt: the report of the ids in a file."""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfattn.packing_report import packing_report
from selfattn.packing_report.visited import KERNELS


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m selfattn.packing_report",
        description="Says what a packed batch is: documents, padding, allowed pairs, visited blocks, and wrong ids.",
    )
    parser.add_argument("batch", type=Path, help="a file of torch.save: a tensor (B, S), or a dictionary with one")
    parser.add_argument("--key", default="segment_ids", help="of the dictionary (default: %(default)s)")
    parser.add_argument("--kv-key", help="of the dictionary, where the keys have ids of their own")
    parser.add_argument("--causal", action=argparse.BooleanOptionalAction, default=True, help="(default: --causal)")
    parser.add_argument("--window-left", type=int, default=-1, metavar="N", help="-1: unbounded (default)")
    parser.add_argument("--window-right", type=int, default=-1, metavar="N", help="-1: unbounded (default)")
    parser.add_argument(
        "--kernels", choices=KERNELS, default="cuda", help="whose blocks (default: cuda, which is sm90)"
    )
    parser.add_argument("--head-dim", type=int, default=128, metavar="D", help="(default: %(default)s)")
    parser.add_argument("--v-head-dim", type=int, metavar="D", help="(default: that of --head-dim)")
    parser.add_argument("--num-heads", type=int, default=1, metavar="N", help="for the FLOPs (default: %(default)s)")
    parser.add_argument("--num-kv-heads", type=int, metavar="N", help="(default: that of --num-heads)")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="draws a row into this file; needs matplotlib")
    parser.add_argument("--row", type=int, default=0, help="of the picture (default: %(default)s)")
    return parser


def find_ids(batch: Any, key: str, path: Path) -> Tensor:
    if isinstance(batch, Tensor):
        return batch
    if not isinstance(batch, dict):
        raise ValueError(f"{path} must hold a tensor or a dictionary of tensors; got {type(batch).__name__}")
    if key not in batch:
        entries = ", ".join(f"{name} {tuple(x.shape) if isinstance(x, Tensor) else ''}".strip()
                            for name, x in batch.items())  # fmt: skip
        raise ValueError(f"{path} has no entry {key!r}, choose one by --key; it has: {entries or 'none'}")
    return batch[key]


def load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # torch.load has no exception of its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is no file of tensors that torch.save wrote: {reason}") from error


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(arguments)
    try:
        batch = load(options.batch)
        if options.kv_key and isinstance(batch, Tensor):
            raise ValueError(f"{options.batch} holds one tensor, and --kv-key asks for a dictionary")
        report = packing_report(
            find_ids(batch, options.key, options.batch),
            causal=options.causal,
            kv_segment_ids=find_ids(batch, options.kv_key, options.batch) if options.kv_key else None,
            window_left=options.window_left,
            window_right=options.window_right,
            kernels=options.kernels,
            head_dim=options.head_dim,
            v_head_dim=options.v_head_dim,
            num_heads=options.num_heads,
            num_kv_heads=options.num_kv_heads,
        )
        print(report)
        if options.picture:
            report.draw(options.picture, row=options.row)
            print(f"\nPicture of row {options.row}: {options.picture}")
    except (ValueError, TypeError, IndexError, ImportError, OSError) as error:
        sys.exit(f"packing_report: {error}")


if __name__ == "__main__":
    main()
