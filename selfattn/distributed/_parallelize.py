"""The whole of a ``ParallelConfig``, applied to a model."""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper, checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

from selfattn.config import _AXES, _DTYPES, ParallelConfig
from selfattn.distributed._agreement import check_agreement
from selfattn.distributed._tensor_parallel import HeadsForward, TensorParallel
from selfattn.module import SelfAttention


def parallelize(model: nn.Module, mesh: DeviceMesh, config: ParallelConfig) -> nn.Module:
    """Spreads a model over the ranks of ``mesh`` as ``config`` says: tensor parallelism, then remat, then FSDP2 or DDP.

    Every rank calls it with the same model and configuration; the weights of the mesh's first rank count. Optimizers
    are made afterwards. Gradients are means over the data and fsdp axes of those of each rank's loss, and sums over the
    context axis, whose ranks have the loss of their own tokens, divided by the tokens of whole rows.

    * model axis: ``TensorParallel(overlap=config.tp_async_dense)`` for every ``SelfAttention`` that has no
      ``TensorParallel`` yet. The rest of the model is computed by every rank of the axis.
    * ``remat``: PyTorch's ``checkpoint_wrapper``.
    * fsdp axis, ``fsdp_modules`` or a dtype: ``fully_shard``, over the data axis as well where it has several ranks
      (HSDP). Inputs are not cast to ``fsdp_gather_dtype``, for rotary tables would be. Weights of fewer than
      ``fsdp_min_weight_size`` elements stay whole, with their dtype; their gradients are averaged when a backward pass
      ends.
    * context axis: every ``SelfAttention`` then needs the layout of its rows in each call (``context``). Weights are
      sharded over the ranks of this axis together with those of the fsdp axis.
    * data axis beside no other: ``DistributedDataParallel``.

    Args:
        model: modules with plain parameters on the mesh's device, or on "meta".
        mesh: of ``config.device_mesh``.
        config: see ``ParallelConfig``.

    Returns:
        The model, changed in place, or the wrapper around it that stands in its place.

    Raises:
        TypeError: an argument of another type; what ``TensorParallel`` does not serve.
        ValueError: axes that are not those of ``config``; names in ``remat`` or ``fsdp_modules`` that no module's class
            has; a model axis and no ``SelfAttention``; a layer whose own ``config.parallel`` asks for something else;
            a parameter on another device; ranks that disagree on model or configuration.
        NotImplementedError: a pipeline axis of several ranks.
    """
    _check_types(model, mesh, config)
    sizes = _axis_sizes(mesh, config)
    _check_model(model, mesh, config, sizes)
    _check_agreement(model, mesh, config)
    _broadcast_from_first(model, mesh)

    for layer in model.modules():
        if not isinstance(layer, SelfAttention):
            continue
        layer.context_method, layer.needs_context = config.context_method, sizes["context"] > 1
        if isinstance(layer._parallel_forward, HeadsForward):
            continue
        layer._parallel_forward = None
        if sizes["model"] > 1:
            parallelize_module(layer, mesh[config.model_axis_name], TensorParallel(overlap=config.tp_async_dense))
    model = _recompute(model, config.remat)
    shards = sizes["fsdp"] * sizes["context"]
    if shards > 1 or _asks_for_fsdp(config) or (sizes["data"] > 1 and sizes["model"] > 1):
        return _fully_shard(model, mesh, config, sizes)
    if sizes["data"] > 1:
        return DistributedDataParallel(model, process_group=mesh.get_group(config.data_axis_name))
    return model


def _asks_for_fsdp(config: ParallelConfig) -> bool:
    return bool(config.fsdp_modules or config.fsdp_gather_dtype or config.fsdp_grad_scatter_dtype)


def _check_types(model: nn.Module, mesh: DeviceMesh, config: ParallelConfig) -> None:
    expected = (("model", model, nn.Module), ("mesh", mesh, DeviceMesh), ("config", config, ParallelConfig))
    for name, value, kind in expected:
        if not isinstance(value, kind):
            raise TypeError(f"parallelize: {name}: expected a {kind.__name__}, got {type(value).__name__}")


def _axis_sizes(mesh: DeviceMesh, config: ParallelConfig) -> dict[str, int]:
    """Of the mesh, by the fields' names for the axes; checked."""
    if mesh.mesh_dim_names != config.axis_names:
        raise ValueError(
            f"parallelize: mesh: expected the axes {config.axis_names} of config.device_mesh(), "
            f"got {mesh.mesh_dim_names}"
        )
    named = dict(zip(mesh.mesh_dim_names, mesh.shape, strict=True))
    sizes = {axis: math.prod(named[name] for name in config._names_of(axis)) for axis in _AXES}
    for axis, size in sizes.items():
        asked = getattr(config, f"{axis}_axis_size")
        if asked not in (-1, size):
            raise ValueError(f"parallelize: mesh: expected config.{axis}_axis_size, {asked}, ranks, got {size}")
    asked, heads_axis = config.context_heads_size, config._names_of("context")[-1]
    if asked not in (1, named[heads_axis]):
        raise ValueError(
            f"parallelize: mesh: expected config.context_heads_size, {asked}, ranks, got {named[heads_axis]}"
        )
    if sizes["pipeline"] > 1:
        raise NotImplementedError(
            f"parallelize: config.pipeline_axis_size: expected 1, got {sizes['pipeline']}: split the whole model with "
            "torch.distributed.pipelining, and parallelize each stage over the other axes"
        )
    return sizes


