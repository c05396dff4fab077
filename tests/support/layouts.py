"""Trains a small float64 model on made-up batches for three optimizer steps, on any layout of ranks."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

from moe_dist.comm.collectives import CommStats
from moe_dist.config.schema import Config
from moe_dist.data.batch import Batch, BatchMaker, Segment
from moe_dist.model import compiled
from moe_dist.model.initial_weights import normal_tensor
from moe_dist.model.objective import Divergence
from moe_dist.moe.losses import BalanceKind, StepLoad
from moe_dist.moe.thresholds import ThresholdUpdater
from moe_dist.parallel.initialise import initialise, set_whole
from moe_dist.parallel.mesh import Mesh, make_mesh
from moe_dist.parallel.parallelize import ParallelModel, shard
from moe_dist.placement.parameter_names import logical_name, named_parameters
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from moe_dist.plan.policies import replicated_placement
from moe_dist.train.build.moe_layers import build_balance, build_scopes, depth_thresholds
from moe_dist.train.build.training import build_model, build_optimizer, freeze
from moe_dist.train.objective.distillation import Distillation, Teacher
from moe_dist.train.objective.loss import AuxSettings
from moe_dist.train.router_tuning.tuning import freeze_all_but_routers
from moe_dist.train.step.result import StepResult
from moe_dist.train.step.training_step import TrainingStep
from tests.support.agreement import gap_of_choices
from tests.support.parted_set import PartedSet
from tests.support.whole_tensors import carry, logical
from tests.support.worlds import RankContext

SEQ_LEN = 12
HIDDEN_DIM = 16
LAYERS = 2
SEQUENCES = 8  # sequences of a micro-batch on all ranks together
MICRO_BATCHES = 2
STEPS = 3
TEXT, IMAGE = (0, 96), (96, 192)
GROUPS = (ExpertGroup("text", 5, 3, 3, 6, 0, ("text",)), ExpertGroup("image", 3, 2, 2, 10, 5, ("image",)))
E = sum(group.num_experts for group in GROUPS)


@dataclass(frozen=True)
class Layout:
    """A way to distribute the run over ranks, and options of the run."""

    ep: int = 1
    edp: int = 1
    placement: str = "interleaved"
    data: str = "ddp"
    recompute: str = "none"
    precision: str = "float64"
    pair_budget: int | None = None
    capacity: float | None = None
    free: bool = False  # groups have identity and constant experts besides null experts, and a selection bias
    balance: bool = False  # load controllers adjust the selection bias
    balance_per: str = "expert"  # or "group"
    limited: bool = False  # sigmoid scores, limited to one of two node groups
    adaptive: str | None = None  # kind of a router that chooses each token's number of experts
    overlap: bool = False
    chunks: int = 1
    halves: bool = False  # parallel.two_batch_overlap
    ranks_per_node: int | None = None
    choice: str | None = None  # expert choice with this scope: rank, ep_group or world
    choice_causal: str = "threshold"  # "auxiliary" trains only the auxiliary routers
    noise: float = 0.0
    parts: int = 1  # number of parts into which a rank divides each micro-batch
    per_pair: bool = False
    room: float | None = None  # `room` of the dispatcher `static`, which replaces the default dispatcher
    mixture_of_depths: str | None = None  # selection scope of layer 0, which computes 0.3 of the tokens
    depth_causal: str = "threshold"
    tuned: tuple[int, ...] = ()  # trains only the routers of these layers
    lora: str | None = None  # LoRA experts with this kind of weight, and LoRA on the attention, on a frozen base
    ffn_lora: str | None = None  # LoRA on the FFN experts of a frozen base: `each` has one per expert, `shared` one for all
    attention_lora: bool = False  # with ffn_lora, also LoRA on attention and shared expert
    null_logit: str = "each"
    balance_loss: BalanceKind = "null_averaged"
    balance_scope: str = "micro_batch"
    fsdp_gather: str = "micro_batch"
    loss_words: int | None = None
    null_weight: tuple[float, ...] | None = None  # null weights of the balance loss by group
    distilled: Divergence | None = None  # 0.7 of the loss is the KL from a teacher with other weights
    optimizer: str = "adamw"
    compiled: bool = False  # compiles dense parts by torch.compile, without code generation
    tied: bool = False  # the output layer has the embedding's weight
    replicas: bool = False  # experts may get replicas
    depth_parts: int = 1  # for the one-rank oracle: number of equal parts of its tokens, each a selection scope
    form: str | None = None  # a key of FORMS

    @property
    def world_size(self) -> int:
        return self.ep * self.edp

    @property
    def groups(self) -> tuple[ExpertGroup, ...]:
        if self.lora:
            return tuple(replace(group, ffn_dim=10) for group in GROUPS)
        if self.choice:
            return tuple(replace(group, num_null=0, top_k=top_k) for group, top_k in zip(GROUPS, (2, 1), strict=True))  # pyright: ignore
        if self.limited:
            return replace(GROUPS[0], num_experts=4), replace(GROUPS[1], num_experts=4, first_expert=4, num_constant=1)
        if (self.form or "").startswith("gpt_oss"):
            return tuple(replace(group, num_null=0, top_k=2) for group in GROUPS)
        if not self.free:
            return GROUPS
        return replace(GROUPS[0], num_identity=1, num_constant=2), replace(GROUPS[1], num_constant=1)

    def __str__(self) -> str:
        """Returns the number of ranks and each value that is not the default, as the id of a test."""
        chosen = [
            (each.name, getattr(self, each.name)) for each in fields(self)[2:] if getattr(self, each.name) != each.default
        ]
        return "-".join(
            [f"ep{self.ep}-edp{self.edp}", *(name if value is True else f"{name}={value}" for name, value in chosen)]
        )


CONTROLLERS = (
    {"kind": "active_experts", "target": {"text": 1.2, "image": 0.9}, "rate": 0.5, "decay_steps": 2, "per": "expert"},
    {"kind": "loss_free", "rate": 0.01},
)
# Parts of published models that the layouts above lack, as keys of the section `model` and of `model.moe`.
FORMS: dict[str | None, tuple[dict[str, Any], dict[str, Any]]] = {
    None: ({}, {}),
    "longcat_flash": (
        {
            "num_layers": 4, "num_kv_heads": 4, "qk_norm": "none", "rope_dim": 2, "rope_pairs": "adjacent", "head_dim": 6,
            "dense_ffn_dim": 10, "attention": {"kind": "latent", "q_rank": 6, "kv_rank": 5, "value_dim": 3, "scaled": True},
        },
        {"every": 2, "shortcut": True, "shared_ffn_dim": 10},
    ),
    "gpt_oss": (
        {
            "qk_norm": "none", "attention_bias": "qkvo", "attention": {"kind": "sinks"}, "sliding_window": 5,
            "sliding_layers": (0,),
        },
        {"experts": {"kind": "clamped_ffn", "limit": 0.5}, "router": {"kind": "top_k", "logit_bias": True}},
    ),
    "gpt_oss, adapted": (
        {"qk_norm": "none", "attention_bias": "qkvo", "attention": {"kind": "sinks"}},
        {
            "experts": {"kind": "clamped_ffn_lora", "rank": 2, "alpha": 3.0, "swiglu_limit": 0.5},
            "router": {"kind": "top_k", "logit_bias": True},
        },
    ),
    "deepseek_v3, adapted": (
        {
            "num_kv_heads": 4, "qk_norm": "none", "rope_dim": 2, "head_dim": 6,
            "attention": {"kind": "latent", "q_rank": 6, "kv_rank": 5, "value_dim": 3},
            "attention_lora": {"rank": 3, "alpha": 4.0, "targets": ("q_down", "q_up", "kv_down", "kv_up", "o")},
        },
        {},
    ),
    "gating_residual": ({"num_layers": 3}, {"router": {"kind": "gating_residual"}}),
    "clamped experts, nulls": ({"attention": {"kind": "sinks"}}, {"experts": {"kind": "clamped_ffn", "limit": 0.5}}),
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """The results of one rank. Arrays have logical names. Gradients are those of the first step, and
    parameters are those after the last step."""

    steps: list[StepResult]
    gradients: dict[str, np.ndarray]
    parameters: dict[str, np.ndarray]
    events: list[str]
    logits: np.ndarray
    biases: dict[str, np.ndarray]  # biases of all layers and groups; empty without a selection bias
    buffers: dict[str, np.ndarray]
    smallest_gap: float  # smallest gap between a token's last choice and the next column, over tokens, layers and steps


def placement_of(name: str, ep: int, groups: tuple[ExpertGroup, ...] = GROUPS) -> ExpertPlacement:
    """Returns a placement: interleaved; pinned (text experts on the first ranks, image experts on the rest); uneven (the
    last rank has no experts)."""
    slots: list[list[int]] = [[] for _ in range(ep)]
    if name == "interleaved" or ep == 1:
        for expert in range(E):
            slots[expert % ep].append(expert)
    elif name == "pinned":
        for group, ranks in zip(groups, (range(ep // 2), range(ep // 2, ep)), strict=True):
            for i, expert in enumerate(group.experts):
                slots[ranks[i % len(ranks)]].append(expert)
    elif name == "uneven":
        for expert in range(E):
            slots[0 if expert < 4 or ep == 2 else 1 + expert % (ep - 2)].append(expert)
    else:
        raise ValueError(f"unknown placement {name!r}")
    return ExpertPlacement(groups, tuple(tuple(sorted(each)) for each in slots))


def placement_for(layout: Layout) -> ExpertPlacement:
    """Returns the placement of a layout's experts. LoRA experts are on all ranks."""
    if layout.lora:
        return replicated_placement(layout.groups)
    return placement_of(layout.placement, layout.ep, layout.groups)


