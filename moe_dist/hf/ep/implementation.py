"""The expert-parallel implementation "moe_dist", which transformers builds once for each module of experts.

A token sends one row (hidden state) to each other rank that holds one of its experts. The rank computes the row's (token,
expert) pairs by the model's own experts, adds the weighted outputs in fp32, and sends one row back. transformers'
`all_to_all` sends a row there and back for each pair. The exchange is that of `AllToAllDispatcher`: five collectives and
one host sync in forward, three collectives in backward.

A choice outside [0, E) is absent: a null choice, or padding. It costs no row, no byte and no arithmetic. All ranks must
call the module equally often, and may do so without tokens.

Shape letters: T tokens on this rank, K choices of a token, E experts, D hidden size, N = T x K (token, expert) pairs, R
rows on this rank for this rank's experts, Q pairs computed here.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers.distributed.expert_parallel import EPImplementation, MoEParamShard

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.errors import ConfigError
from moe_dist.moe.dispatch.all_to_all import AllToAllDispatcher
from moe_dist.moe.dispatch.context import DispatchContext
from moe_dist.moe.dispatch.interface import DispatchedRows, PairLayout
from moe_dist.moe.dispatch.ledger import ModuleTraffic
from moe_dist.moe.experts.pairs import compute_pairs
from moe_dist.moe.kernels.torch_kernels import accumulation_dtype
from moe_dist.moe.routing.counts import SentCounts
from moe_dist.moe.routing.types import ABSENT, Assignments
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement


class MoeDistEP(EPImplementation):
    """Sends the tokens of one module of experts to their ranks and back.

    Args:
        experts: The module of experts, whose parameters [E, ...] are sharded over the ranks of `ep_mesh`.
        tp_mesh: Ranks that hold the same tokens. Each sends its slice of them.

    Raises:
        ConfigError: the plan shards no parameter of the experts, or in another way than `torch.chunk`.
    """

    def __init__(self, experts: Any, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self.experts, self.num_experts = experts, _num_experts(experts)
        slots = chunks(self.num_experts, ep_mesh.size())
        held = len(slots[ep_mesh.get_local_rank()])
        if held != self.num_local_experts:
            raise ConfigError(
                f"ep_plan: {type(experts).__name__} holds {self.num_local_experts} of {self.num_experts} experts, but this "
                f'rank of {ep_mesh.size()} must hold {held}; shard its parameters by "grouped_gemm" or "moe_dist_shard"'
            )
        group = ExpertGroup("experts", self.num_experts, num_null=0, top_k=1, ffn_dim=0)
        # An attribute of the module, where `moe_dist.monitor.attach` finds it.
        experts.traffic = self.traffic = ModuleTraffic(slots, ep_mesh.get_local_rank())
        wire = AllToAll(ep_mesh.get_group(), self.traffic)
        self.dispatcher = AllToAllDispatcher(DispatchContext(ExpertPlacement((group,), slots), wire))
        _divide_gradients_once(experts)

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Returns the weighted sum of each token's experts, [T, D]; 0 for a token without an expert."""
        run: Any = self._run  # whose signature `torch.compiler.disable` hides
        if self.tp_mesh.size() == 1:
            return run(hidden_states, top_k_index, top_k_weights)
        inputs = (hidden_states, top_k_index, top_k_weights)
        whole = [DTensor.from_local(each, self.tp_mesh, [Replicate()], run_check=False) for each in inputs]
        # A slice costs nothing in forward. Backward all-gathers the gradients of the slices.
        y_TD = run(*(each.redistribute(self.tp_mesh, [Shard(0)]).to_local() for each in whole)).contiguous()
        shape = hidden_states.shape
        return DTensor.from_local(y_TD, self.tp_mesh, [Shard(0)], shape=shape, stride=(shape[1], 1)).full_tensor()

    @torch.compiler.disable  # the planner reads counts on the host by numpy, which Dynamo cannot trace
    def _run(self, h_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        (num_tokens, choices), expert_N = expert_TK.shape, expert_TK.reshape(-1).long()
        absent_N = (expert_N < 0) | (expert_N >= self.num_experts)
        weight_N = weight_TK.reshape(-1).to(accumulation_dtype(h_TD.dtype)).masked_fill(absent_N, 0.0)
        token_N = torch.arange(num_tokens, device=h_TD.device).repeat_interleave(choices)
        pairs = Assignments(token_N, expert_N.masked_fill(absent_N, ABSENT), weight_N, num_choices=choices)
        self.traffic.training = self.experts.training
        plan = self.dispatcher.plan(pairs, num_tokens, layer="experts")
        self.traffic.add(cast(SentCounts, plan.sent), num_tokens, num_tokens * choices)
        y_TD, _ = self.dispatcher.run(h_TD, weight_N, plan, experts=self._compute)
        return y_TD

    def _compute(self, rows: DispatchedRows, layout: PairLayout) -> Tensor:
        return compute_pairs(self.experts_forward, self.experts.parameters(), rows, layout)


def allow_absent_choices(model: nn.Module) -> None:
    """Makes the experts of a model on one rank skip choices with the index `num_experts`.

    Routers with null choices need this call if `ep_size` is 1. Without it, transformers 5.24 leaves rows of `grouped_mm`
    uninitialised for such choices: the loss is right, and the gradients are garbage. Its "eager" and "batched_mm" raise an
    IndexError or need the call as well. Under `ep_implementation="moe_dist"` absent choices never reach the experts.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "_is_expert_parallel"):
            module._is_expert_parallel = True


def _num_experts(experts: Any) -> int:
    """Returns E, the number of experts on all ranks."""
    sharded = [each for each in experts.parameters(recurse=False) if isinstance(each, DTensor)]
    if not sharded:
        raise ConfigError(
            f"ep_plan: it shards no parameter of {type(experts).__name__}, so each rank would hold all experts; add a "
            'rule such as "model.layers.*.mlp.experts.down_proj": "grouped_gemm" for each of its parameters'
        )
    return sharded[0].shape[0]


def _divide_gradients_once(experts: Any) -> None:
    """Corrects expert gradients in float64 and fp16, where no two ranks hold the same expert.

    FSDP2 (torch 2.13) divides the gradients of such a group by transformers' factor when it copies them, and again in the
    two divisions by which it avoids overflow in dtypes other than fp32 and bf16. The root of the factor makes it right.
    """

    def set_factor(factor: float) -> None:
        weight = next(each for each in experts.parameters(recurse=False) if isinstance(each, DTensor))
        policy = experts._get_fsdp_state()._mp_policy
        divided_twice = (policy.reduce_dtype or weight.dtype) not in (torch.float32, torch.bfloat16)
        if divided_twice and weight.device_mesh["efsdp"].size() == 1:
            factor = math.sqrt(factor)
        type(experts).set_gradient_divide_factor(experts, factor)

    # transformers calls this method after FSDP2 has sharded the module, later than it builds this implementation.
    experts.set_gradient_divide_factor = set_factor


class ChunkedExperts(MoEParamShard):
    """The parallel style "moe_dist_shard", for the place of transformers' "grouped_gemm" in `DistributedConfig.ep_plan`.
    Each rank gets consecutive experts, in the numbers of `torch.chunk`: of 9 experts, the first of 2 ranks gets 5 and the
    second 4. DTensor can save and load no other division.

        experts = "model.layers.*.mlp.experts"
        ep_plan = {f"{experts}.gate_up_proj": "moe_dist_shard", f"{experts}.down_proj": "moe_dist_shard"}
    """

    def __init__(self) -> None:
        super().__init__(Shard(0), shards_expert_dim=True)

    def shard_param(self, module: Any, param: str, mesh: DeviceMesh) -> None:
        """Shards one parameter [E, ...], and gives the module the number of this rank's experts.

        Raises:
            ConfigError: a rank would hold no expert.
        """
        whole = module._parameters.get(param)
        if whole is None:  # a bias that this model does not have
            return
        chunks(whole.shape[0], mesh.size())  # refuses ranks without experts
        shard = distribute_tensor(whole, mesh, [self.placement], src_data_rank=None)
        module.num_experts, module._is_expert_parallel = shard.to_local().shape[0], True
        module._parameters[param] = nn.Parameter(shard, requires_grad=whole.requires_grad)


def chunks(num_experts: int, num_ranks: int) -> tuple[tuple[int, ...], ...]:
    """Returns the experts of each rank, as DTensor cuts dimension 0.

    Raises:
        ConfigError: a rank would hold no expert.
    """
    runs = tuple(tuple(run.tolist()) for run in torch.arange(num_experts).chunk(num_ranks))
    if len(runs) < num_ranks:
        raise ConfigError(
            f"ep_size={num_ranks}: {num_experts} experts in runs of {len(runs[0])} fill only {len(runs)} ranks, and "
            f"transformers cannot load a rank without experts; give ep_size={len(runs)}, or another number of ranks that "
            "such runs fill"
        )
    return runs
