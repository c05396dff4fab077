"""The comparison of a model before and after its adaptation refuses models with several expert groups."""

from pathlib import Path

from moe_dist.errors import ConfigError
from research.experiments.adapted import check_one_group
from tests.support.messages import refused
from tests.support.tiny import tiny_config


def test_models_with_several_groups_are_refused(tmp_path: Path) -> None:
    group = {"num_experts": 4, "top_k": 2, "ffn_dim": 16, "modalities": ["text", "image"]}
    check_one_group(tiny_config(tmp_path, tmp_path, {"model.moe.groups": {"all": group}}), tmp_path)
    with refused(ConfigError, "model.moe.groups are text, image: the share of experts is that of one group"):
        check_one_group(tiny_config(tmp_path, tmp_path), tmp_path)
