"""A causal language model of transformers, called as this project's own transformer.

The family's code computes everything but the experts' exchange: the module of experts keeps the stacks [e, ...] of this
rank's experts, and its forward sends each token to the ranks of its experts by an `MoELayer`. A hook on the family's router
keeps the logits, from which reports and balance losses are made.

Shape letters: B sequences, S positions, T = B x S tokens, D hidden size, E experts, K choices of a token, Q (token, expert)
pairs on this rank, R rows on this rank.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.errors import ConfigError
from moe_dist.hf.host.banks import GUIDE, Bank
from moe_dist.hf.host.family import reads_pictures
from moe_dist.hf.host.lora import Place, fold
from moe_dist.hf.host.pictures import groups_of_types, picture_inputs
from moe_dist.model.layers import ModelArgs
from moe_dist.moe.dispatch.interface import DispatchedRows, Dispatcher, PairLayout, RunExperts
from moe_dist.moe.experts.pairs import compute_pairs
from moe_dist.moe.experts.several_banks import OneExchange, SeveralBanks
from moe_dist.moe.kernels.torch_kernels import accumulation_dtype
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.top_k import TopKRouter
from moe_dist.moe.routing.draws import recomputed
from moe_dist.moe.routing.types import NO_REQUEST, ChosenColumns, LayerReport, Recompute, RoutingCache, RoutingRequest
from moe_dist.placement.parameter_names import Role


class Choice(NamedTuple):
    """The output of a family's router: logits [T, E], and the weights and ids of the chosen experts [T, K]."""

    scores_TE: Tensor
    weights_TK: Tensor
    ids_TK: Tensor


class FamilyRouter(TopKRouter):
    """Makes the routing of this project from the choices of a family's router.

    Attributes:
        choice: The family's choice for the tokens of the next call.
        sigmoid: Whether probabilities are sigmoids divided by their sum, instead of a softmax.
    """

    choice: Choice | None = None
    sigmoid = False

    def __init__(self, context: RouterContext, **options: Any) -> None:
        with torch.device("meta"):
            super().__init__(context, **options)
        for group in self.groups:
            self.gate(group)._parameters.clear()  # the family has the rows; a selection bias stays

    def learn(self, family: str, choice: Choice) -> None:
        """Finds out, from a choice of the family's router, whether the weights of chosen experts are proportional to the
        sigmoids of their logits, and not to their exponentials. Raises ConfigError if the router records no logits."""
        scores_TE = choice.scores_TE.detach().double()
        if bool((scores_TE >= 0).all()) and bool(((scores_TE.sum(1) - 1).abs() < 1e-2).all()):
            raise ConfigError(
                f"model.family: the router of {family} records probabilities, but this engine makes reports and losses "
                "from logits; this family cannot be trained by this engine yet",
                see=GUIDE,
            )
        logits_TK = scores_TE.gather(1, choice.ids_TK.long())

        def unequal(scores_TK: Tensor) -> Tensor:
            ratio_TK = choice.weights_TK.detach().double() / scores_TK
            return (ratio_TK.amax(1) / ratio_TK.amin(1)).max()

        self.sigmoid = bool(unequal(logits_TK.sigmoid()) < unequal(logits_TK.exp()))

    def _all_logits(self, h_TD: Tensor, cache: RoutingCache) -> Tensor:
        assert self.choice is not None, "the family's router runs before its experts"
        return self.choice.scores_TE.to(h_TD.dtype)

    def _one_kernel(self, logits_TC: Tensor, cache: RoutingCache) -> bool:
        return False

    def _probs(self, masked_TC: Tensor) -> Tensor:
        if not self.sigmoid:
            return masked_TC.softmax(dim=-1)
        scores_TC = masked_TC.sigmoid()
        return scores_TC / scores_TC.sum(-1, keepdim=True)

    def _choose(self, masked_TC: Tensor, probs_TC: Tensor, group_T: Tensor, cache: RoutingCache) -> Any:
        assert self.choice is not None
        cache.choice_TK = self.choice.ids_TK.long()
        chosen = super()._choose(masked_TC, probs_TC, group_T, cache)
        inside_TK = (chosen.column_TK >= 0) & (chosen.column_TK < self.num_experts)
        return chosen._replace(
            column_TK=chosen.column_TK.clamp(0, self.num_experts - 1),
            valid_TK=chosen.valid_TK & inside_TK,
            true_TK=chosen.true_TK & inside_TK,
            null_TK=chosen.null_TK & inside_TK,
        )

    def _weights(self, masked_TC: Tensor, probs_TC: Tensor, chosen: Any) -> Tensor:
        assert self.choice is not None
        return torch.where(chosen.true_TK, self.choice.weights_TK.to(probs_TC.dtype), 0.0)


