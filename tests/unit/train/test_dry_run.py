"""Dry runs of all presets need no data. Their figures equal the figures in configs/README.md."""

from pathlib import Path

import pytest
from rich.console import Console

from moe_dist.config.load import load_config
from moe_dist.errors import ConfigError
from moe_dist.train.start.dry_run import bytes_text, count_text, dry_run, estimate, render
from tests.support.invoked import invoke

CONFIGS = Path(__file__).parents[3] / "configs"
PRESETS = sorted(path.name for path in CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize(
    ("name", "billions", "active"),
    [
        ("olmoe_1b7b_8gpu.yaml", 6.92, 1.28),
        ("adamoe_mixtral8x7b_64gpu.yaml", 46.7, 10.1),  # a token takes 1.5 of 8 experts; with Mixtral's 2 of 8 it is 12.9
        ("moma_1b4_4t4i_32gpu.yaml", 7.09, 1.47),
        ("adamoe_mixtral8x7b_64gpu_megatron.yaml", 46.7, 10.1),
        ("adamoe_mixtral8x7b_64gpu_transformers.yaml", 46.7, 10.1),
        ("ernie_vl_28b_64gpu_transformers.yaml", 28.0, 2.08),  # without the picture encoder
        ("adamoe_grok1_512gpu_megatron.yaml", 316.5, 65.2),
    ],
)
def test_large_presets_have_the_published_sizes(name: str, billions: float, active: float) -> None:
    result = estimate(load_config(CONFIGS / name))
    assert result.parts.total / 1e9 == pytest.approx(billions, rel=2e-3)
    assert result.active_parameters / 1e9 == pytest.approx(active, rel=5e-3)
    assert result.rank_memory.total < 72 * 1024**3, "must fit a GPU of 80 GB with room for the allocator"
    assert result.checkpoint_bytes == 12 * result.parts.total


def test_prints_everything_without_data() -> None:
    console = Console(width=200, record=True)
    result = dry_run(load_config(CONFIGS / "moma_1b4_4t4i_32gpu.yaml"), tokens_per_second=1e6, console=console)
    text = console.export_text()
    for row in ("parameters", "active parameters", "FLOPs a token", "memory a rank", "optimizer state", "activations",
                "exchange buffers", "checkpoint", "tokens", "hours"):  # fmt: skip
        assert row in text
    assert "spread evenly over text, image" in text
    assert result.tokens == 120000 * 2048 * 4096
    assert f"{result.tokens / 1e6 / 3600:,.0f}" in text


def test_router_tuning_is_told_by_what_it_trains() -> None:
    config = load_config(CONFIGS / "roma_tiny_cpu.yaml", ["router_tuning.data=none"])
    result = estimate(config)
    routers = 2 * 8 * 96  # two of four layers, 8 experts, width 96, as in docs/router-tuning.md
    assert result.rank_memory.gradients == 4 * routers == 6144
    assert result.rank_memory.optimizer == 8 * routers == 12288
    assert result.checkpoint_bytes == 4 * result.parts.total + 8 * routers
    console = Console(width=200, record=True)
    console.print(render(config, result))
    assert "moments of the tuned routers in fp32" in console.export_text()


def test_a_placement_that_cannot_work_is_refused() -> None:
    path = CONFIGS / "moma_1b4_4t4i_32gpu.yaml"
    for overrides, words in (
        (["parallel.ep=1"], "set placement.policy=interleaved"),
        (["placement.groups.text.ranks=[0, 8]"], r"\[8\] out of range"),
        (["placement.groups.text.ranks=[0]", "placement.groups.image.ranks=[0]"], "must not share ranks"),
        (["placement.policy=explicit", "placement.slots=[[text/0]]"], "lists 1 ranks"),
    ):
        with pytest.raises(ConfigError, match=words):
            estimate(load_config(path, overrides))


def test_the_command_ends_with_78_and_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:

    from moe_dist.train.__main__ import main

    result = invoke(main, CONFIGS / "olmoe_1b7b_8gpu.yaml", "data.seq_len=8192", "--dry-run", code=78)
    assert "data.seq_len=8192: longer than model.max_seq_len=4096" in result.output + result.stderr


@pytest.mark.parametrize("name", PRESETS)
def test_the_table_of_presets_has_the_dry_runs_figures(name: str) -> None:
    config = load_config(CONFIGS / name, ["data.path=/none"])
    result = estimate(config)
    row = next(line for line in (CONFIGS / "README.md").read_text().splitlines() if f"`{name}`" in line)
    cells = [cell.strip() for cell in row.split("|")]
    figures = [
        f"{result.world_size}",
        count_text(result.parts.total).strip(),
        count_text(result.active_parameters).strip(),
        count_text(result.training_flops[0]).strip(),
        bytes_text(result.rank_memory.total),
        bytes_text(result.checkpoint_bytes),
    ]
    assert cells[2:8] == figures, "write these into configs/README.md"
