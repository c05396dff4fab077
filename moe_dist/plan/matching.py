"""Matches planned nodes to cluster nodes with a maximum bipartite matching."""

from collections.abc import Sequence


def match(possible: Sequence[Sequence[int]]) -> list[int | None]:
    """Returns a maximum matching of a bipartite graph. It is found with augmenting paths.

    Args:
        possible: For each planned node, the cluster nodes that fit, in order of preference.

    Returns:
        For each planned node, a cluster node or None. No cluster node occurs twice.
    """
    taken: dict[int, int] = {}  # cluster node -> planned node

    def take(who: int, tried: set[int]) -> bool:
        for place in sorted(possible[who], key=lambda place: place in taken):  # free nodes first, to reassign fewer nodes
            if place not in tried:
                tried.add(place)
                # the planned node that has `place` may move to another cluster node
                if place not in taken or take(taken[place], tried):
                    taken[place] = who
                    return True
        return False

    for who in range(len(possible)):
        take(who, set())
    place_of = {who: place for place, who in taken.items()}
    return [place_of.get(who) for who in range(len(possible))]