class FamilyExperts(nn.Module):
    """Computes rows by a family's module of experts, which holds this rank's stacks. Registers no child: that module, with
    its parameters, stays in the family's model."""

    def __init__(self, experts: Any, local: Sequence[int], args: ModelArgs) -> None:
        super().__init__()
        self._experts, self._forward = (experts,), experts.forward  # in a tuple, so that it is no child
        self._dtype, self.num_local = args.compute_dtype, len(local)
        for name, whole in list(experts.named_parameters(recurse=False)):
            experts._parameters[name] = nn.Parameter(whole.detach()[list(local)].clone())
        experts.num_experts, experts._is_expert_parallel = len(local), True

    def start(self, h_TD: Tensor, *, recompute: bool) -> tuple[Tensor, RunExperts]:
        return h_TD, self._again if recompute else self.compute

    def _again(self, rows: DispatchedRows, layout: PairLayout) -> Tensor:
        return recomputed(self.compute, rows, layout)

    def compute(self, rows: DispatchedRows, layout: PairLayout) -> Tensor:
        (experts,) = self._experts
        stored = dict(experts._parameters)
        # Autocast does not cast the weights of grouped products. Gradients go through the casts to the stored weights.
        cast = {name: None if each is None else each.to(self._dtype) for name, each in stored.items()}
        fold(experts, cast)
        experts._parameters.update(cast)
        try:
            return compute_pairs(self._forward, (each for each in cast.values() if each is not None), rows, layout)
        finally:
            experts._parameters.update(stored)


class _Pass:
    """The inputs of the layers in one forward, their caches, which a recomputation uses again, and their reports."""

    def __init__(self, group_T: Tensor, request: RoutingRequest) -> None:
        self.group_T, self.request = group_T, request
        self.caches, self.reports = dict[str, RoutingCache](), list[LayerReport]()


