"""Lists layouts of a run with engine.kind=megatron: parameters, memory and FLOPs of a rank. See docs/planning.md.

Step times are not simulated. engine.cp stays as configured, because the length of sequences determines engine.cp. With m
micro-batches, the idle fraction of a pipeline stage is (pp - 1) / vpp / (m + (pp - 1) / vpp) of a step (arXiv 2104.04473,
section 2.2). Layouts are sorted by number of GPUs, the fewest first. Layouts with the same number of GPUs are sorted by
whether their idle fraction exceeds IDLE, then by tp (whose ranks exchange activations in every layer), then by idle
fraction. The configured placement policy comes before other policies, and small EP groups before large groups.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from rich.console import Console
from rich.table import Table

from moe_dist.config.load import model_violations, rule_violations
from moe_dist.config.schema import Config
from moe_dist.errors import ConfigError
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.plan import flops
from moe_dist.plan.answers import best_of_each
from moe_dist.plan.estimate import LIBRARIES, SLACK
from moe_dist.plan.layouts import Placements
from moe_dist.plan.memory import FP32
from moe_dist.plan.planner import fullest_rank
from moe_dist.plan.policies import expert_groups
from moe_dist.plan.summary import per_token

SHOWN = 12
IDLE = 0.1


@dataclass(frozen=True)
class PipelineLayout:
    """A layout, with the parameters and the memory of its fullest rank: the rank that needs the most memory."""

    config: Config
    parameters: float  # parameters of the fullest rank
    memory: float  # bytes of memory of the fullest rank
    flops: float  # FLOPs of a rank in a step, recomputation included
    idle: float  # fraction of a step in which a pipeline stage is idle

    @property
    def gpus(self) -> int:
        return self.config.parallel.ep * self.config.parallel.edp

    @property
    def needed(self) -> float:
        """Returns the fullest rank's bytes of memory, including the allocator's losses and the libraries' memory."""
        return (1 + SLACK) * self.memory + LIBRARIES

    def order(self, policy: str) -> tuple[int, bool, int, float, bool, int]:
        """Returns the key by which layouts are sorted; see the module's docstring. `policy` is the configured placement."""
        engine: Any = self.config.engine
        other = self.config.placement.policy != policy
        return self.gpus, self.idle > IDLE, engine.tp, self.idle, other, self.config.parallel.ep


def plan_layouts(
    config: Config, counts: Sequence[int], token_mix: Mapping[str, int], *, node: int, most: float
) -> PipelineLayout:
    """Prints the first layouts on `counts` GPUs that fit into `most` bytes of memory per GPU, and returns the first of
    them. `node` is the number of ranks of a node, and the largest `engine.tp`. Raises ConfigError if every layout breaks a
    rule of the configuration, or if no layout fits into memory."""
    every = [each for count in counts for each in _layouts(config, count, token_mix, node=node)]
    if not every:
        engine: Any = config.engine
        raise ConfigError(
            f"--gpus {', '.join(map(str, counts))}: no degrees of engine.tp, engine.pp and engine.vpp keep the rules of "
            f"engine.kind=megatron with engine.cp={engine.cp}, train.global_batch={config.train.global_batch} and "
            f"train.micro_batch={config.train.micro_batch}; take another number of GPUs, or a larger train.global_batch",
            see="docs/megatron.md",
        )
    fitting = sorted((each for each in every if each.needed <= most), key=lambda each: each.order(config.placement.policy))
    if not fitting:
        least = min(every, key=lambda each: each.memory)
        section, parallel = least.config.engine, least.config.parallel
        ways = ["more GPUs"]
        ways += [] if getattr(section, "distributed_optimizer", True) else ["engine.distributed_optimizer=true"]
        ways += [] if parallel.recompute == "experts" else ["parallel.recompute=experts"]
        raise ConfigError(
            f"--memory {most / 1e9:g}: none of {len(every)} layouts fits; the nearest needs {least.needed / 1e9:.1f} GB on "
            f"{least.gpus} GPUs: {_name(least.config)}; take {' or '.join(ways)}",
            see="docs/megatron.md",
        )
    _print(config, fitting, len(every))
    return fitting[0]


def _layouts(config: Config, gpus: int, token_mix: Mapping[str, int], *, node: int) -> Iterator[PipelineLayout]:
    groups = expert_groups(config.model.moe)
    placements = Placements(config, token_mix)
    layers = config.model.num_layers
    for tp, pp in product(_divisors(gpus, node), (n for n in _divisors(layers) if gpus % n == 0)):
        for vpp in _divisors(layers // pp) if pp > 1 else (1,):
            engine = config.engine.model_copy(update={"tp": tp, "pp": pp, "vpp": vpp, "layers": None})
            for ep in _divisors(gpus // pp, sum(group.num_experts for group in groups)):
                parallel = config.parallel.model_copy(update={"ep": ep, "edp": gpus // ep})
                for section, placement in placements.of(ep):
                    found = config.model_copy(update={"engine": engine, "parallel": parallel, "placement": section})
                    if not rule_violations(found) and not model_violations(found):
                        yield _layout(found, placement, token_mix)


def _layout(config: Config, placement: ExpertPlacement, token_mix: Mapping[str, int]) -> PipelineLayout:
    engine: Any = config.engine
    _, memory, _ = fullest_rank(config, placement, token_mix)
    experts = per_token(placement.groups, token_mix)
    forward = flops.forward_flops(config.model, seq_len=config.data.seq_len, **experts)
    tokens = config.train.global_batch * config.data.seq_len / (config.parallel.ep * config.parallel.edp)
    micro_batches = config.train.global_batch // (config.train.micro_batch * engine.data_ranks(config.parallel))
    filling = (engine.pp - 1) / engine.vpp
    return PipelineLayout(
        config,
        parameters=memory.gradients / FP32,  # one fp32 gradient for each parameter that the rank holds
        memory=memory.total,
        flops=tokens * flops.training_flops(forward, recompute=config.parallel.recompute),
        idle=filling / (micro_batches + filling),
    )


def _divisors(number: int, most: int | None = None) -> list[int]:
    return [n for n in range(1, min(number, most or number) + 1) if number % n == 0]


def _name(config: Config) -> str:
    parallel = config.parallel
    return f"ep {parallel.ep} x edp {parallel.edp}{config.engine.degrees_text()}, {config.placement.policy}"


def _print(config: Config, fitting: Sequence[PipelineLayout], count: int) -> None:
    table = Table(title=f"{config.run.name}: {count} layouts, {len(fitting)} fit", title_justify="left")
    table.caption = (
        f"The first of each tp and pp, by GPUs, tp, then by idle time of the pipeline (above {IDLE:.0%} last), then by ep. "
        "Times are not simulated. Parameters, memory: fullest rank, uniform routing. PFLOPs: of a rank in a step."
    )
    for head in ("GPUs", "layout", "idle", "parameters", "GB of memory", "PFLOPs"):
        table.add_column(head, justify="left" if head == "layout" else "right")

    def degrees(each: PipelineLayout) -> tuple[int, int, int]:
        engine: Any = each.config.engine
        return each.gpus, engine.tp, engine.pp

    for each in best_of_each(fitting, degrees)[:SHOWN]:
        sizes = (f"{each.parameters / 1e9:.3f} G", f"{each.memory / 1e9:.3g}", f"{each.flops / 1e15:.3g}")
        style = "bold" if each is fitting[0] else None
        table.add_row(str(each.gpus), _name(each.config), f"{each.idle:.1%}", *sizes, style=style)
    Console(width=None if Console().is_terminal else 160, highlight=False).print(table)
