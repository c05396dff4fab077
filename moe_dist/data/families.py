"""Joins near copies of pictures into families, and splits families into training and held-out families.

If a held-out picture had a near copy in training, memorising would look like learning. Pictures are therefore first joined
into families. All skin tones, genders and directions of an emoji are one family, and so are pictures whose grids of codes
are equal or nearly equal. A whole family, with all captions and augmented copies, is either in training or held out. With
`HoldOut.VARIANTS`, single pictures are held out while their families stay in training, but no training picture is
near-equal to a held-out picture.

Shape letters: N pictures or documents, C cells of a grid of codes.
"""

from collections.abc import Iterable, Sequence

import numpy as np

VARIATION_SELECTOR = 0xFE0F
SKIN_TONES = range(0x1F3FB, 0x1F400)
JOINER = 0x200D
GENDER_SIGNS = frozenset({0x2640, 0x2642})
FACING_RIGHT = 0x27A1  # if it follows a joiner, this code point marks the mirror image of the preceding emoji

# These gender-neutral code points replace those of male and female emoji, so that both are one family.
_PERSON, _CHILD, _ELDER, _ROYAL, _CLAUS, _HEART, _KISS = 0x1F9D1, 0x1F9D2, 0x1F9D3, 0x1FAC5, 0x1F384, 0x2764, 0x1F48B
_HOLDING_HANDS = (_PERSON, JOINER, 0x1F91D, JOINER, _PERSON)
NEUTRAL_FORM: dict[int, tuple[int, ...]] = {
    **dict.fromkeys((0x1F468, 0x1F469), (_PERSON,)),
    **dict.fromkeys((0x1F466, 0x1F467), (_CHILD,)),
    **dict.fromkeys((0x1F474, 0x1F475), (_ELDER,)),
    **dict.fromkeys((0x1F934, 0x1F478), (_ROYAL,)),
    **dict.fromkeys((0x1F385, 0x1F936), (_PERSON, JOINER, _CLAUS)),
    **dict.fromkeys((0x1F46B, 0x1F46C, 0x1F46D), _HOLDING_HANDS),
    0x1F48F: (_PERSON, JOINER, _HEART, JOINER, _KISS, JOINER, _PERSON),
    0x1F491: (_PERSON, JOINER, _HEART, JOINER, _PERSON),
}


def emoji_family(code_points: Sequence[int]) -> tuple[int, ...]:
    """Returns the code points that an emoji shares with its variants in skin tone, gender and direction.

    A gender sign or arrow marks a variant only if it follows a joiner. Otherwise it is a separate picture.
    """
    bare = [point for point in code_points if point != VARIATION_SELECTOR and point not in SKIN_TONES]
    family: list[int] = []
    for point in bare:
        if family and family[-1] == JOINER and (point in GENDER_SIGNS or point == FACING_RIGHT):
            family.pop()
        else:
            family.extend(NEUTRAL_FORM.get(point, (point,)))
    return tuple(family)


def near_pairs(grids_NC: np.ndarray, others_NC: np.ndarray, *, most: int) -> list[tuple[int, int]]:
    """Returns the pairs (i, j) for which grids_NC[i] and others_NC[j] differ in at most `most` cells.

    Compares every pair of grids, in N^2 C byte operations. 4,000 pictures of 64 cells take a second; 40,000 take minutes.
    """
    pairs: list[tuple[int, int]] = []
    others_CN = np.ascontiguousarray(others_NC.T)
    for start in range(0, len(grids_NC), 128):  # 128 grids at a time, because `differ` has one element per pair
        block = grids_NC[start : start + 128]
        differ = np.zeros((len(block), others_CN.shape[1]), np.uint16)
        for cell, others_N in enumerate(others_CN):
            differ += block[:, cell, None] != others_N
        rows, columns = np.nonzero(differ <= most)
        pairs.extend(zip((rows + start).tolist(), columns.tolist(), strict=True))
    return pairs


def join(keys: Sequence[object], pairs: Iterable[tuple[int, int]] = ()) -> np.ndarray:
    """Joins items into components (union-find): items with equal keys, and the two items of each pair. Returns for each
    item the smallest index in its component, int64 [N]."""
    parent = list(range(len(keys)))

    def root(item: int) -> int:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    first_of: dict[object, int] = {}
    equal = [(item, first_of.setdefault(key, item)) for item, key in enumerate(keys)]
    for one, other in (*equal, *pairs):
        low, high = sorted((root(one), root(other)))
        parent[high] = low
    return np.array([root(item) for item in range(len(keys))], np.int64)


def variants(families: Sequence[object], components_N: np.ndarray) -> np.ndarray:
    """Returns a mask of the pictures that may be held out, bool [N]. If a component (from `join`) contains the first
    picture of a family, it must stay in training, so that each family has a training picture."""
    firsts = np.unique(join(families))
    return ~np.isin(components_N, components_N[firsts])


def hold_out(components_N: np.ndarray, sizes_N: np.ndarray, *, fraction: float, seed: int) -> np.ndarray:
    """Draws whole components at random for the held-out side until this side has about `fraction` of the total size.

    A component that is larger than the median component and larger than a tenth of the held-out side stays in training, so
    that no family dominates held-out loss. If fraction > 0 and there are two components or more, no side is empty.

    Args:
        components_N: int64, component of each item, from `join`.
        sizes_N: int64, size of each item: 1 for a picture, and the number of characters for a text.

    Returns:
        bool [N], true if the item is held out.
    """
    _, component_N = np.unique(components_N, return_inverse=True)
    size_of = np.bincount(component_N, weights=sizes_N).astype(np.int64)
    room = fraction * int(sizes_N.sum())
    order = np.random.default_rng(seed).permutation(len(size_of))
    small = order[size_of[order] <= max(room / 10, float(np.median(size_of)))]
    chosen = small[np.cumsum(size_of[small]) <= room]
    if fraction > 0 and len(size_of) > 1 and not len(chosen):
        chosen = order[[size_of[order].argmin()]]
    return np.isin(component_N, chosen)
