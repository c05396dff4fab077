"""Models of transformers give equal results on one rank, with moe_dist's expert parallelism and with transformers' own.

Values are float64, so a relative difference above 1e-12 is an error of the exchange.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from moe_dist.errors import ConfigError
from tests.support.tiny_hf import VOCAB, save, tiny_model
from tests.support.worlds import RankContext

D, F_DIM = 8, 4  # grouped_mm needs rows whose size is a multiple of 16 bytes


@dataclass(frozen=True)
class Case:
    """A module of experts on several ranks. Each group of `tp` ranks has its own tokens.

    Attributes:
        experts, top_k: E and K.
        tokens: Number of tokens of each group of `tp` ranks.
        chosen: Only experts with a smaller index are chosen; None for all experts.
        absent: Probability that a choice is absent (no expert).
        tp: Number of ranks with the same tokens.
    """

    world: int
    experts: int
    top_k: int
    tokens: tuple[int, ...]
    chosen: int | None = None
    absent: float = 0.0
    tp: int = 1

    def batch(self, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns the tokens, choices and weights of a group of ranks, and the gradient of its output."""
        generator = torch.Generator().manual_seed(group)
        tokens, options = self.tokens[group], {"generator": generator, "dtype": torch.float64}
        h_TD, grad_TD = torch.randn(2, tokens, D, **options)
        scores_TE = torch.randn(tokens, self.experts, **options).softmax(-1)
        weight_TK, expert_TK = scores_TE[:, : self.chosen].topk(self.top_k, -1)
        absent_TK = torch.rand(tokens, self.top_k, generator=generator) < self.absent
        sentinel_TK = torch.where(torch.rand(tokens, self.top_k, generator=generator) < 0.5, self.experts, -1)
        return h_TD.requires_grad_(), torch.where(absent_TK, sentinel_TK, expert_TK), weight_TK.requires_grad_(), grad_TD


CASES = {
    "2 ranks, K 2": Case(2, 16, 2, (11, 7)),
    "2 ranks, K 8": Case(2, 16, 8, (11, 7)),
    "4 ranks, K 2": Case(4, 16, 2, (5, 9, 3, 7)),
    "4 ranks, K 8": Case(4, 16, 8, (5, 9, 3, 7)),
    "5 and 4 experts": Case(2, 9, 2, (11, 7)),
    "3, 3, 3 and 1 expert": Case(4, 10, 3, (5, 9, 3, 7)),
    "absent choices": Case(2, 16, 4, (11, 7), absent=0.4),
    "only absent choices": Case(2, 16, 4, (11, 7), absent=1.0),
    "a rank without tokens": Case(2, 16, 2, (11, 0)),
    "a rank whose experts are not chosen": Case(2, 16, 2, (11, 7), chosen=8),
    "no token at all": Case(2, 16, 2, (0, 0)),
    "2 ranks with the same tokens": Case(4, 16, 4, (5, 9), tp=2),
}


def experts_module(case: Case, implementation: str = "eager", dtype: torch.dtype = torch.float64) -> Any:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(hidden_size=D, moe_intermediate_size=F_DIM, num_experts=case.experts)
    config._experts_implementation = implementation
    experts, generator = Qwen3MoeExperts(config).to(dtype), torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
    return experts


