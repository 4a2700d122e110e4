"""Where a run is computed: in one process, or on the ranks that torchrun started. Both take the same steps.

Nothing else of the example knows how many ranks there are, nor which axes they form.
"""

import os
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from packing import IGNORED_TARGET, PackedRows
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

import selfattn
import selfattn.distributed

AXES = {
    "data": "other rows, the same weights",
    "fsdp": "other rows, a shard of the weights",
    "context": "the same rows, some of their tokens",
    "model": "the same rows, some of the heads",
}
"""Of ``ParallelConfig``: what a rank has."""


class OneProcess:
    """Everything is here: what ``Ranks`` shares among its ranks and adds up again is whole already."""

    is_first = True
    """Whether this process reports."""
    data_ranks = 1
    """Ranks among which the rows of a step are shared."""
    description = ""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def spread(self, model: nn.Module) -> nn.Module:
        return model

    def parameter_groups(self, model: nn.Module) -> Iterable[Any]:
        """For an optimizer."""
        return model.parameters()

    def clip_gradients(self, model: nn.Module, max_norm: float) -> Tensor:
        """Returns the norm before."""
        return nn.utils.clip_grad_norm_(model.parameters(), max_norm)

    def share(self, rows: PackedRows) -> PackedRows:
        """What this rank computes of rows that all ranks have: some of them, and of these some tokens."""
        return self.own_tokens(self.own_rows(rows)).to(self.device)

    def own_rows(self, rows: PackedRows) -> PackedRows:
        return rows

    def own_tokens(self, rows: PackedRows) -> PackedRows:
        return rows

    def sum(self, share: Tensor) -> Tensor:
        """Over ranks, of what each has of its share."""
        return share

    def any(self, flags: Tensor) -> Tensor:
        """Whether each flag is set on any rank."""
        return flags

    def on_first(self, do: Callable[[], None]) -> None:
        """Once for all ranks, which wait for it."""
        do()

    def gather(self, model: nn.Module) -> dict[str, Tensor]:
        """The whole weights, on the first rank."""
        return model.state_dict()

    def close(self) -> None:
        """Ranks have nothing in common from here on."""


class Ranks(OneProcess):
    """The processes of one torchrun, over the axes of a ``ParallelConfig``.

    The gradient of a step is the same for every mix of axes: ``parallelize`` has gradients averaged over ranks with
    other rows and added up over ranks with other tokens, and each rank's loss is the sum over its own tokens, times
    ``data_ranks``, over the targets of the whole step.
    """

    def __init__(self, config: selfattn.ParallelConfig, device_type: str) -> None:
        self.config = config
        if device_type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        self.mesh = config.device_mesh(device_type)
        super().__init__(torch.device(device_type))
        data, fsdp, self.context = (self.axis(name) for name in ("data", "fsdp", "context"))
        self.data_ranks = data.size() * fsdp.size()
        self.data_rank = data.get_local_rank() * fsdp.size() + fsdp.get_local_rank()
        self.is_first = dist.get_rank() == 0
        sizes = ", ".join(f"{name}_axis_size {self.axis(name).size()}" for name in AXES)
        self.description = f"{dist.get_world_size()} ranks: {sizes}"

    def axis(self, name: str) -> dist.DeviceMesh:
        return self.mesh[getattr(self.config, f"{name}_axis_name")]

    def spread(self, model: nn.Module) -> nn.Module:
        return selfattn.distributed.parallelize(model, self.mesh, self.config)

    def parameter_groups(self, model: nn.Module) -> Iterable[Any]:
        return selfattn.distributed.parameter_groups(model.parameters())

    def clip_gradients(self, model: nn.Module, max_norm: float) -> Tensor:
        return selfattn.distributed.clip_grad_norm_(model.parameters(), max_norm)

    def own_rows(self, rows: PackedRows) -> PackedRows:
        """As many on every rank, for they wait for each other: where rows are missing, one that counts nothing."""
        index = torch.arange(self.data_rank, -(-len(rows) // self.data_ranks) * self.data_ranks, self.data_ranks)
        own = rows[index.clamp(max=len(rows) - 1)]
        own.targets[index >= len(rows)] = IGNORED_TARGET
        return own

    def own_tokens(self, rows: PackedRows) -> PackedRows:
        if self.context.size() == 1:
            return rows
        layout = self.config.context_layout(rows.segment_ids, self.mesh)
        return PackedRows(
            tokens=layout.shard(rows.tokens),
            targets=layout.shard(rows.targets, IGNORED_TARGET),
            segment_ids=layout.segment_ids,
            positions=layout.shard(rows.positions),
            context=layout,
        )

    def sum(self, share: Tensor) -> Tensor:
        total = share.to(self.device, copy=True)
        for name in ("data", "fsdp", "context"):  # ranks of the model axis have the same
            dist.all_reduce(total, group=self.axis(name).get_group())
        return total

    def any(self, flags: Tensor) -> Tensor:
        found = flags.to(self.device, torch.int32)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.bool()

    def on_first(self, do: Callable[[], None]) -> None:
        if self.is_first:
            do()
        dist.barrier()

    def gather(self, model: nn.Module) -> dict[str, Tensor]:
        return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def close(self) -> None:
        dist.destroy_process_group()


def add_options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group(
        "several ranks, under torchrun",
        "Sizes make the number of ranks; one may be -1, what the others leave. Without any, the rows of a step are "
        "shared among all ranks, or where they cannot be, the tokens of each row.",
    )
    for axis, share in AXES.items():
        what = f"with {share} (default: 1)"
        group.add_argument(f"--{axis}-axis-size", type=int, metavar="RANKS", help=what, default=SUPPRESS)


def find_ranks(arguments: Namespace, rows_per_step: int) -> OneProcess:
    """Those of this torchrun, over the axes that the options ask for; without either, this process.

    Raises SystemExit where the sizes do not make the number of ranks, or the rows of a step cannot be shared evenly.
    """
    names = [f"{axis}_axis_size" for axis in AXES]
    asked = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    if "WORLD_SIZE" not in os.environ and not asked:
        return OneProcess(torch.device(arguments.device))
    if not asked:
        asked = {"context_axis_size" if rows_per_step % int(os.environ["WORLD_SIZE"]) else "data_axis_size": -1}
    sizes = dict.fromkeys(names, 1) | asked
    shards_weights = sizes["fsdp_axis_size"] != 1 or sizes["context_axis_size"] != 1
    try:
        config = selfattn.ParallelConfig(
            **sizes,
            fsdp_modules=["Layer"] if shards_weights else [],
            fsdp_min_weight_size=1024,  # of small models, too; norms stay whole
        )
        ranks = Ranks(config, torch.device(arguments.device).type)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    if rows_per_step % ranks.data_ranks:
        raise SystemExit(
            f"--rows-per-step: expected a multiple of the {ranks.data_ranks} ranks of the data and fsdp axes, got "
            f"{rows_per_step}. Ranks of the context and model axes compute the same rows."
        )
    return ranks