class HostedModel(nn.Module):
    """A transformers model with this rank's experts, with the interface of `Transformer`.

    Args:
        family: The family's model, on the meta device, with all experts.
        banks: Its MoE layers.
        local: Logical ids of this rank's experts.
        make_router: Makes the part of a layer's router that is this project's (`choices`).
        dispatcher: Exchanges the rows of all layers.
        recompute: `experts`: backward computes this rank's experts again. `block`: whole layers, exchanges included.

    Attributes:
        packed: Whether the family keeps documents of one sequence apart by their positions. If not, each document is a
            sequence of its own, padded to the longest.
        adapters: The weights that have a LoRA adapter.
        no_task_gradient: Whether a token chooses one expert, whose weight the family normalises to a constant.
    """

    in_halves = no_task_gradient = False
    adapters: tuple[Place, ...] = ()

    def __init__(
        self,
        family: Any,
        args: ModelArgs,
        banks: Sequence[Bank],
        *,
        local: Sequence[int],
        make_router: Callable[[], FamilyRouter],
        dispatcher: Dispatcher[Any],
        recompute: Recompute = "none",
    ) -> None:
        super().__init__()
        self.family, self.args, self.packed = family, args, True
        self.banks, self._pass = tuple(banks), list[_Pass]()  # the innermost pass is the last
        self.encodes, self._has_banks = reads_pictures(family.config), len({bank.group for bank in banks}) > 1
        _set_roles(family, banks)
        if recompute == "block":
            family.activation_checkpointing_enable({"use_reentrant": False})
        layers = []
        for number, several in groupby(banks, key=lambda bank: bank.layer):
            parts = list(several)
            modules = [family.get_submodule(each.experts) for each in parts]
            stacks = [
                getattr(module, "runs", FamilyExperts)(module, each.local(local), args)
                for module, each in zip(modules, parts, strict=True)
            ]
            layer = MoELayer(
                norm=nn.Identity(),
                router=make_router(),
                experts=stacks[0] if len(stacks) == 1 else SeveralBanks(stacks),  # pyright: ignore[reportArgumentType]
                dispatcher=dispatcher,
                recompute="experts" if recompute == "experts" else "none",
                name=f"layers.{number}",
            )
            routed, keep = _Routed(layer, self._pass, args.compute_dtype), partial(_keep, layer.router)
            for bank in parts:
                router = family.get_submodule(bank.router)
                router.forward = partial(_in_full_precision, router.forward)
                if not bank.block:
                    router.register_forward_hook(keep)
                    family.get_submodule(bank.experts).forward = routed
            if parts[0].block:
                block = family.get_submodule(parts[0].block)
                routers = [family.get_submodule(each.router) for each in parts]
                block.forward = OneExchange(block, routers, keep, routed)
            layers.append(layer)
        self._layers = tuple(layers)  # in a tuple, because the parameters are the family's
        self.gates = nn.ModuleList(gate for layer in layers for gate in layer.router.children())  # with selection biases

    def forward(
        self,
        tokens_BS: Tensor,
        positions_BS: Tensor,
        documents_BS: Tensor,
        group_BS: Tensor,
        request: RoutingRequest = NO_REQUEST,
        labels_BS: Tensor | None = None,
        objective: Any = None,
        more: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Sequence[LayerReport]]:
        """Returns logits or losses and the layers' reports, as `Transformer.forward` does. An `objective` has `losses_of`.
        `more` has further inputs of the family (`Batch.family_inputs`)."""
        rows, place_BS = (tokens_BS, positions_BS, groups_of_types(group_BS, more or {})), None
        if not self.packed:
            place_BS, rows = _unpacked(documents_BS, *rows)
            if request.probe_tokens_A is not None:
                request = replace(request, probe_tokens_A=place_BS.flatten()[request.probe_tokens_A])
        here = _Pass(rows[2].flatten(), request)
        self._pass.append(here)
        try:
            with self._autocast():
                inputs: dict[str, Any] = {"input_ids": rows[0], "position_ids": rows[1]}
                if self.encodes:
                    inputs = picture_inputs(self.family, *rows, more or {}, banks=self._has_banks)
                logits = self.family(**inputs, use_cache=False).logits
        finally:
            self._pass.pop()
        reports, here.reports = here.reports, []
        reports = reports if place_BS is None else [_in_order(each, place_BS.flatten()) for each in reports]
        if request.on_reports is not None:
            request.on_reports(reports)
        logits_BSV = logits if place_BS is None else logits.flatten(0, 1)[place_BS]
        if labels_BS is None:
            return logits_BSV, reports
        if objective is not None:
            return objective.losses_of(logits_BSV, labels_BS), reports
        logits_BVS = logits_BSV.transpose(1, 2).to(accumulation_dtype(logits_BSV.dtype))
        return F.cross_entropy(logits_BVS, labels_BS, reduction="none"), reports  # leaves out labels of -100

    def _autocast(self) -> Any:
        dtype, device = self.args.compute_dtype, next(self.parameters()).device.type
        return torch.autocast(device, dtype) if dtype in (torch.bfloat16, torch.float16) else nullcontext()

    @contextmanager
    def generating(self, group_of_id_V: Tensor) -> Iterator[Any]:
        """Yields the family's model, whose `generate` may be called if this rank has all experts. Each of its forwards
        routes tokens to the groups of their ids (int64 [V], -1 for an id without group) and makes no report."""

        def begin(_module: Any, _inputs: Any, given: dict[str, Any]) -> None:
            group_BS = groups_of_types(group_of_id_V[given["input_ids"]].clamp_min(0), given)
            self._pass[:] = [_Pass(group_BS.flatten(), NO_REQUEST)]

        hook = self.family.register_forward_pre_hook(begin, with_kwargs=True)
        try:
            with self._autocast():
                yield self.family
        finally:
            hook.remove()
            self._pass.clear()

    def ready(self) -> None:
        """Finds out, from two short documents in one sequence, whether the family keeps documents apart (`packed`), and
        whether its scores are sigmoids. Must be called once all weights are there. Collective."""
        device, length, training = next(self.parameters()).device, 8, self.training
        config = self.family.config
        pictures = [getattr(config, f"{kind}_token_id", -1) for kind in ("image", "video")] if self.encodes else [-1]
        texts = torch.tensor([each for each in range(min(self.args.vocab_size, 2 * length + 2)) if each not in pictures])
        ids, place = texts[torch.arange(2 * length) % len(texts)].to(device)[None], torch.arange(2 * length, device=device)
        embedded: list[Tensor] = []

        def keep(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
            embedded.append(output.detach().requires_grad_())
            return embedded[0]

        self.eval()
        self.packed = True
        choices: list[Choice] = []
        router: Any = self.family.get_submodule(self.banks[0].router)
        hooks = [
            self.family.get_input_embeddings().register_forward_hook(keep),
            router.register_forward_hook(lambda _module, _inputs, output: choices.append(Choice(*output[:3]))),
        ]
        with torch.enable_grad():
            logits, _ = self(ids, place[None] % length, place[None] // length, torch.zeros_like(ids))
            (gradient,) = torch.autograd.grad(logits[:, length:].float().square().sum(), embedded)
        for hook in hooks:
            hook.remove()
        self.train(training)
        # Masked attention gives the embeddings of the other document gradients of exactly 0, in every dtype.
        self.packed = not gradient[:, :length].any()
        weights_TK = choices[0].weights_TK
        constant = weights_TK.shape[1] == 1 and torch.allclose(weights_TK, weights_TK[:1], rtol=1e-3)
        self.no_task_gradient = constant and not hasattr(self.family, "moe_dist_banks")
        for layer in self._layers:
            cast(Any, layer.router).learn(type(self.family).__name__, choices[0])

    def train(self, mode: bool = True) -> "HostedModel":
        for layer in self._layers:
            layer.train(mode)
        return super().train(mode)

    def moe_modules(self) -> list[MoELayer]:
        """Returns the MoE layers, in order."""
        return list(self._layers)

    def router_weights(self) -> set[str]:
        """Returns the names of the family's parameters that are the weights of its routers, if they have this name."""
        return {f"{bank.router}.weight" for bank in self.banks}

    def depth_routers(self) -> list[Any]:
        return []

    def units(self) -> Iterator[nn.Module]:
        """Yields the family's layers, whose parameters FSDP2 gathers together."""
        paths = dict.fromkeys(bank.experts.split(".layers.")[0] + ".layers" for bank in self.banks)
        for path in paths:
            yield from self.family.get_submodule(path).children()

    @torch.no_grad()
    def reset_buffers(self) -> None:
        """Sets what a move from the meta device loses: buffers that the family computes, such as rotary frequencies, tables
        of the routers, and tied weights."""
        self.family.tie_weights()
        for layer in self._layers:
            layer.router.reset_buffers()
        for _, module, owner in with_owners(self.family):
            buffers = {name: each for name, each in module.named_buffers(recurse=False)}
            if buffers:
                made = own_values(owner, module)
                for name, buffer in buffers.items():
                    buffer.copy_(made[name])


def _keep(router: Any, module: nn.Module, inputs: Any, output: Any) -> None:
    """A hook that keeps a family's choice for the MoE layer that follows."""
    router.choice = Choice(*output[:3])


def _in_full_precision(forward: Callable[..., Any], h_TD: Tensor, *more: Any, **named: Any) -> Any:
    """The forward of a family's router without autocast, from fp32 inputs."""
    with torch.autocast(h_TD.device.type, enabled=False):
        return forward(h_TD.to(accumulation_dtype(h_TD.dtype)), *more, **named)


class _Routed:
    """The forward of a family's module of experts: dispatch, this rank's experts, combine."""

    def __init__(self, layer: MoELayer, passes: list[_Pass], dtype: torch.dtype) -> None:
        self._layer, self._passes, self._dtype = layer, passes, dtype
        self._last: _Pass | None = None

    def open(self) -> _Pass:
        """Returns the pass of this call. Backward computes a layer again when no pass is open."""
        self._last = self._passes[-1] if self._passes else self._last
        assert self._last is not None
        return self._last

    def __call__(self, h_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        layer, router = self._layer, cast(Any, self._layer.router)
        again, here = not self._passes, self.open()
        request = here.request
        given = RoutingCache(
            batch_info=request.batch_info, probe_tokens_A=request.probe_tokens_A, keep_choices=request.keep_choices
        )
        cache = here.caches.setdefault(layer.name, given)
        family = router.router if hasattr(router, "router") else router  # a measurement may replace the router
        assert family.choice is not None
        family.choice = family.choice._replace(ids_TK=ids_TK, weights_TK=weights_TK)
        y_TD, report = layer.with_cache(h_TD.to(self._dtype), here.group_T, cache, request.experts_off)
        family.choice = None
        if not again:
            here.reports.append(report)
        if again or not torch.is_grad_enabled():
            here.caches.pop(layer.name)
        return y_TD.to(h_TD.dtype)


def _in_order(report: LayerReport, place_T: Tensor) -> LayerReport:
    """Returns a report whose choices have the order of the packed tokens again."""
    if report.chosen is None:
        return report
    return report._replace(chosen=ChosenColumns(*(each[place_T] for each in report.chosen)))


def with_owners(family: Any) -> Iterator[tuple[str, nn.Module, Any]]:
    """Yields the path of each module, the module, and the innermost model of transformers around it: its rule and its
    configuration initialise the module."""
    owners: dict[str, Any] = {}
    for path, module in family.named_modules():
        owners[path] = module if hasattr(module, "_init_weights") else owners[path.rpartition(".")[0]]
        yield path, module, owners[path]


def own_values(family: Any, module: nn.Module, shapes: dict[str, tuple[int, ...]] | None = None) -> dict[str, Tensor]:
    """Returns the values that the family's own initialisation gives a module's own parameters and buffers, on the host.
    `shapes` replaces the shapes of parameters."""
    shapes = shapes or {name: tuple(each.shape) for name, each in module.named_parameters(recurse=False)}
    copy = object.__new__(module.__class__)  # FSDP2's own `__new__` would call `__init__`
    copy.__dict__.update(module.__dict__, _buffers={}, _modules=_on_meta(module))  # the rule of CLIP also sets children
    with torch.device("cpu"):
        # Zeros, because ERNIE's selection biases are set by the rule of the module around theirs.
        copy._parameters = {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
        for name, each in module._parameters.items():
            copy._parameters.setdefault(name, None if each is None else nn.Parameter(torch.empty(each.shape)))
        for name, each in module._buffers.items():
            copy._buffers[name] = None if each is None else torch.empty(each.shape, dtype=each.dtype)
        family._init_weights(copy)
    named = {**copy._parameters, **copy._buffers}
    return {name: each.detach() for name, each in named.items() if each is not None}


def _on_meta(module: nn.Module) -> dict[str, nn.Module]:
    """Returns copies of a module's children whose tensors have no memory."""
    found: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        copy = object.__new__(child.__class__)
        tensors = {
            kind: {key: None if each is None else torch.empty(each.shape, device="meta") for key, each in own.items()}
            for kind, own in (("_parameters", child._parameters), ("_buffers", child._buffers))
        }
        copy.__dict__.update(child.__dict__, **tensors, _modules=_on_meta(child))
        found[name] = copy
    return found


def _set_roles(family: Any, banks: Sequence[Bank]) -> None:
    family.role = Role.DENSE
    for module in family.modules():
        if isinstance(module, nn.Embedding):
            module.role = Role.EMBEDDING  # pyright: ignore[reportArgumentType]
        elif "Norm" in type(module).__name__:
            module.role = Role.NORM  # pyright: ignore[reportAttributeAccessIssue]
    for bank in banks:
        family.get_submodule(bank.router).role = Role.ROUTER
        family.get_submodule(bank.experts).role = Role.EXPERT


def _unpacked(
    documents_BS: Tensor, tokens_BS: Tensor, positions_BS: Tensor, group_BS: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Returns each token's place in the rows of single documents [N, L], flat, and tokens, positions and groups of these
    rows. Added padding has group -1. Costs a host sync."""
    sequence_BS = torch.arange(len(documents_BS), device=documents_BS.device)[:, None].expand_as(documents_BS)
    names_T = (sequence_BS * (int(documents_BS.max()) + 1) + documents_BS).flatten()
    _, row_T, lengths_N = names_T.unique(return_inverse=True, return_counts=True)
    first_N = lengths_N.cumsum(0) - lengths_N  # names rise along the sequences
    rows, width = len(lengths_N), int(lengths_N.max())
    place_T = row_T * width + torch.arange(len(names_T), device=names_T.device) - first_N[row_T]

    def spread(values_BS: Tensor, fill: int) -> Tensor:
        return values_BS.new_full((rows * width,), fill).scatter(0, place_T, values_BS.flatten()).view(rows, width)

    positions = torch.arange(width, device=names_T.device).expand(rows, width)
    return place_T.view_as(tokens_BS), (spread(tokens_BS, 0), positions, spread(group_BS, -1))
