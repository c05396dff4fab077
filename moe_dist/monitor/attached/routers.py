"""Finds the routers of other systems' models, and counts the choices that these routers make.

The routers of a transformers model, of any family, are the modules whose logits the model can record
(`_can_record_outputs`). For other systems, `ROUTERS` has one line per router class.

Shape letters: B sequences, S positions, T = B x S tokens, D hidden size, L MoE layers, E experts, K choices of a token.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_dist.errors import ConfigError
from moe_dist.moe.dispatch.ledger import in_backward
from moe_dist.moe.routers.recorded import recorded_routers
from moe_dist.moe.routing.types import ABSENT

GUIDE = "docs/monitoring.md"
PROBABILITY_ERROR = 1e-2  # largest error of a sum of bf16 probabilities
EXTRA = 2  # numbers after a layer's E expert counts: number of tokens, and sum of their entropies


class Choices(NamedTuple):
    """The decisions of a router: the chosen experts, int64 [T, K], the best first; the routing weights; and the logits [T,
    E]. A choice outside [0, E), such as a null choice, counts as absent."""

    ids_TK: Tensor
    weights_TK: Tensor
    logits_TE: Tensor


class RouterKind(NamedTuple):
    """Describes how the routers of one system are read.

    Attributes:
        shape: Returns three numbers: of experts, of choices per token, and of ranks that share the experts.
        read: Returns the choices. Its arguments are the router, its inputs, and its output.
        sequence_first: True if tokens have the order [S, B], False if they have the order [B, S].
        fault: Returns the reason why a router's choices cannot be read from its output; "" if they can be read.
    """

    shape: Callable[[Any], tuple[int, int, int]]
    read: Callable[[Any, tuple[Any, ...], Any], Choices]
    sequence_first: bool = False
    fault: Callable[[Any], str] = lambda _: ""


def _of_transformers(router: Any, inputs: tuple[Any, ...], output: Any) -> Choices:
    scores_TE, weights_TK, ids_TK, *_ = output
    scores_TE = scores_TE.float()
    # Some families and versions return probabilities. Their logarithms are logits. The test costs no device sync.
    probabilities = (scores_TE >= 0).all() & ((scores_TE.sum(-1) - 1).abs() < PROBABILITY_ERROR).all()
    return Choices(ids_TK, weights_TK, torch.where(probabilities, scores_TE.log(), scores_TE))


def _of_megatron(router: Any, inputs: tuple[Any, ...], output: Any) -> Choices:
    probs_TE, map_TE = output  # routing weights, and a boolean map of the chosen (token, expert) pairs
    weights_TK, ids_TK = torch.where(map_TE, probs_TE, -1.0).topk(router.topk, dim=-1)
    return Choices(ids_TK, weights_TK, router.gating(inputs[0]).flatten(0, -2))


def _megatron_fault(router: Any) -> str:
    factor = router.config.moe_expert_capacity_factor
    if factor is None:
        return ""
    return (
        f"moe_expert_capacity_factor={factor:g}: the router's output lacks the dropped choices; set it to None, or give "
        "Megatron-Core's own trace (--moe-routing-trace-path) to moe-dist report"
    )


TRANSFORMERS = RouterKind(lambda router: (router.num_experts, router.top_k, 1), _of_transformers)
MEGATRON = RouterKind(
    lambda router: (router.num_experts, router.topk, router.config.expert_model_parallel_size),
    _of_megatron,
    sequence_first=True,
    fault=_megatron_fault,
)
# Class of a router of a system other than transformers -> functions that read the router's choices.
ROUTERS: dict[str, RouterKind] = {"megatron.core.transformer.moe.router.TopKRouter": MEGATRON}


class Routers(NamedTuple):
    """A model's routers, all of one shape: their modules, layer indices (L), and the numbers of `RouterKind.shape`."""

    modules: tuple[nn.Module, ...]
    layers: tuple[int, ...]
    kind: RouterKind
    num_experts: int
    top_k: int
    ranks: int

    @property
    def device(self) -> torch.device:
        """The device of the first router."""
        return next(self.modules[0].parameters()).device


