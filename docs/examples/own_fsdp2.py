"""The model of own_model.py under FSDP2:   torchrun --nproc-per-node 2 docs/examples/own_fsdp2.py"""

import torch
import torch.distributed as dist
from own_model import BALANCE, GROUPS, STEPS, TOKENS_BT, Model, print_loss, sum_loss
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import moe_dist

dist.init_process_group("gloo")
group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
model = Model(group if size > 1 else None).to(torch.float64)
moe_dist.average_over_ranks(model, group)
experts = moe_dist.expert_parameters(model)  # already spread over the ranks
fully_shard(model, mesh=init_device_mesh("cpu", (size,)), ignored_params=set(experts))
dense = [parameter for parameter in model.parameters() if all(parameter is not expert for expert in experts)]
optimizer = torch.optim.AdamW([{"params": dense}, {"params": experts}], lr=1e-2)  # separate DTensors and tensors
own = TOKENS_BT.chunk(size)[rank]
for _ in range(STEPS):
    loss, report = sum_loss(model, own)
    # Divide by this rank's number of tokens, because FSDP2 averages gradients over ranks.
    loss = loss / own[:, 1:].numel() + BALANCE * moe_dist.balance_loss(report, GROUPS, group, averaged=True)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

print_loss(model)
dist.destroy_process_group()
