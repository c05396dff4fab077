"""Held-out losses equal the results of loops over labels."""

import pytest
import torch

from moe_dist.data.batch import IGNORED, Batch
from moe_dist.train.evaluation.heldout import heldout_losses
from moe_dist.train.objective.loss import forward
from tests.support.transformers import make_transformer

GROUPS = torch.tensor([0, 1])


def batch_of(seed: int) -> Batch:
    """Returns two sequences of 12 tokens: six of text, then six codes of a picture. Every third code is filler."""
    tokens = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(seed))
    labels = tokens.roll(-1, 1)
    labels[:, -1] = IGNORED
    place = torch.arange(12).expand(2, 12)
    none = torch.zeros(2, 12, dtype=torch.int64)
    image = (place >= 6).to(torch.int64)
    return Batch(tokens, labels, place, none.int(), image, image, (image == 1) & (place % 3 == 0), none.bool())


@pytest.mark.parametrize("training", [False, True])
def test_losses_are_means_over_labels_and_the_models_mode_stays(training: bool) -> None:
    model, batches = make_transformer(moe_layers=(1,)).train(training), [batch_of(1), batch_of(2)]
    found = heldout_losses(model, batches, modalities=["text", "image"], group_of_modality=GROUPS, world=None)
    assert model.training is training
    wanted: dict[str, list[float]] = {"text": [], "image": [], "image_no_filler": []}
    for batch in batches:
        with torch.no_grad():
            losses, _ = forward(model.eval(), batch, GROUPS, losses=True)
        for row, column in (batch.labels_BS != IGNORED).nonzero().tolist():
            loss, image = float(losses[row, column]), bool(batch.label_modality_BS[row, column])
            wanted["image" if image else "text"].append(loss)
            if image and not batch.filler_BS[row, column]:
                wanted["image_no_filler"].append(loss)
    assert found.tokens == {name: len(each) for name, each in wanted.items()}
    assert found.loss == pytest.approx({name: sum(each) / len(each) for name, each in wanted.items()}, rel=1e-6)
