"""Defines router tuning in a training step. It freezes all parameters except chosen routers, and adds the manifold term of
RoMA (arXiv 2511.07419, section 3) to the loss.

    term = lambda * mean over samples i of  sum over neighbours j of W_ij ||r_i - r_j||^2

r_i is the routing of sample i: the concatenated router softmax of the chosen layers for the last token of the prompt. r_j
is the routing of sample j, a constant. It is read from the folder of samples, or recomputed every `refresh_every` steps. A
sample without neighbours counts as 0 in the mean. `neighbours.py` computes the weights W.

Shape letters: S samples, B samples of a micro-batch, K neighbours, L chosen layers, C choice columns, R = L x C.
"""

import base64
import re
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from pydantic import JsonValue
from torch import Tensor, nn

from moe_dist.comm.collectives import queue_copy, sum_over
from moe_dist.comm.names import SAMPLE_ROUTING
from moe_dist.data.batch import Batch
from moe_dist.errors import DataError
from moe_dist.model.transformer import Transformer
from moe_dist.moe.routing.types import LayerReport, RoutingRequest
from moe_dist.parallel.mesh import Mesh
from moe_dist.placement.parameter_names import Role, named_parameters
from moe_dist.train.objective.loss import MicroLoss, forward
from moe_dist.train.router_tuning.loader import SampleBatch, SampleMaker, batches_by_length
from moe_dist.train.router_tuning.neighbours import Neighbours
from moe_dist.train.router_tuning.samples import Samples, TuningSample


class RoutingReader:
    """Computes the routing of samples with one model. Each rank runs the model on a part of the samples.

    Args:
        group_of_modality: int64 [M] on the model's device, index of the expert group of each modality.
        places: Indices of the chosen layers among the MoE layers.
        batch_tokens: Largest number of tokens in a rank's batch, including padding.
    """

    def __init__(
        self,
        model: Transformer,
        maker: SampleMaker,
        *,
        group_of_modality: Tensor,
        places: Sequence[int],
        mesh: Mesh | None = None,
        batch_tokens: int = 4096,
    ) -> None:
        self._model, self._maker, self._group_of_modality = model, maker, group_of_modality
        self._places, self._mesh, self._batch_tokens = tuple(places), mesh, batch_tokens

    @torch.no_grad()
    def __call__(self, prompts: Sequence[np.ndarray]) -> Tensor:
        """Returns the router softmax [S, L, C] of the last token of each prompt, on the host, in fp32 (in float64 if the
        model is float64).

        The model runs in evaluation mode, and its former mode is then restored. Collective: every rank passes the same
        prompts and gets the whole result. The result takes S x L x C numbers of device memory.
        """
        world, tracker = (None, None) if self._mesh is None else (self._mesh.world, self._mesh.tracker)
        training = self._model.training
        self._model.eval()  # routers then have no capacity limit and no noise
        with tracker.among(SAMPLE_ROUTING) if tracker is not None else nullcontext():
            found = self._own_part(prompts)
        self._model.train(training)
        return sum_over(found, world, name=SAMPLE_ROUTING, tracker=tracker).cpu()

    def _own_part(self, prompts: Sequence[np.ndarray]) -> Tensor:
        """Returns the softmax [S, L, C]. Entries of other ranks' prompts are 0, so the sum over ranks has all prompts."""
        lengths, vocab_size = [len(each) for each in prompts], self._model.args.vocab_size
        found: Tensor | None = None
        for indices in batches_by_length(lengths, tokens=self._batch_tokens, vocab_size=vocab_size, mesh=self._mesh):
            read_BLC = self._read([prompts[index] for index in indices])
            if found is None:
                found = read_BLC.new_zeros(len(prompts), *read_BLC.shape[1:])
            found[indices] = read_BLC
        assert found is not None, "there is a prompt"
        return found

    def _read(self, prompts: Sequence[np.ndarray]) -> Tensor:
        filler = np.zeros(1, np.int64)  # an arbitrary token that stands in for each answer and is used only as a label
        batch = self._maker.make([TuningSample(each, filler) for each in prompts])
        device = self._group_of_modality.device
        request = RoutingRequest(probe_tokens_A=batch.probe_tokens_B.to(device))
        _, reports = forward(self._model, batch.to(device), self._group_of_modality, request)
        return routing_of(reports, self._places)


