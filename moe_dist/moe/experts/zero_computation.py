"""Computes zero-computation experts (identity and constant experts) on the token's own rank, without dispatch.

    identity  E(x) = x                                          (LongCat-Flash, arXiv 2509.01322; MoE++'s copy expert)
    constant  E(x) = a1 x + a2 v,  [a1, a2] = softmax(W x)      (MoE++, arXiv 2410.07348), v and W [2, D] learned

x is the layer's normalised input, as for true experts. Null experts, E(x) = 0, need no computation. Shape letters: T
tokens, D hidden size, F zero-computation columns: all groups' identity experts, then all groups' c constant experts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moe_dist.moe.kernels.torch_kernels import accumulation_dtype
from moe_dist.placement.parameter_names import Role, group_module
from moe_dist.placement.placement import ExpertGroup


class ConstantStack(nn.Module):
    """The constant experts of one group, which every rank has. `vector` [c, D] is v, and `gate` [c, 2, D] is W."""

    role = Role.ZERO_COMPUTATION

    def __init__(self, hidden_dim: int, num_constant: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.empty(num_constant, hidden_dim))
        self.gate = nn.Parameter(torch.empty(num_constant, 2, hidden_dim))


class ZeroComputationExperts(nn.Module):
    """The zero-computation experts of all groups.

    The gate of every constant expert is computed for every token. So shapes do not depend on the routing, and every
    parameter has a gradient on every rank.
    """

    def __init__(self, hidden_dim: int, groups: Sequence[ExpertGroup]) -> None:
        super().__init__()
        self.num_identity = sum(group.num_identity for group in groups)
        self.with_constants = tuple(group_module(group.name) for group in groups if group.num_constant)
        for group in groups:
            if group.num_constant:
                self.add_module(group_module(group.name), ConstantStack(hidden_dim, group.num_constant))

    def forward(self, h_TD: Tensor, weight_TF: Tensor) -> Tensor:
        """Returns the weighted sum of each token's zero-computation experts, [T, D] in the dtype of `h_TD`, summed in fp32
        (float64 for float64) and rounded once. The sum is `h_TD` times one number per token, plus one matrix product with
        the vectors of all constant experts."""
        dtype = accumulation_dtype(h_TD.dtype)
        with torch.autocast(device_type=h_TD.device.type, enabled=False):  # autocast would run the products in bf16
            x_TD = h_TD.to(dtype)
            identity_TF, constant_Tc = weight_TF[:, : self.num_identity], weight_TF[:, self.num_identity :]
            scale_T = identity_TF.sum(1)
            if not self.with_constants:
                return (scale_T[:, None] * x_TD).to(h_TD.dtype)
            stacks = [self.get_submodule(name) for name in self.with_constants]
            gate_c2D = torch.cat([stack.gate for stack in stacks]).to(dtype)  # pyright: ignore
            vector_cD = torch.cat([stack.vector for stack in stacks]).to(dtype)  # pyright: ignore
            mix_Tc2 = (x_TD @ gate_c2D.flatten(0, 1).T).unflatten(1, (-1, 2)).softmax(-1)
            scale_T = scale_T + (constant_Tc * mix_Tc2[..., 0]).sum(1)
            y_TD = scale_T[:, None] * x_TD + (constant_Tc * mix_Tc2[..., 1]) @ vector_cD
        return y_TD.to(h_TD.dtype)


def has_zero_computation_experts(groups: Sequence[ExpertGroup]) -> bool:
    return any(group.num_identity or group.num_constant for group in groups)
