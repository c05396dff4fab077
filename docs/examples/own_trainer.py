"""The model of own_model.py in Hugging Face's Trainer:   torchrun --nproc-per-node 2 docs/examples/own_trainer.py"""

import tempfile
from typing import Any

import datasets
import torch
import torch.distributed as dist
from own_model import BALANCE, GROUPS, STEPS, TOKENS_BT, Model, print_loss, sum_loss
from transformers import Trainer, TrainingArguments

import moe_dist


class MoETrainer(Trainer):
    def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], *_: Any, **__: Any) -> torch.Tensor:
        own_BT = inputs["tokens"]
        loss, report = sum_loss(model, own_BT)
        balance = moe_dist.balance_loss(report, GROUPS, group, averaged=True)
        return loss / own_BT[:, 1:].numel() + BALANCE * balance


arguments = TrainingArguments(
    tempfile.mkdtemp(),
    max_steps=STEPS,
    use_cpu=True,
    max_grad_norm=0.0,  # Trainer would clip by each rank's own norm; call moe_dist.clip_gradients in a callback instead
    save_strategy="no",  # Trainer saves rank 0's experts only; save moe_dist.full_state_dict(model)
    remove_unused_columns=False,
    report_to=[],
    disable_tqdm=True,
)
size = arguments.world_size
arguments.per_device_train_batch_size = len(TOKENS_BT) // size
group = dist.group.WORLD if size > 1 else None
model = Model(group).to(torch.float64)
moe_dist.average_over_ranks(model, group)  # before Trainer wraps the model
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
data = datasets.Dataset.from_dict({"tokens": TOKENS_BT.tolist()})
MoETrainer(model, arguments, train_dataset=data, optimizers=(optimizer, constant)).train()

print_loss(model)