def find_routers(model: nn.Module) -> Routers:
    """Finds the routers of a model. Raises ConfigError if there is no router of a known class, if the routers differ in
    shape or class, if a router is already watched, or if choices cannot be read from a router's output."""
    recorded = recorded_routers(model)
    kinds = {name: (module, _kind_of(module, recorded)) for name, module in model.named_modules()}
    found = {name: (module, kind) for name, (module, kind) in kinds.items() if kind is not None}
    if not found:
        raise ConfigError(
            f"attach: {type(model).__name__} has no router of a known class: none whose router_logits a transformers model "
            f"can record, and none of {', '.join(ROUTERS)}; give a whole model with such routers, or add a line to ROUTERS "
            "in moe_dist/monitor/attached/routers.py",
            see=GUIDE,
        )
    first, (module, kind) = next(iter(found.items()))
    shape = kind.shape(module)
    for name, (other, its_kind) in found.items():
        if (its_kind, its_kind.shape(other)) != (kind, shape):
            raise ConfigError(
                f"attach: {name} has {its_kind.shape(other)[:2]} experts and choices a token, but {first} has {shape[:2]}; "
                "all routers must have one shape: attach to the part of the model that has routers of one shape",
                see=GUIDE,
            )
        if any(isinstance(hook, RouterHook) for hook in other._forward_hooks.values()):
            raise ConfigError(
                f"attach: {name} is watched already, and would be counted twice; detach() the earlier one first", see=GUIDE
            )
        if fault := kind.fault(other):
            raise ConfigError(f"attach: {name}, {fault}", see=GUIDE)
    num_experts, top_k, ranks = shape
    parallel = getattr(getattr(model, "config", None), "distributed_config", None)  # of a transformers model
    ranks *= getattr(parallel, "ep_size", 1)
    return Routers(tuple(module for module, _ in found.values()), _layers(found), kind, num_experts, top_k, ranks)


def _kind_of(module: nn.Module, recorded: tuple[type, ...]) -> RouterKind | None:
    if isinstance(module, recorded) and hasattr(module, "num_experts") and hasattr(module, "top_k"):
        return TRANSFORMERS
    names = (f"{each.__module__}.{each.__qualname__}" for each in type(module).__mro__)  # FSDP2 makes subclasses
    return next((ROUTERS[name] for name in names if name in ROUTERS), None)


def _layers(found: dict[str, Any]) -> tuple[int, ...]:
    """Returns layer indices. These are Megatron's `layer_number` - 1; or the numbers in names such as
    model.layers.3.mlp.gate; or 0, 1, ..."""
    layers = []
    for name, (module, _) in found.items():
        number, digits = getattr(module, "layer_number", None), re.search(r"\d+", name)
        layers.append(number - 1 if number is not None else int(digits[0]) if digits else -1)
    return tuple(layers) if len({-1, *layers}) == 1 + len(layers) else tuple(range(len(layers)))


class MicroBatch(NamedTuple):
    """Arguments of the model's forward: token ids and attention mask (0 is padding), each [B, S], or None if missing."""

    tokens_BS: Tensor | None
    mask_BS: Tensor | None


class Traced(NamedTuple):
    """One forward pass of a router: ids (int16 [T, K]) and weights (float16 [T, K]) of chosen experts; the micro-batch."""

    ids_TK: Tensor
    weights_TK: Tensor
    batch: MicroBatch


