"""Gives as many as possible a place of their own: a node of the plan a node of the cluster."""

from collections.abc import Sequence


def match(possible: Sequence[Sequence[int]]) -> list[int | None]:
    """A maximum matching of a bipartite graph, by augmenting paths.

    Args:
        possible: For each that wants a place the places that fit, in the order of preference.

    Returns:
        For each its place, no place twice; None where there is none left.
    """
    taken: dict[int, int] = {}  # place -> who has it

    def take(who: int, tried: set[int]) -> bool:
        for place in sorted(possible[who], key=lambda place: place in taken):  # nobody moves without need
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
