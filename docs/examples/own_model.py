"""An expert-parallel layer in a model of your own:   torchrun --nproc-per-node 2 docs/examples/own_model.py"""

import torch
import torch.distributed as dist
from torch import nn

import moe_dist

GROUPS = [moe_dist.ExpertGroup("text", num_experts=4, num_null=4, top_k=2, ffn_dim=64)]


class Model(nn.Module):
    def __init__(self, ep_group: dist.ProcessGroup | None) -> None:
        super().__init__()
        torch.manual_seed(0)  # the dense weights, the same on every rank; experts are drawn by their names
        self.embedding, self.norm, self.head = nn.Embedding(100, 32), nn.RMSNorm(32), nn.Linear(32, 100)
        self.moe = moe_dist.build_moe_layer(32, GROUPS, ep_group=ep_group, std=0.2)

    def forward(self, token_T: torch.Tensor) -> tuple[torch.Tensor, moe_dist.LayerReport]:
        x_TD = self.embedding(token_T)
        y_TD, report = self.moe(self.norm(x_TD), torch.zeros_like(token_T))  # all tokens are of group 0
        return self.head(x_TD + y_TD), report


def train(token_BT: torch.Tensor, steps: int = 3) -> Model:
    """Learns each sequence's next tokens; every rank takes its share of the B sequences."""
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    model = Model(group if size > 1 else None).to(torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        own_BT = token_BT.chunk(size)[rank]
        logits_TV, report = model(own_BT[:, :-1].flatten())
        # Sums over the global count: nothing is averaged, so gradients add up over ranks.
        loss = nn.functional.cross_entropy(logits_TV, own_BT[:, 1:].flatten(), reduction="sum") / token_BT[:, 1:].numel()
        (loss + 0.01 * moe_dist.balance_loss(report, GROUPS, group)).backward()
        for name, parameter in model.named_parameters():
            if not name.startswith("moe.experts."):  # an expert lives on one rank, which has the gradient of all tokens
                dist.all_reduce(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()
    return model


if __name__ == "__main__":
    dist.init_process_group("gloo")
    train(torch.randint(100, (8, 33), generator=torch.Generator().manual_seed(1)), steps=100)
    dist.destroy_process_group()
