"""Faults of runs with pictures are named, before the run or by hints, and healthy runs are not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_dist.errors import ConfigError
from moe_dist.formats.manifest import Manifest, PicturesSection, load_manifest
from moe_dist.hf.host.pictures import check_encoder
from moe_dist.monitor.hints import HintWatch
from moe_dist.monitor.setup_hints import Settings
from moe_dist.monitor.statistics import WeightTable
from moe_dist.plan.policies import expert_groups
from moe_dist.plan.preflight import manifest_violations
from tests.support.banked import MODEL, PLACEHOLDER
from tests.support.engine_run import built_run
from tests.support.hosted import hosted_config
from tests.support.messages import refused
from tests.support.one_rank import world_of_one
from tests.unit.monitor.conftest import MODALITIES, draw_placement, draw_statistics, record_of
from tests.unit.monitor.test_weight_hints import GROUPS, LAYERS

NAMES = ("model.visual.blocks.0.attn.qkv.weight", "model.visual.merger.weight", "lm_head.weight")


def hints(*, gradient: float = 1.0, pictures: float = 0.01, most: float | None = None, nats: float = 0.5) -> set[str]:
    """Returns the kinds of hints in 50 steps, of which the 25th and the 50th are measured.

    Args:
        gradient: Norm of the encoder's gradient.
        pictures: Epochs of pictures that a step reads.
        nats: Loss of a label of pictures; one of text has 1 nat, and there are equally many.
    """
    watch = HintWatch(GROUPS, LAYERS, settings=Settings(most_picture_loss=most))
    placement, found = draw_placement(GROUPS, 1), set[str]()
    for step in range(1, 51):
        squares_N3 = np.array([[1.0, 1e-4, gradient], [1.0, 1e-4, gradient], [1.0, 1e-4, 1e-6]])
        table = WeightTable(NAMES, squares_N3, np.ones((3, 16))) if step % 25 == 0 else None
        epochs = {"text": 0.01 * step, "image": pictures * step}
        of_labels = {"labels_M": np.array([100, 100]), "nll_M": np.array([100.0, 100.0 * nats])}
        statistics = draw_statistics(placement, len(LAYERS), step, epochs=epochs, weights=table, **of_labels)
        found |= {hint.kind for hint in watch.update(record_of(statistics, placement, MODALITIES))}
    return found & {"untrained/encoder", "share/image"}


def test_an_encoder_without_gradient_is_named_if_pictures_were_read() -> None:
    assert hints(gradient=0.0) == {"untrained/encoder"}
    assert not hints()
    assert not hints(gradient=0.0, pictures=0.0), "an encoder that reads nothing gets no gradient"


def test_pictures_with_most_of_the_loss_are_named_if_asked() -> None:
    assert hints(most=0.6, nats=2.0) == {"share/image"}
    assert not hints(most=0.7, nats=2.0)
    assert not hints(nats=9.0)


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "healthy": ({}, ""),
    "other tokenizer": ({"pictures": PicturesSection(token_id=PLACEHOLDER - 1, folder="pictures")}, "as --tokenizer"),
    "text": ({"modalities": {"text": ((0, 48), (62, 64)), "image": ((48, 62),)}}, "no vision expert would be trained"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_placeholders_that_reach_no_bank_are_refused(tiny_data: Path, tmp_path: Path, fault: str) -> None:
    changes, reason = FAULTS[fault]
    config = hosted_config(tiny_data, tmp_path, MODEL, {"parallel.ep": 1})
    pictures = PicturesSection(token_id=PLACEHOLDER, folder="pictures")
    manifest: Manifest = load_manifest(tiny_data).model_copy(update={"pictures": pictures, **changes})
    found = [each.problem for each in manifest_violations(config, expert_groups(config.model.moe), manifest)]
    assert len(found) == bool(reason)
    assert all(reason in each for each in found)


def zeroed(name: str) -> bool:
    return "resampler" in name or "vision_tower" in name


@pytest.mark.parametrize("part", [None, zeroed], ids=["healthy", "constant"])
def test_an_encoder_with_constant_output_is_refused(
    tiny_data: Path, tmp_path: Path, part: Callable[[str], bool] | None
) -> None:
    with world_of_one(), built_run(hosted_config(tiny_data, tmp_path, MODEL, {"parallel.ep": 1})) as run:
        model = run.training.parallel.model
        if part is None:
            return check_encoder(model)
        weights = [each for name, each in model.named_parameters() if part(name)]
        assert weights
        with torch.no_grad():
            for each in weights:
                each.zero_()
        with refused(ConfigError, "model.folder", "constant"):
            check_encoder(model)
    return None
