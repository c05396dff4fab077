"""Finds the versions of the code that made the records of an experiment, and compares them.

Two commits count as the same version if the folders FOLDERS have equal contents in both. Without git, the version is the
version of the package.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import moe_dist
from moe_dist.errors import ConfigError
from research.experiments.results import code_of_now, results_path, run_git
from research.experiments.study import Study, jobs_of
from research.experiments.verdicts import Records

# The last two are former names of research/experiments.
FOLDERS = ("moe_dist", "launchers", "research/experiments", "tools/experiments", "tools/reproduction")
UNNAMED = "0.1.0"  # version of the package in records that name neither commit nor version
Code = Mapping[str, Any]  # the field "code" of a record: "commit", "changed" and, if there is no commit, "version"


def check_same_code(study: Study, records: Records, *, pilot: bool = False) -> None:
    """Raises ConfigError if the code of a record has another version than the present code."""
    now = code_of_now()
    for old in {
        (name_of(record["code"]), record["code"]["changed"]): record["code"] for record in records.values()
    }.values():
        if reason := _difference(old, now):
            path = results_path(study, pilot=pilot)
            runs = path.parent if pilot else Path(study.runs) / study.name
            raise ConfigError(
                f"{path} has records of {name_of(old)}, and the code is now {name_of(now)}: {reason}. Records of one "
                "experiment are judged together, so they need the same code; "
                f"{_way_out(old, path, runs)}, or begin anew under another name"
            )


def _difference(old: Code, now: Code) -> str:
    """Describes the difference between two versions of the code; empty if the versions are the same."""
    if old["changed"] != now["changed"]:
        return "one of them has uncommitted changes"
    if name_of(old) == name_of(now):
        return ""
    if not (old["commit"] and now["commit"]):
        return "these are two versions"
    before, after = _contents(old), _contents(now)
    if before is None or after is None:
        return "the repository of the code lacks one of these commits (git fetch may bring it)"
    folders = sorted({line.split("\t")[1] for line in before ^ after})
    return f"they differ in {', '.join(folders)}" if folders else ""


def _way_out(old: Code, path: Path, runs: Path) -> str:
    if not old["commit"]:
        return f"install {name_of(old)} to go on"
    return (
        f"go on in a worktree of that commit (git worktree add FOLDER {old['commit']}; copy {path}, {runs} and .cache to "
        "where that commit has them, and start the command there as its documents say)"
    )


def tell_versions(study: Study, records: Records) -> str:
    """Returns a sentence that lists the runs of each version of the code, the version with the most runs first. Returns ''
    if a single version without uncommitted changes made all runs."""
    codes = {name_of(record["code"]): record["code"] for record in records.values()}
    contents = {name: _contents(code) for name, code in codes.items()}
    versions: dict[tuple[frozenset[str] | str, bool], list[tuple[str, int]]] = {}
    for run in [(job.label, job.seed) for job in jobs_of(study) if (job.label, job.seed) in records]:
        name = name_of(records[run]["code"])
        versions.setdefault((contents[name] or name, records[run]["code"]["changed"]), []).append(run)
    if len(versions) < 2:
        changed = any(changed for _, changed in versions)
        return "All runs are of code with uncommitted changes, which were not kept and may differ." if changed else ""
    parts = []
    for (_, changed), runs in sorted(versions.items(), key=lambda each: -len(each[1])):
        found = {name_of(records[run]["code"]): short_name(records[run]["code"]) for run in runs}
        lacking = ", which this repository lacks," if None in map(contents.get, found) else ""
        what = f"made {_listed(runs)}" if parts else f"made {len(runs)} runs"
        parts.append(f"{' and '.join(sorted(found.values()))}{' with changes' if changed else ''}{lacking} {what}")
    differ = len({each for each in contents.values() if each is not None}) > 1
    return f"The code {'is not' if differ else 'may not be'} the same in all runs: {'; '.join(parts)}."


def name_of(code: Code) -> str:
    """Returns the commit. Without git, returns the version of the package."""
    return f"commit {code['commit']}" if code["commit"] else f"moe_dist {code.get('version', UNNAMED)}"


def short_name(code: Code) -> str:
    return f"`{name_of(code).removeprefix('commit ')[:12]}`"


def _contents(code: Code) -> frozenset[str] | None:
    """Returns the git trees of FOLDERS as lines of `git ls-tree`. Without git, returns the version of the package. Returns
    None if the code's repository lacks the commit."""
    if not code["commit"]:
        return frozenset([name_of(code)])
    listed = run_git("-C", str(Path(moe_dist.__file__).parent), "ls-tree", "--full-tree", code["commit"], "--", *FOLDERS)
    return None if listed is None else frozenset(listed.splitlines())


def _listed(runs: list[tuple[str, int]]) -> str:
    seeds: dict[str, list[str]] = {}
    for arm, seed in runs:
        seeds.setdefault(arm, []).append(str(seed))
    return ", ".join(f"`{arm}` ({'seed' if len(each) == 1 else 'seeds'} {', '.join(each)})" for arm, each in seeds.items())
