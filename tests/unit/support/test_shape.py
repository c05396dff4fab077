"""The drawn properties of a test cluster: seeds differ, and moe_dist accepts each drawn site."""

from dataclasses import fields
from pathlib import Path

from moe_dist.config.cluster import load_cluster, seconds_of
from tests.support.shape import Shape

SEEDS = 200


def test_a_seed_gives_one_shape_and_every_part_of_it_is_drawn(tmp_path: Path) -> None:
    shapes = [Shape.draw(seed) for seed in range(SEEDS)]
    assert shapes == [Shape.draw(seed) for seed in range(SEEDS)]
    constant = [each.name for each in fields(Shape) if len({getattr(shape, each.name) for shape in shapes}) == 1]
    assert constant == []
    words = {word for shape in shapes for word in shape.limits.split()}
    assert {word.partition("=")[0] for word in words} == {"MaxTime", "DefaultTime", "MaxNodes", "MaxCPUsPerNode"}
    assert max(shape.late_seconds for shape in shapes) > 90
    assert min(shape.late_seconds for shape in shapes) > 60
    for shape in shapes[:20]:
        path = tmp_path / f"{shape.seed}.yaml"
        path.write_text(shape.site())
        cluster = load_cluster(str(path), {})
        assert (seconds_of(cluster.time), cluster.partition) == (30 * 60, shape.partition)
        assert len(cluster.prelude) == sum(seconds > 0 for seconds in shape.skew)