def routing_of(reports: Sequence[LayerReport], places: Sequence[int]) -> Tensor:
    """Returns the router softmax [A, L, C] of A probe tokens in the MoE layers whose indices are `places`."""
    found = [reports[place].prob_AC for place in places]
    return torch.stack([each for each in found if each is not None], dim=1)


_LAYER = re.compile(r"\blayers\.(\d+)\.")


def router_parameters(model: Transformer, layers: Collection[int]) -> dict[str, nn.Parameter]:
    """Returns, by logical name, the router parameters of the layers whose indices are `layers`."""
    routers = [each for each in named_parameters(model) if each.role is Role.ROUTER]
    found = {each.name: (_LAYER.search(each.name), each.parameter) for each in routers}
    return {name: parameter for name, (layer, parameter) in found.items() if layer and int(layer[1]) in layers}


def freeze_all_but_routers(model: Transformer, layers: Collection[int]) -> None:
    """Disables the gradients of all parameters except the routers of `layers`, so that backward ends at the first of these
    layers. Call it before sharding, because FSDP2 then reduces no gradients of frozen parameters.
    """
    kept = router_parameters(model, layers)
    for each in named_parameters(model):
        each.parameter.requires_grad_(each.name in kept)


class Targets(NamedTuple):
    """The constants of the manifold term for one micro-batch, on the model's device."""

    probe_tokens_B: Tensor  # int64, the prompts' last tokens, as in `SampleBatch`
    target_BKR: Tensor  # float64, routing r_j of each sample's neighbours
    weight_BK: Tensor  # float64, weights W_ij; 0 where a sample has fewer than K neighbours


def manifold_sum(r_BR: Tensor, target_BKR: Tensor, weight_BK: Tensor) -> Tensor:
    """Returns the sum over samples i and neighbours j of W_ij ||r_i - r_j||^2, in the dtype of `r_BR`."""
    squared_BK = (r_BR[:, None] - target_BKR.detach()).square().sum(-1)  # B x K x R numbers in memory
    return (weight_BK.to(r_BR.dtype) * squared_BK).sum()


@dataclass(frozen=True)
class Chosen:
    """The layers whose routers are trained."""

    layers: tuple[int, ...]  # indices of the chosen layers among all layers
    places: tuple[int, ...]  # indices of the chosen layers among the MoE layers
    stored: tuple[int, ...]  # indices of the chosen layers among the layers whose routing the folder of samples contains


