"""Computes samples' routing: each chosen MoE layer's router softmax for the last token of each sample's prompt.

Shape letters: S samples, L chosen layers, C choice columns, B samples of a batch.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from moe_dist.comm.collectives import sum_over
from moe_dist.comm.names import SAMPLE_ROUTING
from moe_dist.model.transformer import Transformer
from moe_dist.moe.routing.types import LayerReport, RoutingRequest
from moe_dist.parallel.mesh import Mesh
from moe_dist.train.objective.loss import forward
from moe_dist.train.router_tuning.loader import SampleMaker, batches_by_length
from moe_dist.train.router_tuning.samples import TuningSample


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

        The model runs in evaluation mode and then returns to its former mode. Collective: every rank passes the same
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
        filler = np.zeros(1, np.int64)  # an arbitrary token as each answer, used only as a label
        batch = self._maker.make([TuningSample(each, filler) for each in prompts])
        device = self._group_of_modality.device
        request = RoutingRequest(probe_tokens_A=batch.probe_tokens_B.to(device))
        _, reports = forward(self._model, batch.to(device), self._group_of_modality, request)
        return routing_of(reports, self._places)


def routing_of(reports: Sequence[LayerReport], places: Sequence[int]) -> Tensor:
    """Returns the router softmax [A, L, C] of A probe tokens in the MoE layers whose indices are `places`."""
    found = [reports[place].prob_AC for place in places]
    return torch.stack([each for each in found if each is not None], dim=1)
