from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from moe_dist.config.base.section import PositiveInt, Violation, WholeConfig
from moe_dist.config.dispatchers.base import FIX, KIND, DispatchSection, KernelDispatchSection, either


class AllToAllDispatchSection(DispatchSection):
    """Send a token once to each rank that has experts of the token, however many of them the rank has."""

    builds = "moe_dist.moe.dispatch.choice:all_to_all"
    replicas = True

    kind: Literal["all_to_all"] = "all_to_all"
    overlap: bool = False
    """During the all-to-all, compute the shared expert and the rows whose token and expert are on the same rank, in forward
    and backward. The overlap doubles the number of expert GEMMs."""
    chunks: PositiveInt = 1
    """Number of chunks into which a layer divides its tokens. It dispatches a chunk while it computes the previous one."""


WIDTH = 256  # in DeepEP's combine, each of the 32 threads of a warp reads 16 bytes of a row
MOST_CHOICES = 32  # DeepEP uses one thread of a warp for each choice of a token


class DeepEPV2DispatchSection(KernelDispatchSection):
    """Use the kernels of DeepEP V2 (ElasticBuffer). Needs the package deep_ep."""

    builds = "moe_dist.moe.dispatch.deep_ep_v2:DeepEPDispatcher"
    # DeepEP V1 lacks this module.
    needs_modules = ("deep_ep.buffers.elastic",)
    source = "DeepEP V2 from the main branch of its repository"

    kind: Literal["deep_ep_v2"] = "deep_ep_v2"

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        yield from super().violations_in(config)
        router, width = config.model.moe.router, config.model.hidden_dim
        if width % WIDTH:
            problem = f"{self.name}: model.hidden_dim={width} must be a multiple of {WIDTH}; change it, {FIX}"
            yield Violation((KIND, "model.hidden_dim"), problem)
        if not router.fixed_choices:
            problem = (
                f"{self.name}: needs top_k choices of each token, but with {router.name} any number of experts may take a "
                f"token; set {KIND}=all_to_all"
            )
            yield Violation((KIND, "model.moe.router.kind"), problem)
        for name, group in config.model.moe.groups.items():
            key = f"model.moe.groups.{name}.top_k"
            if group.top_k > MOST_CHOICES:
                problem = f"{self.name}: {key}={group.top_k} must be at most {MOST_CHOICES}; lower it, {FIX}"
                yield Violation((KIND, key), problem)


class HierarchicalDispatchSection(DispatchSection):
    """Send each token at most once to a node, then, inside the node, at most once to a rank."""

    builds = "moe_dist.moe.dispatch.hierarchical:HierarchicalDispatcher"
    replicas = True

    kind: Literal["hierarchical"] = "hierarchical"
    ranks_per_node: PositiveInt = Field(description="Number of consecutive ranks on one node. Must divide parallel.ep.")

    @property
    def node_size(self) -> int:
        return self.ranks_per_node

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        yield from super().violations_in(config)
        ep, key = config.parallel.ep, "parallel.dispatch.ranks_per_node"
        if ep % self.ranks_per_node == 0:
            return
        divisors = either([str(ranks) for ranks in range(1, ep + 1) if ep % ranks == 0])
        problem = f"{key}={self.ranks_per_node}: does not divide parallel.ep={ep}; take {divisors}, or change parallel.ep"
        yield Violation((key, "parallel.ep"), problem)


class HybridEPDispatchSection(KernelDispatchSection):
    """Use the kernels of HybridEP. Needs the package deep_ep from DeepEP's branch hybrid-ep."""

    builds = "moe_dist.moe.dispatch.hybrid_ep:HybridEPDispatcher"
    # HybridEP's extension is the separate module hybrid_ep_cpp, which DeepEP's main branch lacks.
    needs_modules = ("deep_ep", "hybrid_ep_cpp")
    source = "DeepEP from the branch hybrid-ep of its repository"

    kind: Literal["hybrid_ep"] = "hybrid_ep"

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        yield from super().violations_in(config)
        train, width = config.train, config.model.hidden_dim
        tokens = train.micro_batch * config.data.seq_len
        if tokens % 4:  # TMA copies only multiples of 16 bytes
            problem = (
                f"{self.name}: a rank's tokens must be a multiple of 4, but train.micro_batch={train.micro_batch} times "
                f"data.seq_len={config.data.seq_len} is {tokens}; change either, {FIX}"
            )
            yield Violation((KIND, "train.micro_batch", "data.seq_len"), problem)
        if width % 16:
            problem = f"{self.name}: model.hidden_dim={width} must be a multiple of 16; change it, {FIX}"
            yield Violation((KIND, "model.hidden_dim"), problem)


class KnownCountsDispatchSection(DispatchSection):
    """Send one row per (token, expert) pair, without a host sync. Works only if routing does not change the number of
    tokens that each rank sends to each expert."""

    builds = "moe_dist.moe.dispatch.known_counts:KnownCountsDispatcher"
    each_pair = True

    kind: Literal["known_counts"] = "known_counts"

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        yield from super().violations_in(config)
        if reason := config.model.moe.router.counts_unknown():
            problem = f"the number of pairs of each rank and expert must be known before routing, but {reason}, {FIX}"
            yield Violation((KIND, "model.moe.router"), f"{self.name}: {problem}")


class StaticDispatchSection(DispatchSection):
    """Send rows in exchanges of fixed sizes, with padding, without a host sync. The run ends with an error if there are
    more rows than a fixed size allows."""

    builds = "moe_dist.moe.dispatch.static:StaticDispatcher"
    static = True
    needs = (
        ("model.moe.router.fixed_choices", (True,), "each token must have top_k choices"),
        ("model.mixture_of_depths", (None,), "the room is for one number of tokens in all layers"),
        ("model.moe.experts.static", (True,), "the host does not know how many rows experts compute"),
        ("parallel.expert_pair_budget", (None,), "pairs cannot be cut by numbers that the host does not know"),
        ("parallel.max_receive_rows", (None,), "parallel.dispatch.room bounds the rows already"),
    )

    kind: Literal["static"] = "static"
    room: float = Field(default=1.5, ge=1.0, allow_inf_nan=False)
    """Largest number of rows and of (token, expert) pairs that a rank can receive, divided by the number under even loads.
    Under even loads all modalities have equally many tokens, and all experts of a group have equally many tokens."""

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        parallel = config.parallel
        yield from super().violations_in(config)
        if parallel.device != "cpu" and (parallel.precision != "bf16" or parallel.expert_gemm == "loop"):
            problem = (
                "without the number of rows on the host, experts need the grouped product, which on CUDA takes bf16 alone, "
                f"but parallel.precision={parallel.precision} and parallel.expert_gemm={parallel.expert_gemm}; set them to "
                f"bf16 and auto, {FIX}"
            )
            yield Violation((KIND, "parallel.expert_gemm"), f"{self.name}: {problem}")
