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
