"""Promise: a layer made from transformers' attention module computes what that module computes, with its weights."""

import copy
import importlib
import os
import subprocess
import sys
from collections.abc import Callable

import accelerate
import models
import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torchao import quantization
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaAttention

from selfattn import SelfAttention
from selfattn.integrations import _transformers_layers

LENGTHS = [11, 7, 1, 4]
LONG = 40  # beyond the windows, and the original length
TOLERANCE = 2e-6  # float64, but transformers rounds tables, softmax and norms to float32
LONGROPE = {
    "rope_type": "longrope",
    "partial_rotary_factor": 0.5,
    "short_factor": [1 + pair / 8 for pair in range(4)],
    "long_factor": [2.0 + pair for pair in range(4)],
}

# What else the configuration of a model may say: the model, its changes.
VARIANTS = {
    "llama_biases": ("llama", {"attention_bias": True}),
    "llama_theta": ("llama", {"rope_parameters": {"rope_theta": 500.0}}),
    "llama_ignores_partial": ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "llama_linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    "llama_dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 3.0}, "max_position_embeddings": 24},
    ),
    "llama_llama3": ("llama", {"rope_parameters": {**models.LLAMA3, **models.ORIGINAL}}),
    "llama_llama3_no_original": ("llama", {"rope_parameters": models.LLAMA3}),
    "qwen3_biases": ("qwen3", {"attention_bias": True}),
    "qwen3_yarn": ("qwen3", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, **models.ORIGINAL}}),
    "gpt_oss_yarn": (
        "gpt_oss",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "truncate": False,
                "beta_fast": 8.0,
                **models.ORIGINAL,
            }
        },
    ),
    "phi3_longrope": ("phi3", {"rope_parameters": LONGROPE, **models.ORIGINAL}),
    "gemma2_no_softcap": ("gemma2", {"attn_logit_softcapping": None, "attention_bias": True}),
    "gemma3_scaled": (
        "gemma3",
        {
            "attn_logit_softcapping": 3.0,  # which its attention never reads
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            },
        },
    ),
    "olmo3_yarn": (
        "olmo3",
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "rope_theta": 1e4,
                    "truncate": False,  # which transformers does not find there
                    **models.ORIGINAL,
                },
            },
        },
    ),
    "glm4_biases_linear": (
        "glm4",
        {
            "attention_bias": True,
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "partial_rotary_factor": 0.25},
        },
    ),
    "smollm3_sliding": (
        "smollm3",
        {
            "use_sliding_window": True,
            "sliding_window": models.WINDOW,
            "layer_types": ["sliding_attention"] * 2 + ["full_attention"] * 2,
        },
    ),
    "mistral_one_kv_head": ("mistral", {"num_key_value_heads": 1}),
}
CASES = {name: (name, {}) for name in models.NAMES + models.RELATIVES} | VARIANTS
every_case = pytest.mark.parametrize("case", CASES)
DEPEND_ON_LENGTH = ("llama_dynamic", "phi3_longrope")


def build(case: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    name, changes = CASES[case]
    if not changes:
        return models.build(name, "eager").to(dtype)
    model = models.initialise(name, "eager", 4, copy.deepcopy(changes))
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name or parameter_name.endswith(("bias", "sinks")):
            nn.init.normal_(parameter, parameter.detach().mean().item(), 0.3)
    return model.to(dtype)


def some_attention(case: str = "qwen3", index: int = 0) -> nn.Module:
    return build(case).model.layers[index].self_attn


def attention_calls(model: nn.Module, **inputs: Tensor) -> list[tuple[nn.Module, dict]]:
    """Each attention module of a model, and what it is called with: mask, tables. The model runs in float32, for which
    masks and all layers are made."""
    calls, dtype = [], model.dtype
    handles = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append((module, kwargs)), with_kwargs=True
        )
        for layer in model.model.layers
    ]
    model.float()
    with torch.no_grad():
        model.model(**inputs, use_cache=False)
    model.to(dtype)
    for handle in handles:
        handle.remove()
    assert len(calls) == 4 and all("hidden_states" in kwargs for _, kwargs in calls)

    def cast(value: object) -> object:
        if isinstance(value, tuple):
            return tuple(cast(item) for item in value)
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return [(module, {name: cast(value) for name, value in kwargs.items()}) for module, kwargs in calls]