def parallel_experts(case: Case, ep_implementation: str, style: str | None) -> Any:
    from transformers.distributed.expert_parallel import apply_expert_parallelism

    import moe_dist.hf.ep  # noqa: F401

    model: Any = nn.ModuleDict({"experts": experts_module(case)})
    ep_mesh = init_device_mesh("cpu", (case.world,), mesh_dim_names=("ep",))
    tp_mesh = init_device_mesh("cpu", (case.world // case.tp, case.tp), mesh_dim_names=("fsdp", "tp"))["tp"]
    plan = {} if style is None else {"experts.gate_up_proj": style, "experts.down_proj": style}
    plan |= {"experts": "ep_dispatch_experts"}
    apply_expert_parallelism(model, ep_mesh, tp_mesh, plan, ep_implementation)
    return model["experts"]


def results(experts: Any, batches: list[tuple[Tensor, Tensor, Tensor, Tensor]], *, alone: bool = False) -> list[Tensor]:
    """Returns y, dh and dw of each batch, and the gradients of the expert weights summed over batches. With `alone`, adds a
    term of 0, so that experts without tokens also get a gradient, as on several ranks."""
    found = []
    for h_TD, expert_TK, weight_TK, grad_TD in batches:
        y_TD = experts(h_TD, expert_TK, weight_TK)
        if alone:
            y_TD = y_TD + 0.0 * sum(each.sum() for each in (h_TD, weight_TK, *experts.parameters()))
        y_TD.backward(grad_TD)
        found += [y_TD.detach(), h_TD.grad, weight_TK.grad]
    weights = [each.grad for each in experts.parameters()]
    return found + [each.full_tensor() if isinstance(each, DTensor) else each for each in weights]


@contextmanager
def rows_sent() -> Iterator[list[int]]:
    """Lists the number of hidden rows that this rank sends to other ranks in each all-to-all."""
    sent, exchange = [], dist.all_to_all_single

    def counted(received: Tensor, items: Tensor, *splits: Any, **options: Any) -> Any:
        if items.ndim == 2:
            sent.append(len(items))  # a rank sends no row to itself
        return exchange(received, items, *splits, **options)

    with mock.patch.object(dist, "all_to_all_single", counted):
        yield sent


def exchanged(rank: RankContext, case: Case) -> tuple[dict[str, list[np.ndarray]], list[int]]:
    """Returns this rank's results with moe_dist and with transformers' all_to_all, and the rows that moe_dist sent."""
    group = rank.rank // case.tp
    with rows_sent() as sent:
        found = {"moe_dist": results(parallel_experts(case, "moe_dist", "moe_dist_shard"), [case.batch(group)])}
    if not case.absent and case.experts % case.world == 0:
        found["all_to_all"] = results(parallel_experts(case, "all_to_all", "grouped_gemm"), [case.batch(group)])
    return {name: [each.numpy() for each in tensors] for name, tensors in found.items()}, sent


def expected_rows(case: Case) -> np.ndarray:
    """Returns how many tokens of each rank choose an expert on each other rank."""
    rows, most = np.zeros((case.world, case.world), int), -(-case.experts // case.world)
    for group, tokens in enumerate(case.tokens):
        slices = np.array_split(np.arange(tokens), case.tp) if case.tp == 1 else torch.arange(tokens).chunk(case.tp)
        for position, mine in enumerate(slices):
            sender = group * case.tp + position
            for choices in case.batch(group)[1][mine].tolist():
                for receiver in {expert // most for expert in choices if 0 <= expert < case.experts} - {sender}:
                    rows[sender, receiver] += 1
    return rows


@pytest.mark.parametrize("name", CASES)
def test_equals_one_rank(run_in_world: Callable[..., list[Any]], name: str) -> None:
    case = CASES[name]
    one = experts_module(case)
    one._is_expert_parallel = True  # as under EP, the reference skips the index E, which means no expert
    batches = [case.batch(group) for group in range(len(case.tokens))]
    for batch in batches:
        batch[1][batch[1] < 0] = case.experts  # only moe_dist accepts -1
    *of_batches, up, down = (each.numpy() for each in results(one, batches, alone=True))
    rows = expected_rows(case)
    for at, (found, sent) in enumerate(run_in_world(case.world, exchanged, case)):
        group = at // case.tp
        wanted = [*of_batches[3 * group : 3 * group + 3], up, down]
        for implementation, tensors in found.items():
            for what, ours, theirs in zip(("y", "dh", "dw", "dup", "ddown"), tensors, wanted, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12, err_msg=f"{implementation} {what}")
        there, back = rows[at].sum(), rows[:, at].sum()
        assert sent == [there, back, there, back], "dispatch, combine, and the backward of each"


def logits_loss(model: Any, tokens_BS: Tensor) -> Tensor:
    """Returns the loss in the dtype of the logits. The loss of transformers is in fp32."""
    logits_BSV = model(input_ids=tokens_BS).logits
    return F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), tokens_BS[:, 1:].flatten())


def row_of_tokens(rank: int) -> Tensor:
    return torch.randint(0, VOCAB, (1, 12 + 3 * rank), generator=torch.Generator().manual_seed(rank))


def gradients(model: Any) -> dict[str, Tensor]:
    named = ((name, each.grad) for name, each in model.named_parameters() if each.grad is not None)
    return {name: each.full_tensor() if isinstance(each, DTensor) else each for name, each in named}


def worst_difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Returns the largest difference, relative to the largest value of its tensor."""
    assert found.keys() == wanted.keys()
    return max(float((found[name] - each).abs().max() / each.abs().max()) for name, each in wanted.items())


def loaded(folder: Path, ep_implementation: str, ranks: int, *, dtype: str = "float64", **options: Any) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig

    import moe_dist.hf.ep  # noqa: F401

    parallel = DistributedConfig(fsdp_size=ranks, ep_size=ranks, ep_implementation=ep_implementation, **options)
    options = {"dtype": dtype, "experts_implementation": "eager", "attn_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=parallel, **options).train()


def family_on_ranks(
    rank: RankContext, family: str, changes: dict[str, Any], ep_plan: dict[str, str] | None, dtype: str
) -> tuple[float, float, float]:
    """Returns how far loss and gradients are from those of one rank, and the weights from the saved weights."""
    if rank.rank == 0:
        save(tiny_model(family, **changes), rank.folder / "model")
    dist.barrier()
    model = loaded(rank.folder / "model", "auto", 1, dtype=dtype)
    losses = [logits_loss(model, row_of_tokens(each)) for each in range(rank.world_size)]
    torch.stack(losses).mean().backward()
    wanted = gradients(model)
    parallel = loaded(rank.folder / "model", "moe_dist", rank.world_size, dtype=dtype, ep_plan=ep_plan)
    loss = logits_loss(parallel, row_of_tokens(rank.rank))
    loss.backward()
    found = gradients(parallel)
    torch.optim.AdamW(parallel.parameters(), lr=1e-2).step()
    weights = {name: each.full_tensor() for name, each in parallel.state_dict().items() if isinstance(each, DTensor)}
    parallel.save_pretrained(rank.folder / "saved")
    dist.barrier()
    alone = loaded(rank.folder / "saved", "auto", 1, dtype=dtype).state_dict()
    saved = {name: alone[name] for name in weights}
    return (
        float((loss - losses[rank.rank]).detach().abs()),
        worst_difference(found, wanted),
        worst_difference(saved, weights),
    )


UNEVEN = {f"model.layers.*.mlp.experts.{name}": "moe_dist_shard" for name in ("gate_up_proj", "down_proj")}


@pytest.mark.parametrize(
    ("family", "changes", "ep_plan", "dtype", "limit"),
    [
        ("qwen3_moe", {}, None, "float64", 1e-11),
        ("mixtral", {}, None, "float64", 1e-11),
        ("deepseek_v3", {}, None, "float32", 1e-5),  # its routers are fp32, and FSDP2 needs a single dtype
        ("qwen3_moe", {"num_experts": 9}, UNEVEN, "float64", 1e-11),
    ],
)
@pytest.mark.slow
def test_families_equal_one_rank(
    run_in_world: Callable[..., list[Any]],
    family: str,
    changes: dict[str, Any],
    ep_plan: dict[str, str] | None,
    dtype: str,
    limit: float,
) -> None:
    for loss, gradient, saved in run_in_world(2, family_on_ranks, family, changes, ep_plan, dtype):
        assert loss < limit
        assert gradient < limit
        assert saved == 0.0


def compiled(rank: RankContext) -> dict[str, tuple[int, float]]:
    """Returns, for each implementation, the number of graph breaks, and how much compilation changes the loss."""
    from torch._dynamo import reset
    from torch._dynamo.utils import counters

    if rank.rank == 0:
        save(tiny_model("qwen3_moe"), rank.folder / "model")
    dist.barrier()
    found = {}
    for implementation in ("moe_dist", "all_to_all"):
        model = loaded(rank.folder / "model", implementation, rank.world_size)
        plain = float(logits_loss(model, row_of_tokens(rank.rank)).detach())
        reset()
        counters.clear()
        loss = logits_loss(torch.compile(model, backend="aot_eager"), row_of_tokens(rank.rank))
        loss.backward()
        found[implementation] = sum(counters["graph_break"].values()), abs(float(loss.detach()) - plain)
    reset()
    return found


@pytest.mark.full
def test_compile_breaks_the_graph_less_often_than_transformers_own(run_in_world: Callable[..., list[Any]]) -> None:
    for found in run_in_world(2, compiled):
        (ours, difference), (theirs, _) = found["moe_dist"], found["all_to_all"]
        assert 0 < ours < theirs
        assert difference < 1e-12


def divided_twice(rank: RankContext) -> dict[str, dict[str, float]]:
    """Returns the norm of an expert and a router gradient divided by the norm on one rank, by implementation."""
    if rank.rank == 0:
        save(tiny_model("mixtral"), rank.folder / "model")
    dist.barrier()
    one = loaded(rank.folder / "model", "auto", 1)
    torch.stack([logits_loss(one, row_of_tokens(each)) for each in range(rank.world_size)]).mean().backward()
    wanted, found = gradients(one), {}
    for implementation in ("moe_dist", "all_to_all"):
        model = loaded(rank.folder / "model", implementation, rank.world_size)
        logits_loss(model, row_of_tokens(rank.rank)).backward()
        found[implementation] = {
            name: float(each.norm() / wanted[f"model.layers.0.mlp.{name}"].norm())
            for name in ("experts.down_proj", "gate.weight")
            for each in [gradients(model)[f"model.layers.0.mlp.{name}"]]
        }
    return found


def test_float64_gradients_are_divided_once(run_in_world: Callable[..., list[Any]]) -> None:
    """transformers 5.24 with torch 2.13 divides them twice. When this is fixed, remove `_divide_gradients_once`."""
    for found in run_in_world(2, divided_twice):
        assert found["moe_dist"] == pytest.approx({"experts.down_proj": 1.0, "gate.weight": 1.0})
        assert found["all_to_all"] == pytest.approx({"experts.down_proj": 0.5, "gate.weight": 1.0})


@pytest.mark.parametrize("allowed", [False, True])
def test_absent_choices_on_one_rank(allowed: bool) -> None:
    """transformers 5.24 leaves rows of absent choices uninitialised. When this is fixed, remove `allow_absent_choices`."""
    from moe_dist.hf.ep import allow_absent_choices

    case = Case(1, 16, 4, (11,), absent=0.4)
    h_TD, expert_TK, weight_TK, grad_TD = case.batch(0)
    expert_TK[expert_TK < 0] = case.experts
    wanted = experts_module(case)
    allow_absent_choices(wanted)
    found = experts_module(case, "grouped_mm", torch.float32)
    if allowed:
        allow_absent_choices(found)
    gradients = []
    for experts, dtype in ((wanted, torch.float64), (found, torch.float32)):
        h = h_TD.detach().to(dtype).requires_grad_()
        weight_TK = weight_TK.detach().masked_fill(expert_TK == case.experts, 0.0)
        with uninitialised_is_nan():
            experts(h, expert_TK, weight_TK.to(dtype)).backward(grad_TD.to(dtype))
        gradients.append(h.grad.double())  # pyright: ignore[reportOptionalMemberAccess]
    assert torch.allclose(*gradients, rtol=0, atol=1e-4) == allowed


@contextmanager
def uninitialised_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # torch then fills new memory with NaN
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def refused(rank: RankContext, name: str, style: str | None) -> str:
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES

    from moe_dist.hf.ep import ChunkedExperts

    class Halved(ChunkedExperts):
        def shard_param(self, module: Any, param: str, mesh: Any) -> None:
            super().shard_param(module, param, mesh)
            module.num_experts = 3

    ALL_PARALLEL_STYLES.register("halved", Halved())  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError) as found:
        parallel_experts(REFUSED[name], "moe_dist", style)
    return str(found.value)


REFUSED = {"5 and 4 experts": Case(2, 9, 2, ()), "3, 3, 3 and no expert": Case(4, 9, 2, ())}


@pytest.mark.parametrize(
    ("name", "style", "problem"),
    [
        ("5 and 4 experts", None, "ep_plan: it shards no parameter of Qwen3MoeExperts"),
        ("5 and 4 experts", "halved", "holds 3 of 9 experts, but this rank of 2"),
        ("3, 3, 3 and no expert", "moe_dist_shard", "ep_size=4: 9 experts in runs of 3 fill only 3 ranks"),
    ],
)
def test_refuses_plans(run_in_world: Callable[..., list[Any]], name: str, style: str | None, problem: str) -> None:
    assert problem in run_in_world(REFUSED[name].world, refused, name, style)[0]
