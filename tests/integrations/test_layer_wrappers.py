"""Promise: what libraries wrap around SelfAttention's projections counts: PEFT, torchao, bitsandbytes, accelerate."""

import copy

import accelerate
import bitsandbytes
import peft
import pytest
import torch
from torch import Tensor, nn
from torchao import quantization
from torchao.quantization import qat

from selfattn import SelfAttention, SelfAttentionConfig

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
SUBSETS = [("q_proj",), ("out_proj",), ("q_proj", "v_proj"), PROJECTIONS]
E = 64


class Model(nn.Module):
    """As small as what libraries take: they change the modules inside it."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        config = SelfAttentionConfig(head_dim=16, num_kv_heads=2, qk_norm=True)
        self.attention = SelfAttention(E, config, dtype=dtype)

    def forward(self, x: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        return self.attention(x, segment_ids=segment_ids)


def make_input() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 9, E), torch.tensor([[0, 0, 0, 1, 1, 1, 1, -1, -1], [5] * 9], dtype=torch.int32)


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def with_merged_weights(model: nn.Module) -> Model:
    """The plain layer whose weights are what the adapters make of them."""
    merged = copy.deepcopy(model).merge_and_unload()
    assert merged.attention._is_plain()
    return merged


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("targets", SUBSETS, ids=str)
def test_peft_adapters(targets: tuple[str, ...], use_dora: bool) -> None:
    plain = Model()
    config = peft.LoraConfig(r=4, target_modules=list(targets), use_dora=use_dora, init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(plain), config)
    x, ids = make_input()
    out = model(x, segment_ids=ids)
    assert relative(out, plain(x, ids)) > 1e-2
    assert relative(out, with_merged_weights(model)(x, ids)) < 1e-5

    out.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(gradients) == len(targets) * (3 if use_dora else 2)
    for name, gradient in gradients.items():
        assert gradient is not None and gradient.any(), name
    for parameter, expected in zip(gradients.values(), gradients_by_parts(model, x, ids), strict=True):
        assert relative(parameter, expected) < 1e-5
    if not use_dora:  # DoRA's gradient leaves out that of its norms, on purpose
        check_gradients_by_differences(model, x, ids)

    model.merge_adapter()
    assert relative(model(x, segment_ids=ids), out) < 1e-5
    model.unmerge_adapter()
    assert relative(model(x, segment_ids=ids), out) < 1e-5
    with model.disable_adapter():
        assert relative(model(x, segment_ids=ids), plain(x, ids)) < 1e-6


def gradients_by_parts(model: nn.Module, x: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    loss = by_parts(model.base_model.model.attention, x, ids).square().sum()
    return torch.autograd.grad(loss, [parameter for parameter in model.parameters() if parameter.requires_grad])


def check_gradients_by_differences(model: nn.Module, x: Tensor, ids: Tensor) -> None:
    """Of each adapter, in float64, along one direction."""
    model = copy.deepcopy(model).double()
    model.zero_grad()
    model(x.double(), segment_ids=ids).square().sum().backward()
    for parameter in [parameter for parameter in model.parameters() if parameter.requires_grad]:
        direction = torch.randn_like(parameter)
        values = []
        with torch.no_grad():
            for step in (1e-6, -2e-6):
                parameter += step * direction
                values.append(model(x.double(), segment_ids=ids).square().sum())
            parameter += 1e-6 * direction
        difference = (values[0] - values[1]) / 2e-6
        assert torch.isclose((parameter.grad * direction).sum(), difference, rtol=1e-5, atol=1e-6)


def test_peft_adapters_train() -> None:
    model = peft.get_peft_model(Model(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    x, ids = make_input()
    target = torch.randn_like(x)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora" not in name}
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-1)
    losses = []
    for _ in range(30):
        loss = (model(x, segment_ids=ids) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.995 * losses[0]
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in base.items())


def by_parts(layer: SelfAttention, x: Tensor, ids: Tensor) -> Tensor:
    """The layer with every projection called by this test."""
    q, k, v = layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)
    weights = {"q_norm_weight": layer.q_norm.weight, "k_norm_weight": layer.k_norm.weight}
    heads = torch.ops.selfattn.projected_attention(q, k, v, segment_ids=ids, head_dim=layer.head_dim, **weights)
    return layer.out_proj(heads)


@pytest.mark.parametrize("which", ["int8", "float8"])
def test_torchao_weights(which: str) -> None:
    config = {"int8": "Int8WeightOnlyConfig", "float8": "Float8WeightOnlyConfig"}[which]
    plain = Model(torch.bfloat16).eval()
    model = copy.deepcopy(plain)
    quantization.quantize_(model, getattr(quantization, config)())
    assert not model.attention._is_plain()
    x, ids = make_input()
    x = x.bfloat16()
    with torch.no_grad():
        out, expected = model(x, ids), plain(x, ids)
        assert 1e-4 < relative(out.float(), expected.float()) < 0.1
        assert torch.equal(out, by_parts(model.attention, x, ids))


def test_torchao_quantisation_aware_training() -> None:
    plain = Model()
    model = copy.deepcopy(plain)
    weights = qat.IntxFakeQuantizeConfig(torch.int4, group_size=32)
    quantization.quantize_(model, qat.QATConfig(weight_config=weights, step="prepare"))
    x, ids = make_input()
    out = model(x, ids)
    assert relative(out, plain(x, ids)) > 1e-3  # the rounding is there
    assert torch.equal(out, by_parts(model.attention, x, ids))
    out.sum().backward()
    assert all(getattr(model.attention, name).weight.grad is not None for name in PROJECTIONS)


def test_bitsandbytes_8_bit() -> None:
    plain = Model().eval()
    model = copy.deepcopy(plain)
    for name in PROJECTIONS:
        linear = getattr(model.attention, name)
        replacement = bitsandbytes.nn.Linear8bitLt(
            linear.in_features, linear.out_features, bias=False, has_fp16_weights=False, threshold=6.0
        )
        replacement.load_state_dict(linear.state_dict())
        setattr(model.attention, name, replacement.to("cpu"))
    x, ids = make_input()
    x = x.bfloat16()
    model.attention.q_norm.bfloat16(), model.attention.k_norm.bfloat16()
    with torch.no_grad():
        out, expected = model(x, ids), plain.bfloat16()(x, ids)
    assert 0 < relative(out.float(), expected.float()) < 0.1


@pytest.mark.parametrize("offload", ["cpu_offload", "disk_offload", "dispatch_model"])
def test_accelerate_offloading(offload: str, tmp_path) -> None:
    model = Model().eval()
    x, ids = make_input()
    expected = model(x, ids)
    if offload == "cpu_offload":
        accelerate.cpu_offload(model, execution_device="cpu")
    elif offload == "disk_offload":
        accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    else:
        places = dict.fromkeys(["attention.k_proj", "attention.v_proj", "attention.q_norm", "attention.k_norm"], "cpu")
        places |= {"attention.q_proj": "disk", "attention.out_proj": "disk"}
        model = accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path))
    assert any(parameter.is_meta for parameter in model.parameters())
    assert relative(model(x, ids), expected) < 1e-6