def attend(call: tuple[nn.Module, dict], x: Tensor) -> Tensor:
    """What transformers' module makes of x, with the mask and the tables of its model."""
    module, kwargs = call
    return module(**(kwargs | {"hidden_states": x}))[0]


def one_of_each_kind(calls: list[tuple[nn.Module, dict]]) -> list[tuple[nn.Module, dict]]:
    kinds = {}
    for call in calls:
        layer = SelfAttention.from_pretrained_layer(call[0])
        kinds.setdefault((layer.window_left, layer.rope, layer.rope_theta, layer.rope_scaling), call)
    return list(kinds.values())


def origins(layer: SelfAttention, module: nn.Module) -> dict[str, tuple[str, slice]]:
    """For each parameter of the layer the module's, and the rows of that."""
    heads, kv_heads = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    rows = {"q_proj": slice(heads), "k_proj": slice(heads, heads + kv_heads), "v_proj": slice(heads + kv_heads, None)}
    found = {}
    for name, _ in layer.named_parameters():
        part = name.split(".")[0]
        if hasattr(module, "qkv_proj") and part in rows:
            found[name] = (name.replace(part, "qkv_proj"), rows[part])
        else:
            found[name] = (name.replace("out_proj", "o_proj"), slice(None))
    return found


def check_same(
    call: tuple[nn.Module, dict], x: Tensor, tolerance: float, real: Tensor | None = None, **ours: Tensor
) -> None:
    """The output at real tokens, and its gradients by the input and by every parameter."""
    module = call[0]
    layer = SelfAttention.from_pretrained_layer(module)
    x.requires_grad_()
    theirs, out = attend(call, x), layer(x, **ours)
    assert out.dtype == theirs.dtype == x.dtype
    if real is not None:
        out, theirs = out[real], theirs[real]
    assert models.difference(out, theirs) < tolerance

    upstream = torch.randn_like(out)
    my_parameters, their_parameters = dict(layer.named_parameters()), dict(module.named_parameters())
    by_x, *by_parameter = torch.autograd.grad(out, [x, *my_parameters.values()], upstream)
    wanted_by_x, *wanted = torch.autograd.grad(theirs, [x, *their_parameters.values()], upstream)
    wanted = dict(zip(their_parameters, wanted, strict=True))
    assert models.difference(by_x, wanted_by_x) < 3 * tolerance
    origin = origins(layer, module)
    assert {name for name, _ in origin.values()} == set(their_parameters)
    for name, gradient in zip(my_parameters, by_parameter, strict=True):
        theirs_name, rows = origin[name]
        expected = wanted[theirs_name][rows]
        # A bias of k changes no softmax where nothing rotates: its gradient is rounding alone.
        scale = max(expected.abs().max().item(), 1e-3 * wanted_by_x.abs().max().item())
        assert (gradient - expected).abs().max().item() < 5 * tolerance * scale, name


def input_of(model: nn.Module, *shape: int) -> Tensor:
    return torch.randn(*shape, model.config.hidden_size, dtype=model.dtype)


@every_case
def test_rows_without_padding(case: str) -> None:
    model = build(case)
    for call in one_of_each_kind(attention_calls(model, input_ids=models.tokens(2, LONG))):
        check_same(call, input_of(model, 2, LONG), TOLERANCE)


@pytest.mark.parametrize("case", DEPEND_ON_LENGTH)
def test_tables_follow_the_length_of_the_call(case: str) -> None:
    model = build(case)
    for length in (10, 24, 25, LONG, 10):
        call = attention_calls(model, input_ids=models.tokens(1, length))[0]
        check_same(call, input_of(model, 1, length), TOLERANCE)


@pytest.mark.parametrize("case", models.NAMES)
def test_single_precision(case: str) -> None:
    model = build(case, torch.float32)
    for call in one_of_each_kind(attention_calls(model, input_ids=models.tokens(2, LONG))):
        check_same(call, input_of(model, 2, LONG), 1e-5)


