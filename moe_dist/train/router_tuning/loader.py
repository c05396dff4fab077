"""Makes batches of prompts with answers, for router tuning and for multiple-choice questions. A sequence is one prompt and
its answer; only the answer's tokens are labels.

As in `moe_dist.data.loader`, the order of the training samples depends only on seed and position, not on the ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from moe_dist.comm.collectives import queue_copy
from moe_dist.data.batch import IGNORED, Batch, BatchMaker, Segment
from moe_dist.data.order import ShuffledEpochs, micro_batches
from moe_dist.errors import DataError
from moe_dist.formats.manifest import Manifest
from moe_dist.parallel.mesh import Mesh
from moe_dist.train.router_tuning.samples import Samples, TuningSample

_BATCH_LOGITS = 1 << 26  # most logits per batch: logits and losses take 256 MiB each in fp32


def batches_by_length(lengths: Sequence[int], *, tokens: int, vocab_size: int, mesh: Mesh | None) -> list[list[int]]:
    """Divides sequences into batches of similar length; returns, for each batch of this rank, the indices of its sequences.

    Every rank gets equally many batches, because each rank's experts take part in all ranks' forward passes. A rank's last
    batch may be empty.

    Args:
        lengths: Number of tokens of each sequence; all ranks pass the same lengths.
        tokens: Largest number of tokens per batch, padding included; less for a large `vocab_size`, because of the logits.
    """
    rank, world_size = (0, 1) if mesh is None else (mesh.rank, mesh.world_size)
    most = max(1, min(tokens, _BATCH_LOGITS // vocab_size))
    batches: list[list[int]] = []
    room = 0
    # The longest sequences come first, so that a lack of memory shows in the first batch.
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if room <= 0:
            batches.append([])
            room = max(1, most // lengths[index])
        batches[-1].append(index)
        room -= 1
    batches += [[]] * (-len(batches) % world_size)  # `SampleMaker` fills an empty batch with one sequence of padding
    return batches[rank::world_size]


@dataclass(frozen=True)
class SampleBatch(Batch):
    """A micro-batch with one sample per sequence. The result of `to` is a `Batch` without `numbers` and `probe_tokens_B`.

    Attributes:
        numbers: Indices of the samples in `Samples`.
        probe_tokens_B: int64, index of the last token of each sample's prompt among the B x S tokens. The logits at a
            prompt's last token predict the answer's first token, and this token's routing is the sample's routing.
    """

    numbers: tuple[int, ...]
    probe_tokens_B: torch.Tensor


@dataclass(frozen=True)
class ChoiceBatch(SampleBatch):
    """A micro-batch for the cross entropy of each row's label among the row's choices. The result of `to` keeps the
    choices. A row of `choice_BK` (`model.objective.Choices`) that has only -1 has no label."""

    choice_BK: torch.Tensor

    def to(self, device: torch.device | str) -> Batch:
        choice_BK = queue_copy(self.choice_BK, torch.device(device))
        return replace(self, **vars(super().to(device)), choice_BK=choice_BK)

    def choices(self) -> torch.Tensor:
        return self.choice_BK


class SampleMaker:
    """Makes batches of samples, padded to the longest sample. `manifest` gives the modality of each token id."""

    def __init__(self, manifest: Manifest) -> None:
        self._pad_id, self._modalities = manifest.pad_id, tuple(manifest.modalities.values())
        self._vocab_size = max((end for ranges in self._modalities for _, end in ranges), default=0)
        self.modality_names = tuple(manifest.modalities)

    def make(self, samples: Sequence[TuningSample], numbers: Sequence[int] = ()) -> SampleBatch:
        """Makes a batch with one sequence per sample, or with one sequence of padding if there are no samples. Raises
        DataError if a token id lies outside the vocabulary."""
        rows = []
        for each in samples:
            tokens = np.concatenate([each.prompt, each.answer])
            in_prompt = np.arange(len(tokens)) < len(each.prompt)
            # The last token of an answer is only a label, not an input.
            rows.append([Segment(tokens, np.zeros(len(tokens), bool), len(tokens) - 1, prompt=in_prompt)])
        width = max((segment.length for (segment,) in rows), default=1)
        maker = BatchMaker(seq_len=width, pad_id=self._pad_id, modalities=self._modalities)
        batch = maker.make(rows or [[]])
        last_B = torch.tensor([len(each.prompt) - 1 for each in samples], dtype=torch.int64)
        plain = {field.name: getattr(batch, field.name) for field in fields(Batch)}
        return SampleBatch(**plain, numbers=tuple(numbers), probe_tokens_B=torch.arange(len(samples)) * width + last_B)


class ChoiceMaker(SampleMaker):
    """Makes batches for the cross entropy over choices. A row is a prompt, and its only label is the answer's first token.
    A sample without choices has no label."""

    def make(self, samples: Sequence[TuningSample], numbers: Sequence[int] = ()) -> SampleBatch:
        """See `SampleMaker.make`. All samples must have arrays of choices of equal length. Raises DataError if a token id
        lies outside the vocabulary."""
        batch = super().make([replace(each, answer=each.answer[:1]) for each in samples], numbers)
        rows = [each.choices for each in samples] or [np.full(1, -1)]  # choices of the row of padding
        choice_BK = torch.from_numpy(np.stack(rows).astype(np.int64))
        if int(choice_BK.max()) >= self._vocab_size:
            raise DataError(
                f"token id {int(choice_BK.max())} of a choice is outside the manifest's vocab_size={self._vocab_size}; the "
                "samples belong to other data: prepare them again"
            )
        known_B1 = choice_BK[:, :1] >= 0
        labels = {
            "labels_BS": batch.labels_BS.where(known_B1, IGNORED),
            "label_modality_BS": batch.label_modality_BS.where(known_B1, 0),
        }
        return ChoiceBatch(**{**vars(batch), **labels}, choice_BK=choice_BK)


MAKERS: Mapping[str, type[SampleMaker]] = {"tokens": SampleMaker, "choices": ChoiceMaker}  # by `router_tuning.objective`


class SampleLoader:
    """Makes the training batches of one rank. `batches` and `epochs` work as in `moe_dist.data.loader.TrainLoader`.

    Args:
        samples: The samples. Each epoch contains every sample once, in a new order.
        global_batch: Samples per step, over all ranks; a multiple of world_size * micro_batch.
        micro_batch: Samples per micro-batch of a rank.
    """

    def __init__(
        self,
        samples: Samples,
        maker: SampleMaker,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
    ) -> None:
        self._samples, self._maker = samples, maker
        self._share = {"global_batch": global_batch, "micro_batch": micro_batch, "rank": rank, "world_size": world_size}
        self._epochs = ShuffledEpochs((seed,), len(samples))

    def batches(self, position: int) -> list[Batch]:
        """Returns this rank's micro-batches of the step that starts at sample `position` of the stream of all ranks."""
        made: list[Batch] = []
        for each in self.numbers(position):
            numbers = [self.number(at) for at in each]
            made.append(self._maker.make([self._samples.sample(number) for number in numbers], numbers))
        return made

    def numbers(self, position: int) -> Sequence[Sequence[int]]:
        """Returns the stream positions of the samples in `batches(position)`, by micro-batch."""
        return micro_batches(position, **self._share)

    def number(self, position: int) -> int:
        """Returns the index in `Samples` of the sample at a position of the stream."""
        return self._epochs.at(position)

    def epochs(self, position: int) -> dict[str, float]:
        """Maps each modality to the number of epochs over the samples up to a position, equal for all modalities."""
        return dict.fromkeys(self._maker.modality_names, position / len(self._samples))
