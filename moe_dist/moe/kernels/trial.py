"""A trial of kernels on a device before a run uses them: values and gradients of small tensors, held to those of torch."""

from collections.abc import Callable

import torch
from torch import Tensor

from moe_dist.moe.dispatch.rows import TORCH
from moe_dist.moe.kernels.interface import RowIndex, RowKernels, TopK

ROWS, PAIRS, HIDDEN, WIDTH, COLUMNS, CHOICES = 40, 100, 64, 96, 16, 3
MOST = 0.02  # norm of a difference over the norm of the result; bf16 rounds a value by up to 0.004 of it
Results = dict[str, Tensor]


def why_not(kernels: RowKernels, device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns None if the kernels give what torch gives, else what differs or failed. Compiles the kernels, and syncs."""
    try:
        found = _experts(kernels, device, dtype) | _choice(kernels.choose if kernels.has_choose else _choose, device)
        expected = _experts(TORCH, device, dtype) | _choice(_choose, device)
        for name, tensor in expected.items():
            difference = float((found[name].double() - tensor.double()).norm() / tensor.double().norm())
            if not difference <= MOST:  # also for NaN
                return f"in a trial on {device} the {name} of the Triton kernels differs from torch's by {difference:.2g}"
    except Exception as error:  # whatever a compiler or a driver raises
        return (
            f"in a trial on {device} the Triton kernels failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        )
    return None


def _random(seed: int, *shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def _experts(kernels: RowKernels, device: torch.device, dtype: torch.dtype) -> Results:
    """One expert on all pairs, with its gradients; and a table of own and received rows. Some rows have no pair."""
    row_Q = (torch.arange(PAIRS) * 7 % (ROWS - 3)).to(device)
    rows_RD, gate, up = (_random(n, ROWS, HIDDEN, device=device, dtype=dtype) for n in range(3))
    down, grad_RD = (_random(n, ROWS, HIDDEN, device=device, dtype=dtype) for n in (3, 4))
    leaves = {"rows": rows_RD, "gate": gate, "up": up, "down": down, "weights": _random(5, PAIRS, device=device).sigmoid()}
    for leaf in leaves.values():
        leaf.requires_grad_()
    index = RowIndex((row_Q,), ROWS)
    for_gate_QD, for_up_QD = kernels.gather(rows_RD, index)
    hidden_QF = kernels.swiglu(leaves["weights"], for_gate_QD @ gate.T / 8, for_up_QD @ up.T / 8)
    out_RD = kernels.sum_pairs(hidden_QF @ down / 8, leaves["weights"], index, dtype)
    out_RD.backward(grad_RD)
    tables = RowIndex((row_Q[:ROWS], row_Q[ROWS:]), ROWS)
    received_SD = _random(6, PAIRS - ROWS, HIDDEN, device=device, dtype=dtype)
    with torch.no_grad():
        summed_MD = kernels.sum_rows(rows_RD, lambda: received_SD, tables)
    gradients = {f"gradient of {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"output of experts": out_RD.detach(), "sum of rows": summed_MD, **gradients}


def _choice(choose: Callable[..., tuple[Tensor, ...]], device: torch.device) -> Results:
    """The choice of a router with one group, and the gradient of its weights."""
    logits_TC = _random(7, ROWS, COLUMNS, device=device).requires_grad_()
    zeros = torch.zeros(COLUMNS, dtype=torch.int64, device=device)
    top_k = TopK(zeros, torch.tensor([CHOICES, 0], device=device), COLUMNS, CHOICES, 1.0, "none")
    group_T = torch.zeros(ROWS, dtype=torch.int64, device=device)
    choice_TK, _, _, weight_N, *_ = choose(logits_TC, group_T, top_k, None)
    (weight_N * torch.arange(weight_N.numel(), device=device)).sum().backward()
    assert logits_TC.grad is not None
    return {"choice": choice_TK, "weights": weight_N.detach(), "gradient of logits": logits_TC.grad}


def _choose(logits_TC: Tensor, _: Tensor, top_k: TopK, __: None) -> tuple[Tensor, ...]:
    weight_TK, choice_TK = logits_TC.softmax(-1).topk(top_k.num_choices)
    return choice_TK, choice_TK, choice_TK, weight_TK.flatten()