@pytest.mark.parametrize("case", models.NAMES)
def test_half_precision(case: str) -> None:
    """transformers rounds tables and norms on the way: both are held to float64, and ours is no worse."""
    model, reference = build(case, torch.bfloat16), build(case)
    reference.load_state_dict(model.state_dict())
    tokens = models.tokens(2, LONG)
    x = input_of(model, 2, LONG)
    calls, exact_calls = (attention_calls(each, input_ids=tokens) for each in (model, reference))
    for call, exact_call in zip(calls, exact_calls, strict=True):
        out, theirs = SelfAttention.from_pretrained_layer(call[0])(x), attend(call, x)
        exact = attend(exact_call, x.double())
        assert out.dtype == torch.bfloat16
        errors = [(each.double() - exact).norm() / exact.norm() for each in (out, theirs)]
        assert errors[0] < max(1.1 * errors[1], 5e-3)


@pytest.mark.parametrize("side", ["left", "right"])
@every_case
def test_padded_rows(case: str, side: str) -> None:
    model = build(case)
    inputs = models.padded(LENGTHS, side)
    ids = inputs["attention_mask"] - 1
    for call in one_of_each_kind(attention_calls(model, **inputs)):
        check_same(call, input_of(model, *ids.shape), TOLERANCE, ids == 0, segment_ids=ids)


@every_case
def test_packed_rows_are_their_documents(case: str) -> None:
    """Each document alone in transformers' module, all in one row in ours."""
    model = build(case)
    ids = torch.tensor([index for index, length in enumerate(LENGTHS) for _ in range(length)])[None]
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    row = input_of(model, *ids.shape).requires_grad_()
    documents = row.split(LENGTHS, 1)
    upstream = torch.randn_like(row)
    calls_of_documents = [attention_calls(model, input_ids=models.tokens(1, length)) for length in LENGTHS]
    for calls in zip(*calls_of_documents, strict=True):
        layer = SelfAttention.from_pretrained_layer(calls[0][0])
        tables = layer.rope_parameters().tables(positions, max(LENGTHS), dtype=row.dtype) if layer.rope else None
        out = layer(row, tables, ids)
        theirs = torch.cat([attend(*pair) for pair in zip(calls, documents, strict=True)], 1)
        assert models.difference(out, theirs) < TOLERANCE
        (found,), (wanted,) = (torch.autograd.grad(y, row, upstream) for y in (out, theirs))
        assert models.difference(found, wanted) < 3 * TOLERANCE
        # Rotation is relative: positions that run on along the row change nothing.
        assert models.difference(layer(row, None, ids), theirs) < 3 * TOLERANCE


@pytest.mark.parametrize("lengths", [[20, 18], [30, 28]], ids=str)
def test_length_of_packed_rows_is_that_of_their_documents(lengths: list[int]) -> None:
    """On one side of the original length or the other; that of the row is beyond it."""
    model, longest = build("phi3_longrope"), max(lengths)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    ids = torch.tensor([index for index, length in enumerate(lengths) for _ in range(length)])[None]
    row = input_of(model, *ids.shape)
    calls = [attention_calls(model, input_ids=models.tokens(1, length))[0] for length in lengths]
    theirs = torch.cat([attend(*pair) for pair in zip(calls, row.split(lengths, 1), strict=True)], 1)
    layer = SelfAttention.from_pretrained_layer(calls[0][0])
    for length in (24, 25):
        tables = layer.rope_parameters().tables(positions, length, dtype=row.dtype)
        assert (models.difference(layer(row, tables, ids), theirs) < TOLERANCE) == ((length > 24) == (longest > 24))
    assert (models.difference(layer(row, None, ids), theirs) < 3 * TOLERANCE) == (longest > 24)
    layer.rope_length = longest
    assert models.difference(layer(row, None, ids), theirs) < 3 * TOLERANCE


@pytest.mark.parametrize("case", ["starcoder2", "seed_oss"])
def test_dropout_of_the_output(case: str) -> None:
    model = build(case)
    call = attention_calls(model, input_ids=models.tokens(2, 9))[0]
    x = input_of(model, 2, 9)
    for is_training in (True, False):
        layer = SelfAttention.from_pretrained_layer(call[0].train(is_training))
        torch.manual_seed(3)
        theirs = attend(call, x)
        torch.manual_seed(3)
        assert models.difference(layer(x), theirs) < TOLERANCE
        assert ((theirs == 0).float().mean() > 0.1) == is_training


