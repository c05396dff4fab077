"""An expert-parallel layer in a model of your own:   torchrun --nproc-per-node 2 docs/examples/own_model.py"""

import torch
import torch.distributed as dist
from torch import nn

import moe_dist

GROUPS = [moe_dist.ExpertGroup("text", num_experts=4, num_null=4, top_k=2, ffn_dim=64)]
TOKENS_BT = torch.randint(100, (8, 17), generator=torch.Generator().manual_seed(1))
STEPS, BALANCE = 10, 0.01


class Model(nn.Module):
    def __init__(self, ep_group: dist.ProcessGroup | None) -> None:
        super().__init__()
        torch.manual_seed(0)  # the dense weights, the same on every rank; expert weights are drawn by parameter name
        self.embedding, self.norm, self.head = nn.Embedding(100, 32), nn.RMSNorm(32), nn.Linear(32, 100)
        self.moe = moe_dist.build_moe_layer(32, GROUPS, ep_group=ep_group, std=0.2)

    def forward(self, token_T: torch.Tensor) -> tuple[torch.Tensor, moe_dist.LayerReport]:
        x_TD = self.embedding(token_T)
        y_TD, report = self.moe(self.norm(x_TD), torch.zeros_like(token_T))  # all tokens belong to group 0
        return self.head(x_TD + y_TD), report


def sum_loss(model: nn.Module, token_BT: torch.Tensor) -> tuple[torch.Tensor, moe_dist.LayerReport]:
    """Returns the loss, summed over all next tokens of all sequences, and the layer's report."""
    logits_TV, report = model(token_BT[:, :-1].flatten())
    return nn.functional.cross_entropy(logits_TV, token_BT[:, 1:].flatten(), reduction="sum"), report


def train(token_BT: torch.Tensor = TOKENS_BT, steps: int = STEPS) -> Model:
    """Trains a model; each rank takes its share of the B sequences."""
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    model = Model(group if size > 1 else None).to(torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        loss, report = sum_loss(model, token_BT.chunk(size)[rank])
        # Divide by the number of tokens of all ranks, so that losses and gradients add up over ranks.
        loss = loss / token_BT[:, 1:].numel() + BALANCE * moe_dist.balance_loss(report, GROUPS, group)
        loss.backward()
        moe_dist.finish_gradients(model, group)
        optimizer.step()
        optimizer.zero_grad()
    return model


def print_loss(model: nn.Module) -> None:
    """Rank 0 prints the mean loss of all tokens. All ranks must call it, because the layer exchanges rows."""
    loss = sum_loss(model, TOKENS_BT)[0] / TOKENS_BT[:, 1:].numel()
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"loss {loss.item():.9f}")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    print_loss(train())
    dist.destroy_process_group()
