"""Generates `moe_dist/hf/unknown_families.json` from the configuration classes of transformers:
python -m tests.support.unknown_families"""

import dataclasses
import json

from moe_dist.hf.families import FAMILIES
from moe_dist.hf.fields import INERT
from moe_dist.hf.sections import UNKNOWN_FAMILIES


def table() -> dict[str, list[str]]:
    """Returns, for each type of language model (with or without pictures), the nearest known family and those fields of the
    type that this family lacks."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    def fields_of(name: str) -> set[str]:
        return {field.name for field in dataclasses.fields(CONFIG_MAPPING[name])} - INERT

    known = {name: fields_of(name) for name in FAMILIES}
    kinds = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    found = {}
    for name in sorted(set().union(*kinds) - known.keys()):
        own = fields_of(name)
        nearest = min(known, key=lambda each: (len(own - known[each]), len(known[each] - own)))
        found[name] = [nearest, *sorted(own - known[nearest])]
    return found


def text(found: dict[str, list[str]]) -> str:
    """Returns the table as JSON, one line per type."""
    return "{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(each)}" for name, each in found.items()) + "\n}\n"


if __name__ == "__main__":
    UNKNOWN_FAMILIES.write_text(text(table()))
