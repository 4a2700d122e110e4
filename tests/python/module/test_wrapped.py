"""Promise: what is wrapped around a projection or a norm of the layer counts, in values, gradients and TorchScript."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from support import reference
from support.plain_module import plain_forward
from support.problems import error, make_ids
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from selfattn import RMSNorm, SelfAttention, SelfAttentionConfig

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
NORMS = ("q_norm", "k_norm")
TOLERANCE = 1e-10


def make_layer(**changes) -> SelfAttention:
    config = SelfAttentionConfig(head_dim=8, num_kv_heads=2, qk_norm=True, use_bias=True, sinks=True, **changes)
    layer = SelfAttention(32, config, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layer


def make_input() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 9, 32, dtype=torch.float64, requires_grad=True), make_ids("packed", 2, 9)


class ByParts(nn.Module):
    """The layer as a user writes it: every submodule is called, attention is the plain formula."""

    def __init__(self, layer: SelfAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, segment_ids: Tensor) -> Tensor:
        layer = self.layer
        heads = {}
        for name, norm in (("q_proj", layer.q_norm), ("k_proj", layer.k_norm), ("v_proj", None)):
            projected = getattr(layer, name)(x)
            heads[name] = projected if norm is None else norm(projected.unflatten(-1, (-1, layer.head_dim))).flatten(2)
        attention = copy.copy(layer)
        attention.qk_norm = False
        identity = {"out_proj.weight": torch.eye(32, dtype=x.dtype), "sinks": layer.sinks}
        # The formula takes projections of an input: here they are columns of one that holds all three.
        joined = torch.cat(list(heads.values()), dim=-1)
        starts = torch.eye(joined.shape[-1], dtype=x.dtype).split([part.shape[-1] for part in heads.values()])
        identity |= {f"{name}.weight": rows for name, rows in zip(heads, starts, strict=True)}
        return layer.out_proj(plain_forward(attention, identity, joined, segment_ids))


class LowRank(nn.Module):
    """An adapter beside a projection, as PEFT replaces modules."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(rank, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Subclass(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


class TensorSubclass(Tensor):
    """Counts its uses in linear; what a quantised weight is."""

    uses = 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            cls.uses += 1
        return super().__torch_function__(function, types, args, kwargs or {})


def replace(layer: SelfAttention, name: str) -> None:
    setattr(layer, name, LowRank(getattr(layer, name)))


def hook_forward(layer: SelfAttention, name: str) -> None:
    getattr(layer, name).register_forward_hook(lambda module, inputs, output: output.sin())


def hook_before(layer: SelfAttention, name: str) -> None:
    getattr(layer, name).register_forward_pre_hook(lambda module, inputs: (inputs[0].sin(),))


def hook_backward(layer: SelfAttention, name: str) -> None:
    getattr(layer, name).register_full_backward_hook(lambda module, grads, outputs: (grads[0] * 1.5,))


def hook_before_backward(layer: SelfAttention, name: str) -> None:
    getattr(layer, name).register_full_backward_pre_hook(lambda module, outputs: (outputs[0] * 1.5,))


def replace_forward(layer: SelfAttention, name: str) -> None:
    module = getattr(layer, name)
    module.forward = lambda x: type(module).forward(module, x).sin()


def subclass(layer: SelfAttention, name: str) -> None:
    linear = getattr(layer, name)
    replacement = Subclass(linear.in_features, linear.out_features, dtype=torch.float64)
    replacement.load_state_dict(linear.state_dict())
    setattr(layer, name, replacement)


