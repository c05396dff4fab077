"""The parallel style "moe_dist_shard", which shards experts whose number the ranks do not divide.

Pass it in `DistributedConfig.ep_plan` for each parameter of the experts, in the place of transformers' "grouped_gemm":

    experts = "model.layers.*.mlp.experts"
    ep_plan = {f"{experts}.gate_up_proj": "moe_dist_shard", f"{experts}.down_proj": "moe_dist_shard"}
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers.distributed.expert_parallel import MoEParamShard

from moe_dist.errors import ConfigError


class ChunkedExperts(MoEParamShard):
    """Gives each rank a run of experts, as `torch.chunk` cuts them: 9 experts on 2 ranks are 5 and 4. DTensor saves and
    loads no other cut."""

    def __init__(self) -> None:
        super().__init__(Shard(0), shards_expert_dim=True)

    def shard_param(self, module: Any, param: str, mesh: DeviceMesh) -> None:
        """Shards one parameter [E, ...], and gives the module the number of this rank's experts.

        Raises:
            ConfigError: a rank would hold no expert.
        """
        whole = module._parameters.get(param)
        if whole is None:  # a bias that this model does not have
            return
        chunks(whole.shape[0], mesh.size())  # refuses ranks without experts
        shard = distribute_tensor(whole, mesh, [self.placement], src_data_rank=None)
        module.num_experts, module._is_expert_parallel = shard.to_local().shape[0], True
        module._parameters[param] = nn.Parameter(shard, requires_grad=whole.requires_grad)


def chunks(num_experts: int, num_ranks: int) -> tuple[tuple[int, ...], ...]:
    """Returns the experts of each rank, as DTensor cuts dimension 0.

    Raises:
        ConfigError: a rank would hold no expert.
    """
    runs = tuple(tuple(run.tolist()) for run in torch.arange(num_experts).chunk(num_ranks))
    if len(runs) < num_ranks:
        raise ConfigError(
            f"ep_size={num_ranks}: {num_experts} experts in runs of {len(runs[0])} fill only {len(runs)} ranks, and "
            f"transformers cannot load a rank without experts; give ep_size={len(runs)}, or another number of ranks that "
            "such runs fill"
        )
    return runs
