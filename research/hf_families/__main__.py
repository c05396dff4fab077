"""Runs the mixture-of-experts families of the installed transformers, and writes the table docs/hf-families.md."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_dist.errors import ConfigError
from moe_dist.runtime.command_line import print_done, reports_errors, run_command
from research.hf_families.page import page

RECORD = Path("research/records/hf_families.json")
PAGE = Path("docs/hf-families.md")


@reports_errors("hf_families")
def main(
    family: Annotated[list[str] | None, typer.Option(help="Folder below transformers/models; all if absent.")] = None,
    record: Annotated[Path, typer.Option(help="Results; families in it are not run again.")] = RECORD,
    out: Annotated[Path, typer.Option(help="The table.")] = PAGE,
    seconds: Annotated[float, typer.Option(min=1, help="Time after which ranks that wait count as hung.")] = 10.0,
    run: Annotated[bool, typer.Option(help="--no-run only writes the table of the record.")] = True,
    again: Annotated[bool, typer.Option(help="Run families that are in the record.")] = False,
) -> None:
    """Compare each family on two ranks with one rank, and write the table."""
    if run:
        run_families(set(family or ()), record, seconds, again)
    out.write_text(page(json.loads(record.read_text())))


def run_families(names: set[str], record: Path, seconds: float, again: bool) -> None:
    """Adds results to the record. Starts a new record if the old one is from other versions of torch or transformers."""
    from transformers.utils import logging

    from research.hf_families.attempt import HarnessError, judge
    from research.hf_families.tiny import families

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    known = families()
    if unknown := names - {each.name for each in known}:
        text = ", ".join(each.name for each in known)
        raise ConfigError(f"--family {min(unknown)}: transformers has no such family of experts; it has {text}")
    for each in known:
        if (not names or each.name in names) and (again or each.key not in _read(record)["families"]):
            try:
                result = judge(each, seconds)
            except HarnessError as error:
                print_done(f"{each.key}: not recorded, the harness failed: {error}")
                continue
            print_done(f"{each.key}: {result}")
            results = _read(record)  # another process may have added results
            results["families"][each.key] = result
            results["missing"] = [each.key for each in known if each.key not in results["families"]]
            record.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


def _read(record: Path) -> dict[str, Any]:
    versions = {name: version(name).partition("+")[0] for name in ("transformers", "torch")}
    if record.exists() and (old := json.loads(record.read_text()))["versions"] == versions:
        return old
    return {"versions": versions, "families": {}}


if __name__ == "__main__":
    run_command(main)
