"""Chooses between Triton kernels and torch operations for the arithmetic on rows. Triton kernels are chosen only after a
trial on this machine: on small tensors, their values and gradients must equal torch's.

Shape letters are as in `kernels.interface`.
"""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.comm.collectives import CommStats
from moe_dist.moe.dispatch.all_to_all import AllToAllDispatcher
from moe_dist.moe.dispatch.context import DispatchContext
from moe_dist.moe.kernels.interface import RowIndex, RowKernels
from moe_dist.moe.kernels.torch_kernels import TORCH
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.expert_choice import ExpertChoiceRouter
from moe_dist.moe.routers.top_k import Normalise, TopKRouter
from moe_dist.moe.routing.types import ABSENT, Assignments
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement

KernelKind = Literal["auto", "torch", "triton"]
ROWS, PAIRS, HIDDEN, WIDTH = 40, 60, 1040, 1100  # sizes above one block of a kernel
GROUPS = (ExpertGroup("one", 12, 4, 3, WIDTH, 0, ("one",)), ExpertGroup("other", 6, 2, 2, WIDTH, 12, ("other",)))
NORMALISE: tuple[Normalise, ...] = ("none", "true_chosen")
MOST = 0.02  # norm of a difference / norm of the result; bf16 changes a value by at most 0.4 %
Results = list[tuple[str, Tensor]]


def choose_kernels(kind: KernelKind, *, device: torch.device, dtype: torch.dtype) -> tuple[RowKernels, str | None]:
    """Returns the kernels and a reason. The reason is None unless `triton`, or `auto` on CUDA, cannot use Triton kernels.
    `auto` first tests the Triton kernels (`why_not`)."""
    if kind == "torch" or (kind == "auto" and device.type != "cuda"):
        return TORCH, None
    reason = why_not_triton(device, dtype)
    if reason is None:
        from moe_dist.moe.kernels.triton_kernels import TRITON  # imports Triton, which a CPU may lack

        reason = why_not(TRITON, device, dtype) if kind == "auto" else None
        if reason is None:
            return TRITON, None
    return TORCH, reason


def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns the reason why Triton kernels cannot be used, or None. Triton's interpreter can run the kernels on a CPU."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if dtype == torch.float64:
        return "the kernels sum in fp32, which is not enough for a float64 model"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return f"the kernels are for compute capability 8.0 and up, and this GPU has {'.'.join(map(str, capability))}"
    elif os.environ.get("TRITON_INTERPRET") != "1":
        return f"the kernels need CUDA, and this rank computes on {device.type}"
    return None