@pytest.mark.parametrize("copied", [None, False])
@pytest.mark.parametrize("case", [case for case in models.NAMES if "phi3" not in case])
def test_parameters_are_shared(case: str, copied: bool | None) -> None:
    module = some_attention(case)
    layer = SelfAttention.from_pretrained_layer(module, copy=copied)
    mine = {name.replace("out_proj", "o_proj"): parameter for name, parameter in layer.named_parameters()}
    theirs = dict(module.named_parameters())
    assert set(mine) == set(theirs)
    assert all(mine[name] is theirs[name] for name in theirs)


def test_training_the_layer_trains_the_module() -> None:
    module = some_attention()
    layer = SelfAttention.from_pretrained_layer(module)
    before = module.q_proj.weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.randn(1, 5, 64, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(module.q_proj.weight, before)


@pytest.mark.parametrize("case", ["qwen3", "gemma3", "gpt_oss", "phi3"])
def test_copies_share_nothing(case: str) -> None:
    module = some_attention(case)
    module.o_proj.weight.requires_grad_(False)
    layer = SelfAttention.from_pretrained_layer(module, copy=True)
    x = torch.randn(1, 5, 64, dtype=torch.float64)
    expected = layer(x).detach()
    assert torch.equal(expected, SelfAttention.from_pretrained_layer(module)(x))
    assert not layer.out_proj.weight.requires_grad and layer.q_proj.weight.requires_grad
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert torch.equal(layer(x), expected)


def test_parts_of_a_fused_projection_are_copies() -> None:
    module = some_attention("phi3")
    module.qkv_proj.weight.requires_grad_(False)
    layer = SelfAttention.from_pretrained_layer(module)
    assert layer.out_proj.weight is module.o_proj.weight
    parts = [layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight]
    assert torch.equal(torch.cat(parts), module.qkv_proj.weight)
    for part in parts:
        assert part.is_leaf and not part.requires_grad
        assert part.untyped_storage().nbytes() == part.numel() * part.element_size()
    with pytest.raises(ValueError, match=r"copy: expected None or True, since Phi3Attention\.qkv_proj is one weight"):
        SelfAttention.from_pretrained_layer(module, copy=False)


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("case", ["gemma3", "phi3"])
def test_mode_dtype_and_flags_are_the_modules(case: str, is_training: bool) -> None:
    module = some_attention(case).to(torch.bfloat16).train(is_training)
    module.o_proj.weight.requires_grad_(False)
    state = torch.get_rng_state()
    layer = SelfAttention.from_pretrained_layer(module)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(part.training is is_training for part in layer.modules())
    assert all(parameter.dtype == torch.bfloat16 for parameter in layer.parameters())
    assert not layer.out_proj.weight.requires_grad and layer.q_proj.weight.requires_grad


@pytest.mark.parametrize("copied", [None, True])
@pytest.mark.parametrize("case", ["gemma3", "gpt_oss", "phi3"])
def test_meta_device(case: str, copied: bool | None) -> None:
    with torch.device("meta"):
        module = models.initialise(case, "eager", 4, {}).model.layers[0].self_attn
    layer = SelfAttention.from_pretrained_layer(module, copy=copied)
    assert all(parameter.is_meta for parameter in layer.parameters())
    assert layer(torch.randn(1, 5, 64, device="meta")).shape == (1, 5, 64)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("case", ["qwen3", "gemma3", "gpt_oss", "olmo2", "phi3_longrope", "smollm3", "cohere2"])
def test_deepcopy_state_dict_and_torchscript(case: str, index: int, tmp_path) -> None:
    module = some_attention(case, index)
    layer = SelfAttention.from_pretrained_layer(module)
    x, ids = torch.randn(1, LONG, 64, dtype=torch.float64), torch.arange(LONG)[None] // 30
    expected = layer(x, segment_ids=ids)
    assert torch.equal(copy.deepcopy(layer)(x, segment_ids=ids), expected)

    other = SelfAttention.from_pretrained_layer(module, copy=True)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    assert not torch.equal(other(x, segment_ids=ids), expected)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x, segment_ids=ids), expected)

    torch.jit.script(layer).save(tmp_path / "layer.pt")
    loaded = torch.jit.load(tmp_path / "layer.pt")
    torch.testing.assert_close(loaded(x, None, ids), expected, rtol=0, atol=1e-12)


