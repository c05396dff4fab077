"""A GPU's peak rate is looked up by the card's name in the driver. If the name is unknown, the run logs a line."""

from types import SimpleNamespace
from typing import Any

import pytest

from moe_dist.config.load import load_config
from moe_dist.monitor.card_peaks import peak_tflops
from moe_dist.plan.preflight import layout_without_data
from moe_dist.train.build.training import loop_settings


@pytest.mark.parametrize(
    ("card", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A10", 125), ("NVIDIA A10G", 70),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("", None),
    ],
)  # fmt: skip
def test_the_peak_of_a_card(card: str, tflops: float | None) -> None:
    assert peak_tflops(card) == tflops


def test_a_run_takes_the_peak_of_its_card() -> None:
    manifest: Any = SimpleNamespace(modalities={}, baselines={})
    for overrides, expected in (
        ([], (8 * 989e12, "NVIDIA H200")),
        (["monitor.peak_tflops=500"], (8 * 500e12, "monitor.peak_tflops")),
        (["parallel.precision=fp32"], (None, "monitor.peak_tflops")),
    ):
        config = load_config("configs/olmoe_1b7b_8gpu.yaml", overrides)
        plan = loop_settings(config, manifest, layout_without_data(config).placement, "NVIDIA H200")
        assert (plan.peak_flops, plan.peak_source) == expected
