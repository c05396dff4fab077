"""Maximum bipartite matching, of planned nodes to cluster nodes."""

from collections.abc import Sequence


def match(possible: Sequence[Sequence[int]]) -> list[int | None]:
    """A maximum matching of a bipartite graph, by augmenting paths.

    Args:
        possible: For each node of the plan the places that fit, in order of preference.

    Returns:
        A place for each, no place twice; None where none is left.
    """
    taken: dict[int, int] = {}  # place -> index of its owner

    def take(who: int, tried: set[int]) -> bool:
        for place in sorted(possible[who], key=lambda place: place in taken):  # free places first
            if place not in tried:
                tried.add(place)
                if place not in taken or take(taken[place], tried):
                    taken[place] = who
                    return True
        return False

    for who in range(len(possible)):
        take(who, set())
    place_of = {who: place for place, who in taken.items()}
    return [place_of.get(who) for who in range(len(possible))]