WRAPPERS: dict[str, Callable[[SelfAttention, str], object]] = {
    "replaced": replace,
    "forward_hook": hook_forward,
    "forward_pre_hook": hook_before,
    "backward_hook": hook_backward,
    "backward_pre_hook": hook_before_backward,
    "own_forward": replace_forward,
    "subclass": subclass,
    "parametrization": lambda layer, name: parametrize.register_parametrization(
        getattr(layer, name), "weight", Doubled()
    ),
    "weight_norm_hook": lambda layer, name: torch.nn.utils.weight_norm(getattr(layer, name)),
    "weight_norm": lambda layer, name: parametrizations.weight_norm(getattr(layer, name)),
    "spectral_norm": lambda layer, name: torch.nn.utils.spectral_norm(getattr(layer, name)).eval(),
    "prune": lambda layer, name: prune.l1_unstructured(getattr(layer, name), "weight", amount=0.4),
}
OF_NORMS = ("forward_hook", "forward_pre_hook", "backward_hook", "backward_pre_hook", "own_forward", "parametrization")
CASES = [
    *((wrapper, (name,)) for wrapper in WRAPPERS for name in PROJECTIONS),
    *((wrapper, ("q_proj", "v_proj")) for wrapper in WRAPPERS),
    *((wrapper, (name,)) for wrapper in OF_NORMS for name in NORMS),
]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("wrapper", "names"), CASES, ids=str)
def test_layer_equals_its_parts(wrapper: str, names: tuple[str, ...]) -> None:
    layer = make_layer()
    x, ids = make_input()
    plain = layer(x, segment_ids=ids)
    for name in names:
        WRAPPERS[wrapper](layer, name)
    grad = torch.randn_like(x)
    results = []
    for forward in (lambda: layer(x, segment_ids=ids), lambda: ByParts(layer)(x, ids)):
        out = forward()
        leaves = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
        results.append((out, torch.autograd.grad(out, leaves, grad)))
    (out, grads), (expected, expected_grads) = results
    assert error(out, expected) < TOLERANCE
    for found, oracle in zip(grads, expected_grads, strict=True):
        assert error(found, oracle) < TOLERANCE
    if "backward" not in wrapper and wrapper not in ("weight_norm", "weight_norm_hook"):
        assert error(out, plain) > 1e-3  # and it changes something


def test_plain_layer_is_one_operator() -> None:
    layer = make_layer()
    assert layer._is_plain()
    with torch.profiler.profile() as profile:
        layer(torch.randn(1, 4, 32, dtype=torch.float64))
    names = {event.key for event in profile.key_averages()}
    assert "selfattn::self_attention" in names
    assert "selfattn::projected_attention" not in names


@pytest.mark.parametrize("name", ["out_proj", "q_norm", "k_proj"])
def test_what_is_plain_stays_fused(name: str) -> None:
    layer = make_layer()
    hook_forward(layer, name)
    with torch.profiler.profile() as profile:
        layer(torch.randn(1, 4, 32, dtype=torch.float64))
    names = {event.key for event in profile.key_averages()}
    assert "selfattn::projected_attention" in names
    assert ("selfattn::project_query_key_value" in names) == (name != "k_proj")
    assert ("aten::rms_norm" in names) == (name == "q_norm")


def test_hooks_for_every_module_fire() -> None:
    layer, seen = make_layer(), []
    x, ids = make_input()
    expected = layer(x, segment_ids=ids)
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, out: seen.append(module))
    try:
        out = layer(x, segment_ids=ids)
    finally:
        handle.remove()
    assert error(out, expected) < TOLERANCE
    assert {id(module) for module in seen} == {id(module) for module in layer.modules()}