SIZES = ("num_experts", "num_null", "num_identity", "num_constant", "top_k", "ffn_dim")


def config_of(layout: Layout) -> Config:
    """Returns a configuration that has the layout's settings. Nothing uses its data section."""
    dispatch: dict[str, Any] = {"kind": "all_to_all", "overlap": layout.overlap, "chunks": layout.chunks}
    if layout.per_pair:
        dispatch = {"kind": "known_counts"}
    if layout.room:
        dispatch = {"kind": "static", "room": layout.room}
    if layout.ranks_per_node:
        dispatch = {"kind": "hierarchical", "ranks_per_node": layout.ranks_per_node}
    router: dict[str, Any] = {"kind": "top_k", "selection_bias": layout.free or layout.balance}
    router["null_logit"] = layout.null_logit
    experts: dict[str, Any] = {"kind": "ffn"}
    only: dict[str, str] = {"only": "adapters"} if layout.lora or layout.ffn_lora else {}
    controllers = ({**CONTROLLERS[0], "per": layout.balance_per}, *CONTROLLERS[1:]) if layout.balance else ()
    if layout.adaptive and not layout.choice:
        controllers = ({**CONTROLLERS[0], "proportional": 0.2},)
    if layout.lora:
        router["normalise"] = "none"
        experts = {"kind": "lora", "rank": 2, "alpha": 3.0, "weight": layout.lora}
    if layout.ffn_lora:
        experts = {"kind": "ffn_lora", "rank": 2, "alpha": 3.0, "shared": layout.ffn_lora == "shared"}
        experts["shared_expert"] = layout.attention_lora
    if layout.choice:
        router = {"kind": "expert_choice", "scope": layout.choice, "noise": layout.noise, "causal": layout.choice_causal}
        router["threshold_decay"] = 0.5
        only = {"only": "auxiliary_routers"} if layout.choice_causal == "auxiliary" else {}
    if layout.limited:
        router = {"kind": "group_limited", "n_group": 2, "topk_group": 1, "scale": 2.5}
    if layout.adaptive:
        more = {"warmup_steps": 1} if layout.choice else {}
        router = {**(router if layout.choice else {}), "kind": layout.adaptive, **more}
    depths = {"capacity": 0.3, "scope": layout.mixture_of_depths, "causal": layout.depth_causal, "threshold_decay": 0.5}
    each = max(1, SEQUENCES // layout.world_size)
    of_model, of_moe = FORMS[layout.form]
    moe = {
        "shared_ffn_dim": 0 if layout.lora else 4,
        "experts": experts,
        "groups": {g.name: {size: getattr(g, size) for size in SIZES} for g in layout.groups},
        "router": router,
        "balance": controllers,
        "capacity": None if layout.capacity is None else {"factor": layout.capacity},
        **of_moe,
    }
    parallel = {
        "ep": layout.ep, "edp": layout.edp, "data": layout.data, "recompute": layout.recompute, "dispatch": dispatch,
        "two_batch_overlap": layout.halves, "fsdp_gather": layout.fsdp_gather, "loss_words": layout.loss_words,
        "precision": "bf16" if layout.precision == "bfloat16" else "fp32", "expert_pair_budget": layout.pair_budget,
    }  # fmt: skip
    values = {
        "run": {"name": "layout"},
        "model": {
            "hidden_dim": HIDDEN_DIM, "num_layers": LAYERS, "num_heads": 4, "num_kv_heads": 2, "vocab_size": IMAGE[1],
            "max_seq_len": SEQ_LEN, "qk_norm": "full", "init_std": 0.3, "tie_embeddings": layout.tied,
            "mixture_of_depths": depths if layout.mixture_of_depths else None,
            "attention_lora": {"rank": 3, "alpha": 4.0} if layout.lora or layout.attention_lora else None,
            **of_model,
            "moe": moe,
        },
        "data": {"path": "none", "seq_len": SEQ_LEN},
        "train": {
            "steps": STEPS, "global_batch": SEQUENCES * MICRO_BATCHES, "micro_batch": 2 if layout.halves else each, **only,
        },
        "optimizer": {"kind": layout.optimizer, "lr": 1e-2},
        "parallel": parallel,
        "evaluation": {"every": 1},
        "rank_balance": {"replicating": {} if layout.replicas else None},
    }  # fmt: skip
    return Config.model_validate(values)


def batch_of(step: int, micro: int, first: int, count: int) -> Batch:
    """Returns the sequences [first, first + count) of one micro-batch.

    Sequence 0 is all padding, sequence 1 is all text, sequence 2 is all image, and the other sequences are mixed. With 8
    ranks, one rank therefore has no token, and some ranks have one modality only. A third of the tokens are prompts.

    No token occurs twice. With expert choice or mixture of depths, two equal tokens may have equal scores in exact
    arithmetic: at the start of documents, and in mixture-of-depths layers. Rounding, which depends on the layout, would
    then decide between the two.
    """
    maker = BatchMaker(seq_len=SEQ_LEN, pad_id=0, modalities=[[TEXT], [IMAGE]])
    shuffled = np.random.default_rng([step, micro])
    text, image = (shuffled.permutation(np.arange(*ids))[: SEQUENCES * SEQ_LEN] for ids in (TEXT, IMAGE))
    rows = []
    for sequence in range(first, first + count):
        rng = np.random.default_rng([step, micro, sequence])
        cut = int(rng.integers(3, SEQ_LEN - 3))
        own = slice(sequence * SEQ_LEN, (sequence + 1) * SEQ_LEN)
        tokens = np.where(rng.random(SEQ_LEN) < {1: 1.0, 2: 0.0}.get(sequence, 0.7), text[own], image[own])
        pieces = [] if sequence == 0 else [tokens[:cut], tokens[cut : SEQ_LEN - 1]]
        prompts = [rng.random(len(piece)) < 0.3 for piece in pieces]
        marked = zip(pieces, prompts, strict=True)
        rows.append([Segment(piece, np.zeros(len(piece), bool), len(piece), prompt) for piece, prompt in marked])
    return maker.make(rows)


def build(layout: Layout, mesh: Mesh, comm_stats: CommStats, placement: ExpertPlacement | None = None) -> ParallelModel:
    """Returns the initialised model of a layout on its mesh. Places the experts by `placement`, or by the layout if it
    is None."""
    config, placement = config_of(layout), placement or placement_for(layout)
    dtype = getattr(torch, layout.precision)
    master = torch.float64 if layout.precision == "float64" else torch.float32
    before = torch.get_default_dtype()
    torch.set_default_dtype(master)
    try:
        with torch.device("meta"):
            choice_scope, depth_scope = build_scopes(config, mesh, comm_stats)
            model = build_model(
                config,
                placement,
                ep_rank=mesh.ep_rank,
                ep_group=mesh.ep,
                node_groups=(mesh.inter_node, mesh.intra_node),
                comm_stats=comm_stats,
                compute_dtype=dtype,
                choice_scope=choice_scope,
                depth_scope=depth_scope,
            )
        if layout.depth_parts > 1:
            for router in model.depth_routers():
                router.selection_scope = PartedSet(layout.depth_parts)
        freeze(model, config)
        if layout.tuned:
            freeze_all_but_routers(model, layout.tuned)
        if layout.compiled:
            with mock.patch.object(compiled, "BACKEND", "aot_eager"):
                compiled.compile_dense(model)
        if layout.data == "fsdp2":
            shard(model, mesh, dtype)
        initialise(model, placement, ep_rank=mesh.ep_rank, device=mesh.device, seed=0, std=config.model.init_std)
        draw_second_matrices(model)
    finally:
        torch.set_default_dtype(before)
    return ParallelModel(model, mesh, layout.data, fsdp_gather=layout.fsdp_gather)  # pyright: ignore[reportArgumentType]


def distillation(divergence: Divergence) -> Distillation:
    """Returns the distillation term of a teacher with the default layout's shape. Every rank has the whole teacher."""
    placement = placement_of("interleaved", 1)
    teacher = build_model(config_of(Layout()), placement, ep_rank=0, ep_group=None, compute_dtype=torch.float64).double()
    initialise(teacher, placement, ep_rank=0, device=torch.device("cpu"), seed=7, std=0.3)
    frozen = teacher.requires_grad_(False).eval()
    return Distillation(Teacher(frozen, torch.tensor([0, 1]), divergence=divergence), weight=0.7)


def draw_second_matrices(model: nn.Module) -> None:
    """Draws the adapters' B, because A has no gradient as long as B is 0."""
    for _, name, _, parameter in named_parameters(model):
        if name.endswith((".b", "_b")):
            set_whole(parameter, normal_tensor(name, tuple(parameter.shape), seed=1, std=0.3))


class TrainingRank:
    """One rank of a layout, ready for training steps.

    Args:
        options: Arguments of `TrainingStep` with other values than by default.
    """

    def __init__(self, layout: Layout, **options: Any) -> None:
        config, device = config_of(layout), torch.device("cpu")
        self.placement, self.comm_stats = placement_for(layout), CommStats(events=[])
        self.mesh = make_mesh(ep=layout.ep, device=device, timeout=600.0, ranks_per_node=layout.ranks_per_node)
        self.parallel = build(layout, self.mesh, self.comm_stats)
        self.optimizer = build_optimizer(config, self.parallel.model)
        layers, groups = self.parallel.model.moe_modules(), self.placement.groups
        load = StepLoad(groups, len(layers), device) if layout.balance_scope == "step" else None
        controllers = [
            build_balance(config.model.moe, [layer.router for layer in layers], groups, device),
            ThresholdUpdater.of(layers) if layout.choice_causal == "threshold" else None,
            depth_thresholds(self.parallel.model),
            load,
        ]
        own = {
            "group_of_modality": [0, 1],
            "clip_norm": 0.5,
            "controllers": [each for each in controllers if each is not None],
            "needs_global_batch_info": layout.choice is not None,
            "distillation": distillation(layout.distilled) if layout.distilled else None,
            "load": load,
        }
        stats, placement = self.comm_stats, self.placement
        self.step = TrainingStep(self.parallel, self.optimizer, placement=placement, comm_stats=stats, **{**own, **options})

    def logical(self, *, gradient: bool = False) -> dict[str, np.ndarray]:
        """Returns full parameters or gradients by logical name; see `whole_tensors.logical`."""
        return logical(self.parallel, self.placement, self.mesh, gradient=gradient)


def train(rank: RankContext, layout: Layout, checkpoint: Path | None = None) -> Outcome:
    """Trains the layout, and returns this rank's results.

    Args:
        checkpoint: Folder of the initial weights. A single rank first writes its own weights there.
    """
    training = TrainingRank(layout)
    parallel, placement, mesh, optimizer = training.parallel, training.placement, training.mesh, training.optimizer
    if checkpoint is not None:
        carry(checkpoint, parallel, optimizer, placement, mesh)
    gradients: dict[str, np.ndarray] = {}
    gaps: list[float] = []
    if not (layout.choice or layout.adaptive):
        for layer in parallel.model.moe_modules():
            layer.router.register_forward_hook(lambda router, inputs, _: gaps.append(gap_of_choices(router, *inputs[:2])))

    def keep_gradients(*_: Any) -> None:
        if not gradients:
            gradients.update(training.logical(gradient=True))

    optimizer.register_step_pre_hook(keep_gradients)
    each = SEQUENCES // rank.world_size
    balance, z = (0.0, 0.0) if layout.choice else (0.02, 1e-3)
    aux = AuxSettings(kind=layout.balance_loss, balance=balance, z=z, null_weight_G=layout.null_weight)
    results = []
    for number in range(STEPS):
        length = each // layout.parts
        starts = [rank.rank * each + part * length for part in range(layout.parts)]
        batches = [batch_of(number, micro, start, length) for micro in range(MICRO_BATCHES) for start in starts]
        results.append(training.step(batches, lr=1e-2, aux=aux, number=number))
    if layout.choice:
        parallel.model.eval()
    with torch.no_grad():
        last = batch_of(9, 0, rank.rank * each, each)
        group = torch.where(last.padding_BS, -1, last.modality_BS)
        logits, _ = parallel.model(last.tokens_BS, last.positions_BS, last.documents_BS, group)
    parameters = training.logical()
    buffers = {logical_name(path): each.numpy() for path, each in parallel.model.named_buffers()}
    parameters |= {name: each for name, each in buffers.items() if name.endswith(".threshold")}
    return Outcome(
        steps=results,
        gradients=gradients,
        parameters=parameters,
        events=training.comm_stats.events or [],
        logits=logits.to(torch.promote_types(logits.dtype, torch.float32)).numpy(),
        biases={name: each.copy() for name, each in buffers.items() if name.endswith(".bias")},
        buffers={name: each.copy() for name, each in buffers.items() if "router" in name},
        smallest_gap=min(gaps, default=float("nan")),
    )
