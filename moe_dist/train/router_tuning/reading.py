"""Reads the routing of samples: the softmax of each MoE layer at the last token of their prompts.

Shape letters: S samples, L chosen layers, C choice columns, B samples of a batch.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.comm.collectives import sum_over
from moe_dist.comm.names import SAMPLE_ROUTING
from moe_dist.comm.tracker import CollectiveTracker
from moe_dist.model.transformer import Transformer
from moe_dist.moe.routing import LayerReport, RoutingRequest
from moe_dist.train.loss import forward
from moe_dist.train.router_tuning.loader import SampleMaker
from moe_dist.train.router_tuning.samples import TuningSample

_BATCH_LOGITS = 1 << 26  # 256 MiB in fp32


class RoutingReader:
    """Reads routing with one model; each rank reads its share of the samples.

    Args:
        model: With this rank's experts.
        maker: Makes the batches.
        group_of_modality: int64 [M] on the model's device.
        places: Indices of the chosen layers among the MoE layers.
        world: All ranks; None for one.
        rank, world_size: This rank among them.
        batch_tokens: Tokens in one batch of a rank, padding included; fewer if the vocabulary is large.
        tracker: For the watchdog.
    """

    def __init__(
        self,
        model: Transformer,
        maker: SampleMaker,
        *,
        group_of_modality: Tensor,
        places: Sequence[int],
        world: dist.ProcessGroup | None = None,
        rank: int = 0,
        world_size: int = 1,
        batch_tokens: int = 4096,
        tracker: CollectiveTracker | None = None,
    ) -> None:
        self._model, self._maker, self._group_of_modality = model, maker, group_of_modality
        self._places, self._watch = tuple(places), tracker
        self._world, self._rank, self._world_size = world, rank, world_size
        self._batch_tokens = max(1, min(batch_tokens, _BATCH_LOGITS // model.args.vocab_size))

    @torch.no_grad()
    def __call__(self, prompts: Sequence[np.ndarray]) -> Tensor:
        """Softmax [S, L, C] of each prompt's last token, fp32 (float64 for a float64 model), on the host. The model runs in
        evaluation mode and returns to its former mode. Collective: every rank passes the same prompts and gets the whole
        result. Takes S x L x C numbers of device memory.
        """
        training = self._model.training
        self._model.eval()
        with self._watch.among(SAMPLE_ROUTING) if self._watch is not None else nullcontext():
            found = self._all(prompts)
        self._model.train(training)
        return sum_over(found, self._world, name=SAMPLE_ROUTING, tracker=self._watch).cpu()

    def _all(self, prompts: Sequence[np.ndarray]) -> Tensor:
        """This rank's share; zeros elsewhere, for the sum over ranks."""
        batches = self._batches([len(each) for each in prompts])
        # Every rank runs the same number of batches, since its experts take part in each; the last round is filled by
        # padding.
        batches += [[]] * (-len(batches) % self._world_size)
        found: Tensor | None = None
        for indices in batches[self._rank :: self._world_size]:
            read_BLC = self._read([prompts[index] for index in indices])
            if found is None:
                found = read_BLC.new_zeros(len(prompts), *read_BLC.shape[1:])
            found[indices] = read_BLC
        assert found is not None, "there is a prompt"
        return found

    def _read(self, prompts: Sequence[np.ndarray]) -> Tensor:
        filler = np.zeros(1, np.int64)  # the last token of a row is never an input, so any id will do
        batch = self._maker.make([TuningSample(each, filler) for each in prompts])
        device = self._group_of_modality.device
        request = RoutingRequest(probe_tokens_A=batch.probe_tokens_B.to(device))
        _, reports = forward(self._model, batch.to(device), self._group_of_modality, request)
        return routing_of(reports, self._places)

    def _batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Indices of each batch, the longest prompts first, so that the first batch shows whether memory is enough."""
        batches: list[list[int]] = []
        room = 0
        for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
            if room <= 0:
                batches.append([])
                room = max(1, self._batch_tokens // lengths[index])
            batches[-1].append(index)
            room -= 1
        return batches


def routing_of(reports: Sequence[LayerReport], places: Sequence[int]) -> Tensor:
    """The softmax [A, L, C] of the A probe tokens, in the layers at these indices among the MoE layers."""
    found = [reports[place].prob_AC for place in places]
    return torch.stack([each for each in found if each is not None], dim=1)