def test_weights_of_another_class_are_called() -> None:
    layer = make_layer()
    x, ids = make_input()
    expected = layer(x, segment_ids=ids)
    weight = layer.v_proj.weight.detach().as_subclass(TensorSubclass)
    layer.v_proj.weight = nn.Parameter(weight)
    TensorSubclass.uses = 0
    assert error(layer(x, segment_ids=ids).as_subclass(Tensor), expected) < TOLERANCE
    assert TensorSubclass.uses == 2  # v_proj and, of its result, out_proj


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_norm_around_one_gives_the_same_called_alone(dtype: torch.dtype) -> None:
    config = SelfAttentionConfig(head_dim=8, qk_norm=True, norm_unit_offset=True)
    layer = SelfAttention(32, config, dtype=dtype)
    assert not layer.q_norm.weight.any()
    with torch.no_grad():
        for norm in (layer.q_norm, layer.k_norm):
            norm.weight.copy_(0.01 * torch.randn(8))
    assert layer._is_plain()
    x = torch.randn(2, 9, 32, dtype=dtype, requires_grad=True)
    leaves, grad = [x, *layer.parameters()], torch.randn(2, 9, 32, dtype=dtype)
    fused = layer(x)
    grads = torch.autograd.grad(fused, leaves, grad)
    layer.q_norm.register_forward_hook(lambda module, inputs, output: output)
    called = layer(x)
    tolerance = TOLERANCE if dtype == torch.float64 else 2e-2
    assert error(called, fused) < tolerance
    for one, other in zip(torch.autograd.grad(called, leaves, grad), grads, strict=True):
        assert error(one, other) < tolerance


@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rms_norm_is_its_formula(dtype: torch.dtype, unit_offset: bool) -> None:
    norm = RMSNorm(16, eps=1e-3, unit_offset=unit_offset, dtype=dtype)
    assert torch.equal(norm.weight, torch.full((16,), 0.0 if unit_offset else 1.0, dtype=dtype))
    with torch.no_grad():
        norm.weight.add_(0.1 * torch.randn(16))
    x = torch.randn(3, 5, 16, dtype=dtype)
    expected = reference.rms_norm(x, norm.weight.double() + unit_offset, 1e-3)
    assert norm(x).dtype == dtype
    assert error(norm(x), expected) < {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 8e-3}[dtype]


@pytest.mark.parametrize("change", ["eps", "one_eps", "no_eps", "replaced", "without_weight"])
def test_changed_norm_counts(change: str) -> None:
    layer = make_layer()
    x, ids = make_input()
    before = layer(x, segment_ids=ids)
    if change == "eps":
        layer.q_norm.eps = layer.k_norm.eps = 0.5
    elif change == "one_eps":
        layer.q_norm.eps = 0.5
    elif change == "no_eps":
        layer.q_norm.eps = layer.k_norm.eps = None
    elif change == "replaced":
        layer.k_norm = nn.LayerNorm(8, dtype=torch.float64)
    else:
        layer.q_norm = nn.RMSNorm(8, eps=1e-6, elementwise_affine=False)
    out = layer(x, segment_ids=ids)
    assert error(out, ByParts(layer)(x, ids)) < TOLERANCE
    assert change == "no_eps" or error(out, before) > 1e-3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("unit_offset", [False, True])
def test_script_and_graph_of_norms_of_projections(unit_offset: bool) -> None:
    config = {"qk_norm": True, "qk_norm_scope": "projection", "norm_unit_offset": unit_offset}
    layer = SelfAttention(32, SelfAttentionConfig(head_dim=8, num_kv_heads=2, **config), dtype=torch.float64)
    x, ids = make_input()
    expected = layer(x, segment_ids=ids)
    assert error(torch.jit.script(layer)(x, segment_ids=ids), expected) < TOLERANCE
    torch.compiler.reset()
    assert error(torch.compile(layer, backend="aot_eager", fullgraph=True)(x, segment_ids=ids), expected) < TOLERANCE
    exported = torch.export.export(layer, (x,), {"segment_ids": ids}).module()
    assert error(exported(x, segment_ids=ids), expected) < TOLERANCE


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("names", [(), ("q_proj",), ("out_proj",), ("v_proj", "q_norm")], ids=str)
def test_script_takes_the_layer_as_it_is(names: tuple[str, ...]) -> None:
    layer = make_layer()
    for name in names:
        if name in NORMS:
            setattr(layer, name, nn.LayerNorm(8, dtype=torch.float64))
        else:
            replace(layer, name)
    x, ids = make_input()
    script = torch.jit.script(layer)
    file = io.BytesIO()
    torch.jit.save(script, file)
    file.seek(0)
    for scripted in (script, torch.jit.load(file)):
        assert error(scripted(x, segment_ids=ids), layer(x, segment_ids=ids)) < TOLERANCE


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_layer_takes_wrappers(backend: str) -> None:
    layer = make_layer()
    replace(layer, "q_proj")
    hook_forward(layer, "v_proj")
    x, ids = make_input()
    torch.compiler.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    assert error(compiled(x, segment_ids=ids), layer(x, segment_ids=ids)) < TOLERANCE


