"""The stand-in for CUDA replaces the attributes that it lists, and restores all of them, also after an error."""

import pytest
import torch

from moe_dist.megatron.cpu_trial import CPU, cuda_replacements, megatron_on_cpu

pytestmark = pytest.mark.megatron


def test_replaces_what_it_lists_and_restores_it() -> None:
    listed = [(owner, name) for owner, name, _ in cuda_replacements()]
    before = [owner.__dict__.get(name) for owner, name in listed]
    with megatron_on_cpu() as replaced:
        assert all(getattr(owner, name) is value for owner, name, value in replaced)
        assert [(owner, name) for owner, name, _ in replaced][: len(listed)] == listed
        assert torch.zeros(2, device="cuda").device == CPU
        assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert [owner.__dict__.get(name) for owner, name in listed] == before
    with pytest.raises(KeyError), megatron_on_cpu():
        raise KeyError
    assert [owner.__dict__.get(name) for owner, name in listed] == before
