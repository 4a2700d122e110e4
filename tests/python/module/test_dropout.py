"""Dropout acts on the output, in training only."""

import torch

from selfattn import SelfAttention, SelfAttentionConfig

CONFIG = SelfAttentionConfig(head_dim=16, dropout_rate=0.4)


def test_evaluation_has_no_dropout() -> None:
    module = SelfAttention(64, CONFIG).eval()
    x = torch.randn(2, 20, 64)
    assert torch.equal(module(x), module(x))
    assert (module(x) != 0).all()


def test_training_drops_and_scales_elements_of_the_output() -> None:
    module = SelfAttention(64, CONFIG)
    x = torch.randn(4, 100, 64)
    dropped = module(x)
    kept = dropped != 0
    assert abs(kept.float().mean().item() - 0.6) < 0.02
    torch.testing.assert_close(dropped[kept], module.eval()(x)[kept] / 0.6)


def test_dropout_keeps_the_mean() -> None:
    """Each element of the mean over n draws deviates by a normal of std |out| sqrt(0.4 / 0.6 / n)."""
    module = SelfAttention(64, CONFIG)
    x, draws = torch.randn(1, 50, 64), 400
    with torch.no_grad():
        mean = torch.stack([module(x) for _ in range(draws)]).mean(0)
        out = module.eval()(x)
    deviation = (mean - out) / (out.abs() * (0.4 / 0.6 / draws) ** 0.5)
    assert abs(deviation.mean().item()) < 0.1
    assert abs(deviation.std().item() - 1) < 0.1


def test_gradients_pass_where_the_output_was_kept() -> None:
    module = SelfAttention(64, CONFIG)
    x = torch.randn(2, 20, 64, requires_grad=True)
    torch.manual_seed(1)
    dropped = module(x)
    grad = torch.randn_like(dropped)
    actual = torch.autograd.grad(dropped, [x, *module.parameters()], grad)
    expected = torch.autograd.grad(module.eval()(x), [x, *module.parameters()], grad * (dropped != 0) / 0.6)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
