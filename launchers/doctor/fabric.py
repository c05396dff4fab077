"""Finds slow nodes and slow pairs of nodes in the measured bandwidths."""

from collections.abc import Mapping, Sequence

from moe_dist.doctor.check_result import CheckResult, names, note, ok, warning
from moe_dist.parallel.round_robin import Pair, PairExchange, usual

CHECK = "fabric"


def judge(
    measured: Mapping[Pair, PairExchange], slow: Sequence[Pair], nodes: Sequence[str], *, payload_bytes: int
) -> list[CheckResult]:
    """One result per cause: a node that is slow with every other node, or a single slow pair.

    Args:
        measured: Best time of each pair.
        slow: Pairs that were slow in two measurements.
        nodes: Node names by index.
        payload_bytes: Bytes that each node of a pair sends in an all-to-all.
    """
    if len(nodes) < 2:
        return [note(CHECK, "one node: no pair to measure")]
    rate = _rate(payload_bytes, usual(each.all_to_all for each in measured.values()))
    if not slow:
        few = "; too few pairs to compare" if len(measured) < 3 else ", none twice as slow as the median"
        return [ok(CHECK, f"{len(measured)} pairs of {len(nodes)} nodes{few}: {rate} each way in all-to-all")]
    results, left = [], list(slow)
    for node, name in enumerate(nodes):
        own = [pair for pair in left if node in pair]
        if len(own) == len(nodes) - 1 and len(nodes) > 2:
            worst = max(measured[pair].all_to_all for pair in own)
            left = [pair for pair in left if node not in pair]
            text = f"{name} is slow with every other node: down to {_rate(payload_bytes, worst)}, other pairs {rate}"
            exclude = f"exclude it (cluster file: options: [--exclude={name}])"
            fix = f"check its network card, cable and interface (cluster file), or {exclude}"
            results.append(warning(CHECK, text, fix))
    for first, second in left:
        each = measured[first, second]
        text = (
            f"{names([nodes[first], nodes[second]])} are slow with each other: {_rate(payload_bytes, each.all_to_all)} in "
            f"all-to-all, {each.all_reduce * 1e3:.3g} ms per all-reduce; the median pair has {rate}"
        )
        fix = "check switches and cables between the two, or exclude one (cluster file: options: [--exclude=NAME])"
        results.append(warning(CHECK, text, fix))
    return results


def _rate(payload_bytes: int, seconds: float) -> str:
    rate = payload_bytes / seconds
    return f"{rate / 1e9:.3g} GB/s" if rate >= 1e9 else f"{rate / 1e6:.3g} MB/s"