def why_not(kernels: RowKernels, device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns None if the kernels' results equal torch's, else a text about the difference or failure. Compiles kernels."""
    return why_differ(lambda: _results(kernels, dtype), lambda: _results(TORCH, dtype), device)


def why_differ(ours: Callable[[], Results], torchs: Callable[[], Results], device: torch.device) -> str | None:
    """Returns None if the results of `ours` equal those of `torchs`, else a text that names the difference or failure."""
    try:
        with device:  # the default device may be meta while a model is built
            pairs = list(zip(ours(), torchs(), strict=True))
        for (_, found), (name, expected) in pairs:
            difference = float((found.double() - expected.double()).norm() / expected.double().norm())
            if not difference <= MOST:  # true also for NaN
                return f"in a trial on {device} the {name} of the Triton kernels differs from torch's by {difference:.2g}"
    except Exception as error:  # compilers and drivers raise errors of any class
        return (
            f"in a trial on {device} the Triton kernels failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        )
    return None


def _results(kernels: RowKernels, dtype: torch.dtype) -> Results:
    choices = [each for normalise in NORMALISE for each in _choice(kernels, normalise)]
    return _experts(kernels, dtype) + choices + _experts_choice(kernels) + _plan(kernels)


def _plan(kernels: RowKernels) -> Results:
    """Returns the dispatch plans of a layer on a single rank. Each token has three choices, some of null experts."""
    group, num_tokens = GROUPS[0], 300  # several blocks of tokens
    first_T = torch.arange(num_tokens) * 7
    columns_TK = torch.stack([first_T, first_T + 5, first_T + 9], dim=1) % (group.num_experts + group.num_null)
    expert_N = torch.where(columns_TK < group.num_experts, columns_TK, ABSENT).flatten()
    pairs = Assignments(torch.arange(num_tokens).repeat_interleave(3), expert_N, torch.ones(len(expert_N)), num_choices=3)
    placement = ExpertPlacement((group,), (tuple(group.experts),))
    wire = AllToAll(None, CommStats())
    plan = AllToAllDispatcher(DispatchContext(placement, wire, kernels=kernels)).plan(pairs, num_tokens)
    rows = RowIndex((plan.row_of_pair_Q,), plan.num_own_rows, plan.row_items)
    items = (*rows.items_of_rows, *plan.table_index.items_of_rows)
    lists = (plan.pair_P, plan.order_Q, plan.row_of_pair_Q, plan.row_O, *items)
    return [("plan", each.double()) for each in lists if each is not None]


def random(seed: int, *shape: int) -> Tensor:
    """Returns the same fp32 numbers on every device."""
    drawn = torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    return drawn.to(torch.get_default_device())


def _experts(kernels: RowKernels, dtype: torch.dtype) -> Results:
    """Applies one expert to all pairs, with gradients. Then sums base, own and received rows. Some rows have no pairs."""
    row_Q = torch.arange(PAIRS) * 7 % (ROWS - 3)
    shapes = ((ROWS, HIDDEN), (WIDTH, HIDDEN), (WIDTH, HIDDEN), (WIDTH, HIDDEN), (ROWS, HIDDEN))
    rows_RD, gate, up, down, grad_RD = (random(n, *each).to(dtype) for n, each in enumerate(shapes))
    leaves = {"rows": rows_RD, "gate": gate, "up": up, "down": down, "weights": random(5, PAIRS).sigmoid()}
    for leaf in leaves.values():
        leaf.requires_grad_()
    index = RowIndex((row_Q,), ROWS)
    for_gate_QD, for_up_QD = kernels.gather(rows_RD, index)
    hidden_QF = kernels.swiglu(leaves["weights"], for_gate_QD @ gate.T / HIDDEN**0.5, for_up_QD @ up.T / HIDDEN**0.5)
    out_RD = kernels.sum_pairs(hidden_QF @ down / WIDTH**0.5, leaves["weights"], index, dtype)
    out_RD.backward(grad_RD)
    tables = RowIndex((row_Q[:ROWS], row_Q[ROWS:]), ROWS)
    received_SD = random(6, PAIRS - ROWS, HIDDEN).to(dtype)
    with torch.no_grad():
        summed_MD = kernels.sum_rows(rows_RD, lambda: received_SD, tables, rows_RD)
    gradients = [(f"gradient of {name}", leaf.grad) for name, leaf in leaves.items() if leaf.grad is not None]
    return [("output of experts", out_RD.detach()), ("sum of rows", summed_MD), *gradients]


def _experts_choice(kernels: RowKernels) -> Results:
    """Lets experts choose among the tokens of their group, and computes the sums that a layer reports."""
    groups = tuple(replace(group, num_null=0, first_expert=first) for group, first in zip(GROUPS, (0, 12), strict=True))
    router = ExpertChoiceRouter(RouterContext(HIDDEN, groups, kernels=kernels))
    for n, parameter in enumerate(router.parameters()):
        parameter.data = random(10 + n, *parameter.shape) / HIDDEN**0.5
    routing = router(random(9, ROWS, HIDDEN), torch.arange(ROWS) % 3 - 1)
    counts = routing.counts
    assert counts.kth_score_LE is not None
    assert counts.unrouted_LG is not None
    named = {"experts' choice": routing.assignments.expert_N, "scores": routing.aux.prob_LC}
    named |= {"entropies of scores": counts.entropy_LG, "k-th scores": counts.kth_score_LE}
    named |= {"tokens without an expert": counts.unrouted_LG + 1}
    return [(name, each.detach().double()) for name, each in named.items()]


def _choice(kernels: RowKernels, normalise: Normalise) -> Results:
    """Routes padding and tokens of two groups, which have null experts. Returns choices, weights, sums and a gradient."""
    h_TD = random(7, ROWS, HIDDEN).requires_grad_()
    router = TopKRouter(RouterContext(HIDDEN, GROUPS, kernels=kernels), normalise=normalise)
    for n, parameter in enumerate(router.parameters()):
        parameter.data = random(8 + n, *parameter.shape) / HIDDEN**0.5
    routing = router(h_TD, torch.arange(ROWS) % 3 - 1)
    pairs, counts, aux = routing.assignments, routing.counts, routing.aux
    results = [("choice", pairs.expert_N), ("weights", pairs.weight_N), ("numbers of choices", counts.choices_LC)]
    results += [
        ("probabilities", aux.prob_LC),
        ("squares of log z", aux.log_z_squared_LG),
        ("entropies", counts.entropy_LG),
    ]
    losses = [each.flatten() @ torch.arange(each.numel(), dtype=each.dtype) for _, each in results if each.requires_grad]
    torch.stack(losses).sum().backward()
    assert h_TD.grad is not None
    return [*((name, each.detach()) for name, each in results), ("gradient of the router's input", h_TD.grad)]
