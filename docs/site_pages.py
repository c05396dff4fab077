"""Adds the pages of the site that are not files of docs/: README.md and others, and the reference made from the code.

mkdocs calls the functions `on_...` (see mkdocs.yml).
"""

import html
import os
import posixpath
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # launchers and tools are imported from the clone; mkdocs takes this entry away again
from launchers.explain import meaning_of  # noqa: E402

OUTSIDE = {
    "README.md": "index.md",
    "slurm/README.md": "slurm.md",
    "configs/README.md": "configurations.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "research/README.md": "research.md",
}
# Pages and figures of experiments.
RECORDS = ROOT / "research" / "records"
OUTSIDE |= {
    str(path.relative_to(ROOT)): str(path.relative_to(RECORDS))
    for path in sorted([*RECORDS.glob("reproductions/*.md"), *RECORDS.rglob("*.svg")])
}
_INLINE = re.compile(r"(?P<mark>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^()\s]+)\)")
_REFERENCE = re.compile(r'^\[(?P<label>[^\]]+)\]: (?P<target>\S+)(?: "(?P<title>[^"]*)")?$', re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are not files of docs/."""
    for source, target in OUTSIDE.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    for target, text in reference().items():
        files.append(File.generated(config, target, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns links between files of the repository into links between pages. Links to other files become plain text."""
    pages = {target: source for source, target in OUTSIDE.items()}
    return site_links(markdown, pages.get(page.file.src_uri, f"docs/{page.file.src_uri}"), page.file.src_uri)


def site_links(markdown: str, source: str, page: str) -> str:
    """Returns the text of a file of the repository, with links as the site needs them.

    Args:
        source: Path of the file in the repository.
        page: Path of its page in the site.
    """
    dropped: set[str] = set()

    def moved(target: str) -> str | None:
        if re.match(r"[a-z]+:|#", target):
            return target
        path, hash_, anchor = target.partition("#")
        there = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if there in OUTSIDE:
            there = f"docs/{OUTSIDE[there]}"
        if not there.startswith("docs/") and (ROOT / there).exists():
            return None  # a file of the code; a link to a missing file stays, and fails the build
        return os.path.relpath(there.removeprefix("docs/"), posixpath.dirname(page) or ".") + hash_ + anchor

    def inline(match: re.Match[str]) -> str:
        target = moved(match["target"])
        return match["text"] if target is None else f"{match['mark']}[{match['text']}]({target})"

    def reference(match: re.Match[str]) -> str:
        target = moved(match["target"])
        if target is None:
            dropped.add(match["label"])
            return ""
        title = f' "{match["title"]}"' if match["title"] else ""
        return f"[{match['label']}]: {target}{title}"

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)  # code stays as it is
    parts[::2] = [_REFERENCE.sub(reference, _INLINE.sub(inline, part)) for part in parts[::2]]
    for label in dropped:
        parts[::2] = [re.sub(rf"\[([^\[\]]+)\]\[{re.escape(label)}\]", r"\1", part) for part in parts[::2]]
    return "".join(parts)


def reference() -> dict[str, str]:
    """Returns the text of each reference page, by the path of the page."""
    from moe_dist.config.cluster import Cluster
    from moe_dist.config.schema import Config

    return {
        "reference/keys.md": _keys_page("Configuration keys", "A run's configuration", Config),
        "reference/cluster-keys.md": _keys_page("Cluster file keys", "A cluster file", Cluster),
        "reference/commands.md": _commands_page(),
        "reference/records.md": _records_page(),
        "reference/api.md": _api_page(),
    }


def _escape(cell: str) -> str:
    """Escapes a table cell's text so that nothing outside of code spans is markup."""
    parts = re.split(r"(`[^`]*`)", cell.replace("\n", " "))
    parts[::2] = [re.sub(r"([\[\]*_])", r"\\\1", html.escape(part, quote=False)) for part in parts[::2]]
    return "".join(parts).replace("|", "\\|")


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(map(_escape, cells)) + " |"

    header = list(header)
    return [line(header), line("---" for _ in header), *map(line, rows), ""]


def _keys_page(title: str, what: str, root: Any) -> str:
    from moe_dist.config.keys import walk

    lines = [f"# {title}", "", f"{what} may have these keys. `moe-dist explain KEY` prints the keys of a run.", ""]
    section, rows = "", list[list[str]]()
    for key in walk(root):
        top, dot, _ = key.path.partition(".")
        if top != section:
            lines += _table(("key", "type", "default", "meaning"), rows) if rows else []
            lines, section, rows = [*lines, f"## {top}", ""], top, []
        if key.field is None and not key.sections:  # an item of a list: the list's row describes it
            continue
        path = f"`{key.path}`" + (f" ({key.variant})" if key.variant and dot else "")
        rows.append([path, *meaning_of(key)])
    return "\n".join([*lines, *_table(("key", "type", "default", "meaning"), rows)])


def _commands_page() -> str:
    from moe_dist.__main__ import commands, load_subcommand

    lines = ["# Commands", "", "Every command prints this with `--help`. An empty default means that there is none.", ""]
    for words, _, line in commands():
        command = load_subcommand(words.split()[-1])
        lines += [f"## moe-dist {words}", "", line, ""]
        rows = []
        for parameter in command.params:
            if getattr(parameter, "hidden", False) or parameter.name in ("install_completion", "show_completion"):
                continue
            option = parameter.param_type_name == "option"
            name = ", ".join(parameter.opts) if option else str(parameter.name).upper()
            default = (
                "" if parameter.default in (None, False, ()) or callable(parameter.default) else str(parameter.default)
            )
            rows.append([f"`{name}`", getattr(parameter, "help", "") or "", default])
        lines += _table(("argument or option", "meaning", "default"), rows) if rows else []
    return "\n".join(lines)


def _records_page() -> str:
    from moe_dist.monitor.tags import DEPTH_MEANING, MEANING, PICTURE_MEANING

    lines = ["# Records", "", "Tags of the scalars in `metrics.jsonl`, TensorBoard, Prometheus and other sinks.", ""]
    lines += _table(("tag", "meaning"), ((f"`{tag}`", text) for tag, text in (MEANING | DEPTH_MEANING).items()))
    lines += ["## Pictures and histograms", ""]
    lines += _table(("tag", "meaning"), ((f"`{tag}`", text) for tag, text in PICTURE_MEANING.items()))
    return "\n".join(lines)


def _api_page() -> str:
    import moe_dist

    lines = ["# Public API", "", "[The guide](../api.md) shows how these names are used. `T` is a number of tokens.", ""]
    for name, module in sorted(moe_dist._MODULES.items()):  # pyright: ignore[reportPrivateUsage]
        lines += [f"::: {module}.{name}", ""]
    return "\n".join(lines)