def test_reset_parameters_is_the_layers_own() -> None:
    module = some_attention()
    layer = SelfAttention.from_pretrained_layer(module, copy=True)
    layer.reset_parameters()
    assert layer.q_proj.weight.std().item() == pytest.approx((2 / (5 * 64)) ** 0.5, rel=0.1)
    assert torch.equal(layer.q_norm.weight, torch.ones_like(layer.q_norm.weight))
    assert "reset_parameters" not in module.q_proj.__dict__


@pytest.mark.parametrize("copied", [None, True, False])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["o_proj"]], ids=str)
def test_adapters_count(targets: list[str], copied: bool | None) -> None:
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(build("qwen3"), config).base_model.model.double()
    call = attention_calls(model, input_ids=models.tokens(2, 9))[1]
    module = call[0]
    layer = SelfAttention.from_pretrained_layer(module, copy=copied)
    x = input_of(model, 2, 9)
    out, theirs = layer(x), attend(call, x)
    assert models.difference(out, theirs) < TOLERANCE
    assert models.difference(SelfAttention.from_pretrained_layer(some_attention("qwen3", 1))(x), theirs) > 1e-2

    trained = {name: parameter for name, parameter in layer.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * len(targets) and all("lora" in name for name in trained)
    upstream = torch.randn_like(theirs)
    found = torch.autograd.grad(out, list(trained.values()), upstream)
    wanted = torch.autograd.grad(theirs, [p for p in module.parameters() if p.requires_grad], upstream)
    for gradient, expected in zip(found, wanted, strict=True):
        assert models.difference(gradient, expected) < 3 * TOLERANCE
    mine, its = ({id(parameter) for parameter in part.parameters()} for part in (layer, module))
    assert mine.isdisjoint(its) if copied else mine == its


def test_hooks_and_other_norms_count() -> None:
    call = attention_calls(build("qwen3"), input_ids=models.tokens(2, 9))[0]
    module, x = call[0], torch.randn(2, 9, 64, dtype=torch.float64)
    module.k_proj.register_forward_hook(lambda _, args, out: 2 * out)
    module.q_norm.register_forward_hook(lambda _, args, out: out + 1)
    layer = SelfAttention.from_pretrained_layer(module)
    assert layer.k_proj is module.k_proj and layer.q_norm is module.q_norm
    assert type(layer.v_proj) is nn.Linear and layer.v_proj is not module.v_proj
    assert models.difference(layer(x), attend(call, x)) < TOLERANCE

    module.k_norm = Gemma3RMSNorm(32, eps=1e-3).double()  # of another model: what it does is not for us to guess
    nn.init.normal_(module.k_norm.weight)
    layer = SelfAttention.from_pretrained_layer(module)
    assert layer.k_norm is module.k_norm
    assert models.difference(layer(x), attend(call, x)) < TOLERANCE


def test_quantised_weights_count() -> None:
    call = attention_calls(build("qwen3", torch.float32), input_ids=models.tokens(2, 9))[0]
    module, x = call[0], torch.randn(2, 9, 64)
    before = attend(call, x)
    quantization.quantize_(module, quantization.Int8WeightOnlyConfig())
    layer = SelfAttention.from_pretrained_layer(module)
    assert layer.q_proj is module.q_proj and layer.out_proj is module.o_proj
    with torch.no_grad():
        assert models.difference(layer(x), attend(call, x)) < 1e-5
        assert models.difference(layer(x), before) > 1e-4


def test_offloaded_weights_are_fetched() -> None:
    model = build("llama", torch.float32)
    call = attention_calls(model, input_ids=models.tokens(2, 9))[0]
    x = torch.randn(2, 9, 64)
    expected = attend(call, x)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert call[0].q_proj.weight.is_meta
    layer = SelfAttention.from_pretrained_layer(call[0])
    assert models.difference(layer(x), expected) < 1e-5


@pytest.mark.parametrize(("case", "attribute"), [("gemma3", "eps"), ("qwen3", "variance_epsilon")])
def test_eps_is_that_of_each_norm(case: str, attribute: str) -> None:
    call = attention_calls(build(case), input_ids=models.tokens(2, 9))[0]
    setattr(call[0].q_norm, attribute, 0.5)
    setattr(call[0].k_norm, attribute, 2.0)
    x = torch.randn(2, 9, 64, dtype=torch.float64)
    assert models.difference(SelfAttention.from_pretrained_layer(call[0])(x), attend(call, x)) < TOLERANCE


def test_subclasses_make_themselves() -> None:
    class Layer(SelfAttention):
        pass

    assert type(Layer.from_pretrained_layer(some_attention())) is Layer


def test_transformers_is_not_imported() -> None:
    program = "import sys, selfattn.integrations._transformers_layers; assert 'transformers' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


def test_every_class_is_tested() -> None:
    kinds = {type(some_attention(case)) for case in CASES}
    assert {(kind.__module__.split(".")[2], kind.__name__) for kind in kinds} == set(_transformers_layers._CLASSES)


@pytest.mark.parametrize(("model", "name"), _transformers_layers._REFUSED)
def test_refused_classes_exist(model: str, name: str) -> None:
    assert hasattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), name)


