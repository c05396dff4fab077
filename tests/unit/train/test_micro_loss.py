"""The loss of a micro-batch is the sum of its terms, and label counts by modality equal the counts of a loop."""

import torch

from moe_dist.comm.collectives import joined
from moe_dist.data.batch import IGNORED, Batch
from moe_dist.moe.losses import ColumnTables
from moe_dist.train.objective.loss import (
    AuxSettings,
    forward,
    global_counts,
    labels_by_modality,
    micro_loss,
    sums_by_modality,
)
from tests.support.layouts import GROUPS
from tests.support.transformers import make_transformer


def test_the_total_is_the_mean_cross_entropy_and_each_auxiliary_term() -> None:
    tokens = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(3))
    labels, zero = tokens.roll(-1, 1), torch.zeros_like(tokens)
    labels[:, -1] = IGNORED
    places = torch.arange(8).expand(2, 8)
    batch = Batch(tokens, labels, places, zero.int(), zero, zero, zero.bool(), zero.bool())
    model = make_transformer(moe_layers=(0, 2))
    losses, reports = forward(model, batch, torch.tensor([0]), losses=True)
    loss = micro_loss(
        losses,
        joined([report.aux for report in reports]),
        batch,
        num_modalities=1,
        tables=ColumnTables.on(GROUPS, torch.device("cpu")),
        aux=AuxSettings("vanilla", balance=0.02, z=0.01),
        labels_in_step=torch.tensor(28.0),  # the step has two such micro-batches
        share=torch.tensor(0.5),
        counts=global_counts(joined([report.counts for report in reports]), None)(),
    )
    assert loss.balance > 0.001
    assert loss.z > 0.001
    torch.testing.assert_close(loss.total.double(), losses.sum() / 28 + loss.balance + loss.z, check_dtype=False)


def test_ignored_labels_do_not_count() -> None:
    labels = torch.tensor([[5, IGNORED, 7, 1], [IGNORED, 2, 2, 9]])
    modality = torch.tensor([[0, 0, 1, 0], [1, 2, 0, 2]])
    expected = [0.0] * 4  # the last modality has no labels
    for label, each in zip(labels.flatten().tolist(), modality.flatten().tolist(), strict=True):
        expected[each] += label != IGNORED
    counts = labels_by_modality(labels, modality, 4)
    assert counts.dtype == torch.float64
    assert counts.tolist() == expected == sums_by_modality(torch.ones_like(labels), labels, modality, 4).tolist()