def _check_model(model: nn.Module, mesh: DeviceMesh, config: ParallelConfig, sizes: dict[str, int]) -> None:
    classes = {type(module).__name__ for module in model.modules()}
    for field in ("remat", "fsdp_modules"):
        unknown = [name for name in getattr(config, field) if name not in classes]
        if unknown:
            raise ValueError(
                f"parallelize: config.{field}: expected class names of the model's modules, "
                f"{', '.join(sorted(classes))}; got {', '.join(unknown)}"
            )
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SelfAttention)}
    for axis in ("model", "context"):
        if sizes[axis] > 1 and not layers:
            raise ValueError(
                f"parallelize: model: expected a SelfAttention for the {axis} axis of {sizes[axis]} ranks, got none"
            )
    for name, layer in layers.items():
        request = layer.parallel.request_to("SelfAttention")
        if request is not None and layer.parallel != config:
            raise ValueError(
                f"parallelize: config: expected the one of layer {name!r}, which has {request}, got {config}"
            )
    for name, tensor in model.named_parameters():
        if tensor.device.type not in (mesh.device_type, "meta"):
            raise ValueError(
                f"parallelize: model: expected parameters on the mesh's {mesh.device_type}, got {name} on "
                f"{tensor.device}"
            )


def _check_agreement(model: nn.Module, mesh: DeviceMesh, config: ParallelConfig) -> None:
    parameters = [(name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in model.named_parameters()]
    check_agreement({"config": config, "parameters": parameters}, mesh)


def _broadcast_from_first(model: nn.Module, mesh: DeviceMesh) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        if isinstance(tensor, DTensor) or tensor.is_meta:
            continue
        for axis, size in enumerate(mesh.shape):
            if size > 1:
                dist.broadcast(tensor.detach(), group=mesh.get_group(axis), group_src=0)


def _recompute(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """The model with its modules of these classes wrapped, inner ones too."""
    modules = list(model.modules())
    wrapped = {module: checkpoint_wrapper(module) for module in modules if type(module).__name__ in names}
    for parent in modules:
        for name, child in parent._modules.items():
            parent._modules[name] = wrapped.get(child, child)
    return wrapped.get(model, model)


def _fully_shard(model: nn.Module, mesh: DeviceMesh, config: ParallelConfig, sizes: dict[str, int]) -> nn.Module:
    axes = [config.fsdp_axis_name]
    if sizes["context"] > 1:
        both = (config.fsdp_axis_name, *config._names_of("context"))
        axes = [mesh[both]._flatten().mesh_dim_names[0]]
    if sizes["data"] > 1:
        axes.insert(0, config.data_axis_name)
    whole = {p for p in model.parameters() if p.numel() < config.fsdp_min_weight_size}
    dtypes = (config.fsdp_gather_dtype, config.fsdp_grad_scatter_dtype)
    param_dtype, reduce_dtype = (None if name is None else _DTYPES[name] for name in dtypes)
    options = {
        "mesh": mesh[tuple(axes)],
        "mp_policy": MixedPrecisionPolicy(param_dtype, reduce_dtype, cast_forward_inputs=False),
        "ignored_params": whole,
    }
    wrappers = [module for module in model.modules() if isinstance(module, CheckpointWrapper)]
    recomputed = {wrapper._checkpoint_wrapped_module: wrapper for wrapper in wrappers}
    for module in reversed(list(model.modules())):  # children before parents
        if type(module).__name__ in config.fsdp_modules:
            fully_shard(recomputed.get(module, module), **options)
    if not isinstance(model, FSDPModule):
        fully_shard(model, **options)
    if sizes["context"] > 1:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(float(sizes["data"] * sizes["fsdp"]))
                if mesh.device_type == "cpu":
                    module.set_force_sum_reduction_for_comms(True)  # Gloo multiplies nothing within a sum
    groups = [mesh[axis].get_group() for axis in axes if mesh[axis].size() > 1]
    if groups:
        _average_gradients(model, config.fsdp_min_weight_size, groups, sizes["context"])
    return model


def _average_gradients(model: nn.Module, least: int, groups: list[dist.ProcessGroup], factor: int) -> None:
    """Has the gradients of weights below ``least`` elements, which FSDP2 leaves alone, averaged over ranks whenever a
    backward pass ends, times ``factor``: of ranks that share rows the sum counts.

    A gradient that is averaged already stays what it is: passes that accumulate give what one pass gives.
    """
    parameters: list[nn.Parameter] = []
    are_due = False

    def watch(*_: object) -> None:
        """At the first call: those of a model on meta have been replaced by then."""
        handle.remove()
        parameters.extend(p for p in model.parameters() if p.numel() < least and p.requires_grad)
        for parameter in parameters:
            if factor > 1:
                parameter.register_hook(lambda grad: grad * factor)
            parameter.register_post_accumulate_grad_hook(hook)

    handle = model.register_forward_pre_hook(watch)

    def average() -> None:
        nonlocal are_due
        are_due = False
        for dtype in dict.fromkeys(p.dtype for p in parameters):
            grads = [_local_gradient(p) for p in parameters if p.dtype == dtype]
            flat = torch.cat([grad.flatten() for grad in grads])
            for group in groups:
                dist.all_reduce(flat, group=group)
                flat /= group.size()
            for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(mean.view_as(grad))

    engine = Variable._execution_engine

    def hook(parameter: Tensor) -> None:
        nonlocal are_due
        if not are_due:
            are_due = True
            # Behind FSDP2's own callback, which a rank may queue earlier or later: collectives need one order.
            engine.queue_callback(lambda: engine.queue_callback(average))


def _local_gradient(parameter: nn.Parameter) -> Tensor:
    """This rank's, zero where its loss did not depend on the parameter."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
