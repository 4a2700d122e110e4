"""A profile of a training step shows ranges that say what runs: the operators, the backend, the gradient's nodes."""

import pytest
import torch
from support.problems import make_ids
from support.serving_table import skip_unless_flash_serves
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from selfattn import SelfAttention, SelfAttentionConfig

EMBEDDING, LENGTH, DIM = 128, 24, 32


def profile_step(device: str, **config) -> list[FunctionEvent]:
    """The CPU's ranges of a training step of the layer, on documents."""
    module = SelfAttention(
        EMBEDDING, SelfAttentionConfig(head_dim=DIM, num_kv_heads=2, **config), device=device, dtype=torch.bfloat16
    )
    x = torch.randn(2, LENGTH, EMBEDDING, device=device, dtype=torch.bfloat16, requires_grad=True)
    ids = make_ids("packed", 2, LENGTH).to(device)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        module(x, segment_ids=ids).sum().backward()
    return list(profiler.events())


def ranges_above(event: FunctionEvent) -> list[str]:
    """From the inside out."""
    names = []
    while event.cpu_parent is not None:
        event = event.cpu_parent
        names.append(event.name)
    return names


def surroundings(events: list[FunctionEvent], name: str) -> list[list[str]]:
    """Of every range called ``name`` that stands in no other of that name: the names of those around it."""
    found = [ranges_above(event) for event in events if event.name == name]
    return [names for names in found if name not in names]


@pytest.mark.parametrize("qk_norm", [False, True])
def test_flash_shows_as_its_operators(qk_norm: bool, device: str) -> None:
    skip_unless_flash_serves(device, torch.bfloat16, DIM)
    events = profile_step(device, qk_norm=qk_norm)
    front = "selfattn::qk_norm_rope_attention" if qk_norm else "selfattn::multihead_attention"
    node = "QkNormRopeAttention" if qk_norm else "FlashAttention"
    assert surroundings(events, "selfattn::flash_attention") == [[front, "selfattn::self_attention"]]
    (around_backward,) = surroundings(events, "selfattn::flash_attention_backward")
    assert any(f"<selfattn::{node}>" in name for name in around_backward), around_backward
    assert surroundings(events, "selfattn::qk_norm_rope_backward")


@pytest.mark.parametrize(
    ("backend", "engine"), [("aten", "aten::scaled_dot_product_attention"), ("reference", "aten::bmm")]
)
def test_other_backends_show_as_what_they_call(backend: str, engine: str) -> None:
    events = profile_step("cpu", attention_backend=backend)
    assert not surroundings(events, "selfattn::flash_attention")
    forward = [names for names in surroundings(events, engine) if "selfattn::self_attention" in names]
    assert forward and all("selfattn::multihead_attention" in names for names in forward)


def test_projections_show_as_products_within_the_layer() -> None:
    events = profile_step("cpu")
    linear = surroundings(events, "aten::linear")
    assert linear == [["selfattn::self_attention"]] * 4
    assert any(
        "<selfattn::QueryKeyValueProjections>" in name
        for names in surroundings(events, "aten::addmm_")
        for name in names
    )