@pytest.mark.filterwarnings("ignore")
def test_dynamically_quantised_layer() -> None:
    config = SelfAttentionConfig(head_dim=8, qk_norm=True)
    layer = SelfAttention(32, config).eval()
    quantised = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8)
    assert all(type(getattr(quantised, name)) is not nn.Linear for name in PROJECTIONS)
    x, ids = torch.randn(2, 9, 32), make_ids("packed", 2, 9)
    out, expected = quantised(x, segment_ids=ids), layer(x, segment_ids=ids)
    assert 0 < error(out, expected) < 0.1


def test_functional_call_and_copies() -> None:
    layer = make_layer()
    x, ids = make_input()
    others = {name: tensor + 0.1 for name, tensor in layer.state_dict().items()}
    out = torch.func.functional_call(layer, others, (x,), {"segment_ids": ids})
    other = copy.deepcopy(layer)
    other.load_state_dict(others)
    assert error(out, other(x, segment_ids=ids)) < TOLERANCE
    for restored in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        assert error(restored(x, segment_ids=ids), out) < TOLERANCE
        assert restored._is_plain()
        restored.q_proj.reset_parameters()  # of its own weights, not of those that it was copied from
        assert not torch.equal(restored.q_proj.weight, other.q_proj.weight)


def test_state_dict_has_no_more_names() -> None:
    assert set(make_layer().state_dict()) == {
        *(f"{name}.{kind}" for name in PROJECTIONS for kind in ("weight", "bias")),
        *(f"{name}.weight" for name in NORMS),
        "sinks",
    }


@pytest.mark.parametrize("order", ["parents_first", "children_first", "children_alone"])
def test_parameters_made_on_meta_get_the_layers_initialisation(order: str) -> None:
    config = SelfAttentionConfig(head_dim=64, num_layers=12, use_bias=True, qk_norm=True)
    with torch.device("meta"):
        layer = SelfAttention(512, config)
    layer.to_empty(device="cpu")
    for parameter in layer.parameters():
        nn.init.constant_(parameter, float("nan"))
    modules = list(layer.modules())
    modules = modules[1:] if order == "children_alone" else modules if order == "parents_first" else modules[::-1]
    for module in modules:
        module.reset_parameters()
    expected = {"out_proj": 1 / 12 / 512**0.5} | dict.fromkeys(("q_proj", "k_proj", "v_proj"), (2 / (5 * 512)) ** 0.5)
    for name, std in expected.items():
        projection = getattr(layer, name)
        assert projection.weight.std().item() == pytest.approx(std, rel=0.05)
        assert not projection.bias.any()
    for name in NORMS:
        assert torch.equal(getattr(layer, name).weight, torch.ones(64))


def test_weight_on_another_device_is_named() -> None:
    layer = make_layer()
    layer.k_proj.to("meta")
    with pytest.raises(TypeError, match=r"k_weight must be on the device of x, cpu; got meta"):
        layer(torch.randn(1, 4, 32, dtype=torch.float64))


@pytest.mark.parametrize(
    "hooks", [name for name in vars(nn.Module()) if name.endswith("ward_hooks") or name.endswith("ward_pre_hooks")]
)
def test_every_kind_of_hook_is_seen(hooks: str) -> None:
    """Of those that a module of this PyTorch has."""
    layer = make_layer()
    getattr(layer.k_proj, hooks)[0] = lambda *arguments: None
    assert not layer._is_plain()
