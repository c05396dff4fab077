"""The model of own_model.py under DDP:   torchrun --nproc-per-node 2 docs/examples/own_ddp.py"""

import torch
import torch.distributed as dist
from own_model import BALANCE, GROUPS, STEPS, TOKENS_BT, Model, print_loss, sum_loss
from torch.nn.parallel import DistributedDataParallel

import moe_dist

dist.init_process_group("gloo")
group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
model = Model(group if size > 1 else None).to(torch.float64)
moe_dist.average_over_ranks(model, group)  # makes DDP leave out the experts
wrapped = DistributedDataParallel(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
own = TOKENS_BT.chunk(size)[rank]
for _ in range(STEPS):
    loss, report = sum_loss(wrapped, own)
    # Divide by this rank's number of tokens, because DDP averages gradients over ranks.
    loss = loss / own[:, 1:].numel() + BALANCE * moe_dist.balance_loss(report, GROUPS, group, averaged=True)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

print_loss(model)
dist.destroy_process_group()
