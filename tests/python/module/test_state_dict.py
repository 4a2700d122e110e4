"""A module's weights survive saving and loading, and fit another module of the same configuration only."""

import copy
import io
import pickle

import pytest
import torch

from selfattn import SelfAttention, SelfAttentionConfig

CONFIG = SelfAttentionConfig(head_dim=16, qk_norm=True, use_bias=True, sinks=True, num_kv_heads=2)
X = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(0))


def test_saved_state_gives_the_same_output() -> None:
    module, other = SelfAttention(64, CONFIG), SelfAttention(64, CONFIG)
    assert not torch.equal(module(X), other(X))
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(module(X), other(X))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copy_is_independent(duplicate) -> None:
    module = SelfAttention(64, CONFIG)
    twin = duplicate(module)
    assert torch.equal(module(X), twin(X))
    torch.nn.init.ones_(twin.q_proj.weight)
    assert not torch.equal(module.q_proj.weight, twin.q_proj.weight)


def test_state_of_another_configuration_is_refused() -> None:
    with pytest.raises(RuntimeError, match="sinks"):
        SelfAttention(64, SelfAttentionConfig(head_dim=16)).load_state_dict(SelfAttention(64, CONFIG).state_dict())


def test_module_moves_between_dtypes() -> None:
    assert SelfAttention(64, CONFIG).to(torch.bfloat16)(X.bfloat16()).dtype == torch.bfloat16
