"""The model of own_model.py in Lightning:   torchrun --nproc-per-node 2 docs/examples/own_lightning.py"""

import os
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from own_model import BALANCE, GROUPS, STEPS, TOKENS_BT, Model, print_loss, sum_loss

import moe_dist

SIZE = int(os.environ["WORLD_SIZE"])


class Module(LightningModule):
    def configure_model(self) -> None:  # called after Lightning makes the process group and before it wraps the module
        if not hasattr(self, "model"):
            self.ranks = dist.group.WORLD if SIZE > 1 else None
            self.model = Model(self.ranks).to(torch.float64)
            moe_dist.average_over_ranks(self, self.ranks)

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        (own_BT,) = batch
        loss, report = sum_loss(self.model, own_BT)
        balance = moe_dist.balance_loss(report, GROUPS, self.ranks, averaged=True)
        return loss / own_BT[:, 1:].numel() + BALANCE * balance

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def on_train_end(self) -> None:
        print_loss(self.model)


trainer = Trainer(
    accelerator="cpu",
    devices=SIZE,
    strategy="ddp" if SIZE > 1 else "auto",
    max_epochs=STEPS,
    logger=False,
    enable_checkpointing=False,  # a checkpoint would have rank 0's experts only; save moe_dist.full_state_dict(model)
    enable_progress_bar=False,
    enable_model_summary=False,
)
data = torch.utils.data.TensorDataset(TOKENS_BT)
trainer.fit(Module(), torch.utils.data.DataLoader(data, batch_size=len(TOKENS_BT) // SIZE))
