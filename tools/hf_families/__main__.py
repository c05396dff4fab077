"""Runs the mixture-of-experts families of the installed transformers, and writes the table docs/hf-families.md."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_dist.errors import ConfigError
from moe_dist.runtime.command_line import print_done, reports_errors, run_command

RECORD = Path("research/records/hf_families.json")
PAGE = Path("docs/hf-families.md")


@reports_errors("hf_families")
def main(
    family: Annotated[list[str] | None, typer.Option(help="Folder below transformers/models; all if absent.")] = None,
    record: Annotated[Path, typer.Option(help="Results; families in it are not run again.")] = RECORD,
    out: Annotated[Path, typer.Option(help="The table.")] = PAGE,
    seconds: Annotated[float, typer.Option(min=1, help="Time after which ranks that wait count as hung.")] = 10.0,
    again: Annotated[bool, typer.Option(help="Run families that are in the record.")] = False,
) -> None:
    """Run each family on two ranks against one, and write the table."""
    import torch

    from tools.hf_families.attempt import judge
    from tools.hf_families.needs import LIMITS
    from tools.hf_families.page import page
    from tools.hf_families.tiny import families

    torch.set_num_threads(1)
    known, versions = families(), {name: version(name) for name in ("transformers", "torch")}
    if unknown := set(family or ()) - {each.name for each in known}:
        text = ", ".join(each.name for each in known)
        raise ConfigError(f"--family {min(unknown)}: transformers has no such family of experts; it has {text}")
    results: dict[str, Any] = {"versions": versions, "families": {}}
    if record.exists() and (old := json.loads(record.read_text()))["versions"] == versions:
        results = old
    for each in known:
        if (not family or each.name in family) and (again or each.key not in results["families"]):
            results["families"][each.key] = judge(each, seconds)
            print_done(f"{each.key}: {results['families'][each.key]}")
            record.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    out.write_text(page(results, LIMITS))


if __name__ == "__main__":
    run_command(main)
