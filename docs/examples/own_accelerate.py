"""The model of own_model.py under Accelerate:   torchrun --nproc-per-node 2 docs/examples/own_accelerate.py"""

import torch
import torch.distributed as dist
from accelerate import Accelerator
from own_model import BALANCE, GROUPS, STEPS, TOKENS_BT, Model, print_loss, sum_loss

import moe_dist

accelerator = Accelerator(cpu=True)
size = accelerator.num_processes
group = dist.group.WORLD if size > 1 else None
model = Model(group).to(torch.float64)
moe_dist.average_over_ranks(model, group)  # before Accelerate wraps the model
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(TOKENS_BT), batch_size=len(TOKENS_BT) // size)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for _ in range(STEPS):
    for (own,) in loader:
        loss, report = sum_loss(model, own)
        balance = moe_dist.balance_loss(report, GROUPS, group, averaged=True)
        accelerator.backward(loss / own[:, 1:].numel() + BALANCE * balance)
        optimizer.step()
        optimizer.zero_grad()

print_loss(accelerator.unwrap_model(model))
accelerator.end_training()
