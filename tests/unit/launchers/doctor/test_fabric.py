"""Tests the doctor's results for slow pairs of nodes, and the line that shows the measured figures."""

from itertools import combinations

from launchers.doctor.fabric import judge, read_report, report_line
from moe_dist.parallel.round_robin import Pair, PairExchange
from moe_dist.runtime.node.check_result import Level

NODES = ["n1", "n2", "n3", "n4"]


def measured(slow: list[Pair]) -> dict[Pair, PairExchange]:
    return {pair: PairExchange(0.05, 0.1 if pair in slow else 0.01) for pair in combinations(range(4), 2)}


def test_no_slow_pair() -> None:
    (found,) = judge(measured([]), [], NODES, payload_bytes=10_000_000)
    assert found.level is Level.OK
    assert str(found) == "fabric: 6 pairs of 4 nodes, none twice as slow as the median: 1 GB/s each way in all-to-all"


def test_a_slow_pair_is_named_with_its_figures() -> None:
    (found,) = judge(measured([(1, 3)]), [(1, 3)], NODES, payload_bytes=10_000_000)
    assert found.level is Level.WARNING
    assert str(found).startswith(
        "fabric: n2 and n4 are slow with each other: 100 MB/s in all-to-all, 50 ms per all-reduce; the median pair has "
        "1 GB/s"
    )


def test_a_slow_node_is_named_once_instead_of_its_pairs() -> None:
    slow = [(0, 2), (1, 2), (2, 3)]
    found = judge(measured([*slow, (0, 1)]), [*slow, (0, 1)], NODES, payload_bytes=10_000_000)
    assert [str(each).partition(":")[2][:40] for each in found] == [
        " n3 is slow with every other node: down ",
        " n1 and n2 are slow with each other: 100",
    ]


def test_one_node_has_no_pairs() -> None:
    assert [each.level for each in judge({}, [], ["n1"], payload_bytes=1)] == [Level.NOTE]


def test_the_line_of_a_measurement_gives_its_findings() -> None:
    slow = [(1, 3)]
    line = report_line(measured(slow), slow, NODES, 10_000_000)
    assert read_report(f"0: {line}\n") == judge(measured(slow), slow, NODES, payload_bytes=10_000_000)
    assert read_report("Module cuda/12.8 loaded.\n") is None
