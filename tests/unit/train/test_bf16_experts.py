"""bf16 experts compute with the weights of the last optimizer step, not with older copies."""

from contextlib import suppress
from pathlib import Path

import torch

from moe_dist.moe.experts.experts import ExpertStack
from tests.support.one_rank import OneRank, world_of_one


def test_experts_follow_the_optimizer(tiny_data: Path, tmp_path: Path) -> None:
    with world_of_one():
        one = OneRank(tiny_data, tmp_path, **{"parallel.precision": "bf16"})
        one.resumable.restore()
        stacks = [each for each in one.training.parallel.model.modules() if isinstance(each, ExpertStack)]
        before = [each.gate.detach().clone() for each in stacks]
        one.training.step(one.run.loader.batches(0), lr=1e-2, aux=one.run.plan.aux(0))
        for stack, old in zip(stacks, before, strict=True):
            assert not torch.equal(stack.gate, old)
            assert torch.equal(stack.weight("gate", torch.bfloat16), stack.gate.to(torch.bfloat16))


def test_an_error_in_a_micro_batch_drops_the_copies(tiny_data: Path, tmp_path: Path) -> None:
    """If the copies stayed, a model that is loaded afterwards would compute with the previous experts."""
    with world_of_one():
        parallel = OneRank(tiny_data, tmp_path, **{"parallel.precision": "bf16"}).training.parallel
        stack = next(each for each in parallel.model.modules() if isinstance(each, ExpertStack))
        with suppress(MemoryError), parallel.micro_batch(last=False):
            stack.weight("gate", torch.bfloat16)
            raise MemoryError
        with torch.no_grad():
            stack.gate.add_(1.0)
        assert torch.equal(stack.weight("gate", torch.bfloat16), stack.gate.to(torch.bfloat16))
