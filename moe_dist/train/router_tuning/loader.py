"""Training batches of router tuning: one sample in each row, scored on its right answer only.

The order is a pure function of (seed, position), as in `moe_dist.data.loader`: the same for any number of ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from moe_dist.config.manifest import Manifest
from moe_dist.data.batch import IGNORED, Batch, BatchMaker, Segment
from moe_dist.data.order import ShuffledEpochs, micro_batches
from moe_dist.train.router_tuning.samples import Samples, TuningSample


@dataclass(frozen=True)
class SampleBatch(Batch):
    """A micro-batch with a sample in each row. `to` gives the plain batch; the other fields stay on the host.

    Attributes:
        numbers: Indices of the samples.
        probe_tokens_B: int64, index among the B x S tokens of each prompt's last token. Its logits predict the answer's
            first token, and its routing is the sample's.
    """

    numbers: tuple[int, ...]
    probe_tokens_B: torch.Tensor


class SampleMaker:
    """Makes batches of samples, as wide as the longest one.

    Args:
        manifest: The manifest of the data set, for the modality of each id.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._pad_id, self._modalities = manifest.pad_id, tuple(manifest.modalities.values())

    def make(self, samples: Sequence[TuningSample], numbers: Sequence[int] = ()) -> SampleBatch:
        """One row for each sample; without samples one row of padding.

        Raises:
            DataError: an id lies outside the vocabulary.
        """
        tokens = [np.concatenate([each.prompt, each.answer]) for each in samples]
        width = max((len(each) - 1 for each in tokens), default=1)  # the last token is scored but never an input
        maker = BatchMaker(seq_len=width, pad_id=self._pad_id, modalities=self._modalities)
        batch = maker.make([[Segment(each, np.zeros(len(each), bool), len(each) - 1)] for each in tokens] or [[]])
        last_B = torch.tensor([len(each.prompt) - 1 for each in samples], dtype=torch.int64)
        if samples:
            in_prompt_BS = torch.arange(width) < last_B[:, None]
            batch = replace(
                batch,
                labels_BS=batch.labels_BS.masked_fill(in_prompt_BS, IGNORED),
                label_modality_BS=batch.label_modality_BS.masked_fill(in_prompt_BS, 0),
            )
        probe_tokens_B = torch.arange(len(samples)) * width + last_B
        plain = {field.name: getattr(batch, field.name) for field in fields(Batch)}
        return SampleBatch(**plain, numbers=tuple(numbers), probe_tokens_B=probe_tokens_B)


class SampleLoader:
    """Training batches of one rank: `batches` and `epochs` as in `moe_dist.data.loader.TrainLoader`.

    Args:
        samples: All are trained on once per epoch, in a new order each time.
        manifest: The manifest of the data set.
        seed: Seed of the orders.
        global_batch: Samples of a step over all ranks; a multiple of world_size * micro_batch.
        micro_batch: Samples in a batch.
        rank, world_size: This rank's share of each step.
    """

    def __init__(
        self,
        samples: Samples,
        manifest: Manifest,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
    ) -> None:
        self._samples, self._modalities = samples, tuple(manifest.modalities)
        self._share = {"global_batch": global_batch, "micro_batch": micro_batch, "rank": rank, "world_size": world_size}
        self._maker = SampleMaker(manifest)
        self._epochs = ShuffledEpochs((seed,), len(samples))

    def batches(self, position: int) -> list[Batch]:
        """This rank's micro-batches of the step that starts at sample `position` of the global stream."""
        made: list[Batch] = []
        for each in micro_batches(position, **self._share):
            numbers = [self.number(at) for at in each]
            made.append(self._maker.make([self._samples.sample(number) for number in numbers], numbers))
        return made

    def number(self, position: int) -> int:
        """Index of the sample at a position of the global stream."""
        return self._epochs.at(position)

    def epochs(self, position: int) -> dict[str, float]:
        """How often the samples have been seen, under each of the data's modalities."""
        return dict.fromkeys(self._modalities, position / len(self._samples))