class Subclass(LlamaAttention):
    pass


def of_class(path: str, config_class: type) -> nn.Module:
    """A class of transformers that is made from a configuration and an index: "model.Class"."""
    model, name = path.split(".")
    config = config_class(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2)
    return getattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), name)(config, 1)


def changed(case: str, change: Callable[[nn.Module], object]) -> nn.Module:
    module = some_attention(case)
    change(module)
    return module


def configured(case: str, **fields: object) -> nn.Module:
    """A module whose configuration was changed after it was built."""
    return changed(case, lambda module: [setattr(module.config, *field) for field in fields.items()])


def bidirectional() -> nn.Module:
    model = models.initialise("gemma3", "eager", 4, {"use_bidirectional_attention": True})
    return model.model.layers[1].self_attn


def fused_with_adapter() -> nn.Module:
    model = peft.get_peft_model(build("phi3"), peft.LoraConfig(target_modules=["qkv_proj"]))
    return model.base_model.model.model.layers[0].self_attn


REFUSALS = {
    "no_module": (lambda: 3, TypeError, "module: expected an attention module of transformers, got int"),
    "other_class": (lambda: nn.Linear(2, 2), NotImplementedError, r"exactly one of .*LlamaAttention.*got .*Linear"),
    "decoder_layer": (lambda: build("llama").model.layers[0], NotImplementedError, r"model\.layers\[i\]\.self_attn"),
    "subclass": (
        lambda: Subclass(hf.LlamaConfig(hidden_size=64, num_attention_heads=4), 0),
        NotImplementedError,
        r"got .*\.Subclass, which is unknown",
    ),
    "chunks": (
        lambda: of_class("llama4.Llama4TextAttention", hf.Llama4TextConfig),
        NotImplementedError,
        "Llama4TextAttention attends in chunks",
    ),
    "gate": (
        lambda: of_class("qwen3_next.Qwen3NextAttention", hf.Qwen3NextConfig),
        NotImplementedError,
        "Qwen3NextAttention multiplies its output by a gate",
    ),
    "latent": (
        lambda: of_class("deepseek_v3.DeepseekV3Attention", hf.DeepseekV3Config),
        NotImplementedError,
        "DeepseekV3Attention compresses .*latent",
    ),
    "cross": (
        lambda: hf.models.bart.modeling_bart.BartAttention(64, 4, config=hf.BartConfig()),
        NotImplementedError,
        "BartAttention is made for encoders and cross-attention",
    ),
    "clip": (
        lambda: configured("olmo", clip_qkv=8.0),
        NotImplementedError,
        r"config\.clip_qkv: expected None or False, got 8\.0: .*clipped",
    ),
    "layer_norm": (
        lambda: configured("cohere", use_qk_norm=True),
        NotImplementedError,
        r"config\.use_qk_norm: expected None or False, got True",
    ),
    "dropout": (
        lambda: changed("llama", lambda module: setattr(module, "attention_dropout", 0.1)),
        NotImplementedError,
        r"attention_dropout: expected 0, got 0\.1",
    ),
    "both_directions": (
        bidirectional,
        NotImplementedError,
        "is_causal: expected True, got a Gemma3Attention that sees both ways",
    ),
    "encoder": (
        lambda: configured("llama", is_causal=False),
        NotImplementedError,
        "is_causal: expected True, got a LlamaAttention that sees both ways",
    ),
    "hook_of_the_whole": (
        lambda: changed("llama", lambda module: module.register_forward_hook(lambda *_: None)),
        ValueError,
        "expected LlamaAttention without hooks and with its own forward",
    ),
    "forward_of_its_own": (
        lambda: changed("llama", lambda module: setattr(module, "forward", print)),
        ValueError,
        "expected LlamaAttention without hooks and with its own forward",
    ),
    "adapter_of_a_fused_projection": (
        fused_with_adapter,
        ValueError,
        "qkv_proj: expected a plain nn.Linear, which can be split, got Linear",
    ),
    "layer_idx": (
        lambda: changed("qwen2", lambda module: setattr(module, "layer_idx", None)),
        ValueError,
        r"layer_idx: expected an index into config\.layer_types, got None",
    ),
    "layer_type": (
        lambda: configured("qwen2", layer_types=["chunked_attention"] * 4),
        NotImplementedError,
        r"config\.layer_types\[0\]: expected 'sliding_attention' or 'full_attention', got 'chunked_attention'",
    ),
    "window": (
        lambda: configured("cohere2", sliding_window=None),
        ValueError,
        r"config\.sliding_window: expected a number of tokens, got None",
    ),
    "two_windows": (
        lambda: configured("qwen2_sliding", sliding_window=9),
        ValueError,
        "sliding_window: expected that of its configuration, 9, got 5",
    ),
    "pruned_keys": (
        lambda: changed("llama", lambda module: setattr(module, "k_proj", nn.Linear(64, 16, bias=False))),
        ValueError,
        r"k_proj: expected \(32, 64\) \(out, in\), got \(16, 64\)",
    ),
    "pruned_output": (
        lambda: changed("llama", lambda module: setattr(module, "o_proj", nn.Linear(48, 64, bias=False))),
        ValueError,
        r"o_proj: expected \(64, 64\) \(out, in\), got \(64, 48\)",
    ),
    "pruned_fused_projection": (
        lambda: changed("phi3", lambda module: setattr(module, "qkv_proj", nn.Linear(64, 100, bias=False))),
        ValueError,
        "qkv_proj: expected 128 output features, got 100",
    ),
    "pruned_norm": (
        lambda: changed("qwen3", lambda module: setattr(module.q_norm, "weight", nn.Parameter(torch.ones(8)))),
        ValueError,
        r"q_norm: expected a weight of shape \(32,\), got \(8,\)",
    ),
    "rope_type": (
        lambda: configured("llama", rope_parameters={"rope_type": "proportional", "rope_theta": 1e4}),
        ValueError,
        "rope_type: expected one of .*'proportional'",
    ),
    "partial_rotation": (
        lambda: configured(
            "llama", rope_parameters={"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}
        ),
        NotImplementedError,
        r"LlamaAttention rotates whole heads, got partial_rotary_factor 0\.5",
    ),
    "no_rope_parameters": (
        lambda: configured("llama", rope_parameters=None),
        ValueError,
        r"config\.rope_parameters: expected those of the layer, got None",
    ),
    "no_rope_parameters_of_the_layer_type": (
        lambda: configured("gemma3", rope_parameters={"full_attention": {"rope_theta": 1e4}}),
        ValueError,
        r"config\.rope_parameters: expected those of the layer, got None",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    make, error, message = REFUSALS[name]
    module = make()
    with pytest.raises(error, match=message) as caught:
        SelfAttention.from_pretrained_layer(module)
    assert str(caught.value).startswith(("SelfAttention.from_pretrained_layer: ", "RopeParameters"))


def test_replaced_forward_of_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """As libraries of faster kernels do."""

    def forward(self, *args, **kwargs):
        return None

    module = some_attention("llama")
    monkeypatch.setattr(LlamaAttention, "forward", forward)
    with pytest.raises(NotImplementedError, match=r"LlamaAttention\.forward was replaced by one of .*test_pretrained"):
        SelfAttention.from_pretrained_layer(module)


def test_bad_copy() -> None:
    with pytest.raises(TypeError, match="copy: expected None, True or False, got 1"):
        SelfAttention.from_pretrained_layer(some_attention(), copy=1)
