"""Writes the table of families from the record."""

from collections import Counter
from typing import Any

from research.hf_families import LIMITS, OTHERS

HEAD = """# Families of transformers

`python -m research.hf_families` writes this page. It lists each class that transformers {transformers} marks with its
interface for experts, run with [expert parallelism](huggingface.md#expert-parallelism-in-transformers) on torch {torch}.

Each model is tiny, from the family's own configuration. It runs the family's own code on two ranks (FSDP2, `ep_size=2`) and
on one. The loss, the gradients of all parameters and the weights after a step of AdamW must equal those of one rank: within
{fp64:.0e} in fp64, or {fp32:.0e} in fp32 if modules of the family stay in fp32. The saved folder must load on one rank with
equal weights. Multimodal models have a picture on rank 0 and none on rank 1.

{works} of {all} classes work: {plain} unchanged, and {needing} with a [change](#the-changes). {refused} are refused.

The gradient column has the largest difference of a gradient, as a share of that gradient's largest value.

| family | experts | model | verdict | dtype | gradient | needs, or why it is refused |
|---|---|---|---|---|---|---|
"""
TAIL = """
## The changes

- picture: a rank whose batch has no picture does not call the vision encoder, and FSDP2 on the other ranks waits for it.
  Give such a batch a picture behind its text, with labels -100. No text token attends to it, so the loss is unchanged.
- whole: each rank loads all weights, and then shards them by `maybe_distribute_model`, because transformers' sharded load
  fails for the family.
- plan: `DistributedConfig(ep_plan={rule: "replicate"})` for each rule of the family's plan that is not about experts.
- eval: the family's router draws noise in training, so ranks can be compared only in evaluation mode.

`python -m research.hf_families --family NAME --again` repeats a row. After an upgrade of transformers,
`python -m research.hf_families` runs all families and writes this page anew. An interrupted run resumes.
"""


def page(record: dict[str, Any]) -> str:
    """Returns the page as Markdown."""
    rows = sorted(record["families"].items())
    kinds = Counter(verdict(found) for _, found in rows)
    head = HEAD.format(
        **record["versions"],
        **LIMITS,
        works=kinds["works"] + kinds["works with"],
        all=len(rows),
        plain=kinds["works"],
        needing=kinds["works with"],
        refused=kinds["refused"],
    )
    missing = f"\nNot run yet: {', '.join(record['missing'])}.\n" if record["missing"] else ""
    return head + "".join(map(_row, rows)) + missing + TAIL


def verdict(found: dict[str, Any]) -> str:
    """Returns "works", "works with" or "refused". The need "fp32" does not count."""
    if "refused" in found:
        return "refused"
    return "works with" if found["needs"].keys() - {"fp32"} else "works"


def _row(item: tuple[str, dict[str, Any]]) -> str:
    (family, experts), found = item[0].split("."), item[1]
    dtype = "fp32" if "fp32" in found["needs"] else "fp64"
    gradient = "" if "refused" in found else f"{found['difference']['gradient']:.0e}"
    return f"| {family} | {experts} | {found['model']} | {verdict(found)} | {dtype} | {gradient} | {_why(found)} |\n"


def _why(found: dict[str, Any]) -> str:
    if "refused" not in found:
        needs = ((name, why) for name, why in found["needs"].items() if name != "fp32")  # "fp32" is in the dtype column
        return "; ".join(name if name == "picture" else f"{name}: {_short(why)}" for name, why in needs)
    failed = " and ".join(OTHERS[name] for name, error in found["others"].items() if error)
    passed = " and ".join(OTHERS[name] for name, error in found["others"].items() if not error)
    fault = f"fails also with {failed}" if failed else "moe_dist's fault"
    fault += f", but not with {passed}" if failed and passed else ""
    return f"{_short(found['refused'])}; {fault}"


def _short(error: str) -> str:
    """Returns the first 200 letters of an error as code, with its place."""
    text, _, place = error.replace("|", "/").replace("`", "'").rpartition(" (")
    return f"`{text[:200]} ({place}`" if text else f"`{place[:200]}`"