class RouterTuning:
    """Computes the manifold term during a run. Its state is saved and restored.

    Args:
        reader: Recomputes the routing of all samples. This is called a refresh.
        neighbours: Function that returns the neighbours of the sample with a given index.
        weight: lambda divided by the number of samples per step, over all ranks. With 0 there is no term.
        refresh_every: Number of steps from one refresh to the next; None for no refresh.
    """

    def __init__(
        self,
        samples: Samples,
        model: Transformer,
        chosen: Chosen,
        reader: RoutingReader,
        *,
        neighbours: Callable[[int], Neighbours],
        weight: float,
        refresh_every: int | None = None,
    ) -> None:
        self._samples, self._chosen, self._reader, self._neighbours = samples, chosen, reader, neighbours
        self.weight, self._refresh_every = weight, refresh_every
        self._width = len(chosen.places) * samples.manifest.columns  # R, the width of a sample's routing
        self._routers = router_parameters(model, chosen.layers)
        self._refreshed: tuple[int, dict[str, JsonValue]] = (0, {})
        self._routing_SLC: np.ndarray | None = None  # result of the last refresh; None if there was none

    def begin(self, batches: Sequence[Batch], step: int, device: torch.device) -> list[Targets]:
        """Returns the targets of each micro-batch in step `step` (0-based).

        Collective if a refresh is due: all ranks then compute the samples' routing together with the current weights.
        """
        if self._refresh_every is not None and step and step % self._refresh_every == 0:
            self._refreshed = (step, {name: _packed(parameter) for name, parameter in self._routers.items()})
            self._routing_SLC = self._reader(self._samples.prompts()).numpy()
        return [self._targets(batch, device) for batch in batches]

    def _targets(self, batch: Batch, device: torch.device) -> Targets:
        assert isinstance(batch, SampleBatch), "router tuning trains on samples"
        found = [self._neighbours(number) for number in batch.numbers]
        most = max(len(each.number_K) for each in found)
        rows_BKR = np.zeros((len(found), most, self._width))
        weight_BK = np.zeros((len(found), most))
        for row, each in enumerate(found):
            rows_BKR[row, : len(each.number_K)] = self._rows(each.number_K)
            weight_BK[row, : len(each.weight_K)] = each.weight_K
        parts = (batch.probe_tokens_B, torch.from_numpy(rows_BKR), torch.from_numpy(weight_BK))
        return Targets(*(queue_copy(part, device) for part in parts))

    def _rows(self, number_K: np.ndarray) -> np.ndarray:
        """Returns the routing [K, R] of the K samples `number_K` in the chosen layers."""
        if self._routing_SLC is not None:
            return self._routing_SLC[number_K].reshape(len(number_K), self._width)
        stored_KLC = self._samples.routing_SLC[number_K]  # reads K rows of the memory-mapped file
        return stored_KLC[:, list(self._chosen.stored)].reshape(len(number_K), self._width)

    def add(self, loss: MicroLoss, reports: Sequence[LayerReport], targets: Targets) -> MicroLoss:
        """Adds this micro-batch's part of the manifold term to the loss."""
        r_BR = routing_of(reports, self._chosen.places).flatten(1)
        term = self.weight * manifold_sum(r_BR, targets.target_BKR.to(r_BR.dtype), targets.weight_BK)
        return loss._replace(total=loss.total + term, auxiliary=term.detach().to(torch.float64))

    def state(self) -> JsonValue:
        """Returns the samples' digest, and step and router weights of the last refresh, so that `restore` can repeat it."""
        step, routers = self._refreshed
        return {"samples": self._samples.digest, "refreshed": step, "routers": dict(routers)}

    def restore(self, state: JsonValue) -> None:
        """Restores a state that `state` returned. Load the model's weights first. Collective. Raises DataError if the state
        is invalid or belongs to other samples."""
        if not isinstance(state, dict) or state.keys() != {"samples", "refreshed", "routers"}:
            raise DataError(
                f"a checkpoint's state of router tuning must hold samples, refreshed and routers, not {state!r:.80}"
            )
        if state["samples"] != self._samples.digest:
            raise DataError(
                "router_tuning.data: these are not the samples that the run was tuned on (the manifest's SHA-256 is "
                f"{self._samples.digest[:16]}..., it was {str(state['samples'])[:16]}...); put those back, or start anew",
                see="docs/router-tuning.md",
            )
        step, routers = state["refreshed"], state["routers"]
        names = list(self._routers) if step else []
        if type(step) is not int or not isinstance(routers, dict) or sorted(routers) != sorted(names):
            raise DataError(f"a checkpoint's state of router tuning is damaged: {state!r:.80}")
        self._refreshed = (step, routers)
        if not step:
            return
        now = {name: parameter.detach().clone() for name, parameter in self._routers.items()}
        with torch.no_grad():
            for name, parameter in self._routers.items():  # sets the router weights of the last refresh, to repeat it
                parameter.copy_(_unpacked(routers[name], parameter, name))
            self._routing_SLC = self._reader(self._samples.prompts()).numpy()
            for name, parameter in self._routers.items():
                parameter.copy_(now[name])


def _packed(parameter: Tensor) -> str:
    return base64.b64encode(parameter.detach().cpu().contiguous().numpy().tobytes()).decode()  # device-to-host sync


def _unpacked(text: JsonValue, like: Tensor, name: str) -> Tensor:
    try:
        content = base64.b64decode(text) if isinstance(text, str) else b""
    except ValueError:
        content = b""
    if len(content) != like.numel() * like.element_size():
        raise DataError(f"a checkpoint's state of router tuning is damaged: {name} has {len(content)} bytes")
    return torch.frombuffer(bytearray(content), dtype=like.dtype).view(like.shape)