class Counts:
    """Sums over the forward passes of a step, on the routers' devices. If `keep` is True, also keeps single
    choices for a trace: (2 + 2) x K bytes per token and layer."""

    def __init__(self, routers: Routers, *, eval_mode: bool = False) -> None:
        self._routers, self.keep, self._batch = routers, False, MicroBatch(None, None)
        self.eval_mode = eval_mode
        self._start()

    @property
    def on(self) -> bool:
        """Whether forward passes of the model count in its present mode."""
        return self.eval_mode or self._routers.modules[0].training

    def see(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Stores the arguments of the model's forward, before it runs."""
        found = kwargs.get("input_ids", args[0] if args else None), kwargs.get("attention_mask")
        self._batch = MicroBatch(*(each if isinstance(each, Tensor) and each.ndim == 2 else None for each in found))

    def forget(self, *_: Any) -> None:
        """Drops the stored arguments after the model's forward has run."""
        self._batch = MicroBatch(None, None)

    def add(self, layer: int, choices: Choices) -> None:
        """Adds the choices of one forward pass of a layer (its index in L), without a device sync."""
        ids_TK, batch = choices.ids_TK, self._batch
        real_T = self._real(batch.mask_BS, ids_TK)
        entropy_T = torch.special.entr(choices.logits_TE.float().softmax(-1)).sum(-1)
        new = torch.zeros(self._routers.num_experts + EXTRA, dtype=torch.float64, device=ids_TK.device)
        present_TK = (ids_TK >= 0) & (ids_TK < self._routers.num_experts)
        ids_TK = ids_TK.masked_fill(~present_TK, ABSENT)
        taken_TK = real_T[:, None] & present_TK
        new[:-EXTRA].scatter_add_(0, ids_TK.clamp(min=0).flatten(), taken_TK.flatten().double())
        new[-2], new[-1] = real_T.sum(), torch.where(real_T, entropy_T, 0.0).sum()
        self._sums[layer] = new + self._sums[layer].to(ids_TK.device)
        if self.keep:
            self._parts[layer].append(Traced(ids_TK.to(torch.int16), choices.weights_TK.detach().half(), batch))

    def take(self) -> tuple[Tensor, list[list[Traced]]]:
        """Returns the sums, float64 [L, E + EXTRA], and each layer's kept forward passes. Then resets both."""
        sums, parts = torch.stack([each.to(self._sums[0].device) for each in self._sums]), self._parts
        self._start()
        return sums, parts

    def _start(self) -> None:
        width = self._routers.num_experts + EXTRA
        devices = [next(module.parameters()).device for module in self._routers.modules]
        self._sums = [torch.zeros(width, dtype=torch.float64, device=device) for device in devices]
        self._parts: list[list[Traced]] = [[] for _ in devices]

    def _real(self, mask_BS: Tensor | None, ids_TK: Tensor) -> Tensor:
        """Returns which tokens are not padding, bool [T]. Ignores an attention mask whose size differs from T."""
        if mask_BS is None or mask_BS.numel() != len(ids_TK):
            return torch.ones(len(ids_TK), dtype=torch.bool, device=ids_TK.device)
        ordered = mask_BS.T if self._routers.kind.sequence_first else mask_BS
        return ordered.flatten().to(ids_TK.device).bool()

    def __reduce__(self) -> tuple[Any, ...]:
        return _NoHook, ()


class RouterHook:
    """The forward hook of one router. It counts only in training mode or with `Counts.eval_mode`, and not when backward
    recomputes a forward pass. `most` is the largest number of tokens that it counts, or None."""

    def __init__(self, counts: Counts, kind: RouterKind, layer: int, most: int | None) -> None:
        self._counts, self._kind, self._layer, self._most = counts, kind, layer, most

    @torch.no_grad()
    def __call__(self, router: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if (router.training or self._counts.eval_mode) and not in_backward():
            choices = self._kind.read(router, inputs, output)
            self._counts.add(self._layer, Choices(*(each[: self._most] for each in choices)))

    def __reduce__(self) -> tuple[Any, ...]:
        return _NoHook, ()


class _NoHook:
    """Replaces the hooks in a copied or pickled model, because only the original model is watched."""

    def __call__(self, *_: Any) -> None: ...

    see = forget = __call__
