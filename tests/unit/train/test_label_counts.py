"""Label counts by modality equal a loop."""

import torch

from moe_dist.data.batch import IGNORED
from moe_dist.train.objective.loss import labels_by_modality, sums_by_modality


def test_ignored_labels_do_not_count() -> None:
    labels = torch.tensor([[5, IGNORED, 7, 1], [IGNORED, 2, 2, 9]])
    modality = torch.tensor([[0, 0, 1, 0], [1, 2, 0, 2]])
    expected = [0.0] * 4  # the last modality has no labels
    for label, each in zip(labels.flatten().tolist(), modality.flatten().tolist(), strict=True):
        expected[each] += label != IGNORED
    counts = labels_by_modality(labels, modality, 4)
    assert counts.dtype == torch.float64
    assert counts.tolist() == expected == sums_by_modality(torch.ones_like(labels), labels, modality, 4).tolist()
