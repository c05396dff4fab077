"""Links between files of the repository become links between pages of the documentation site."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
site_links = runpy.run_path(str(ROOT / "docs" / "site_pages.py"))["site_links"]


@pytest.mark.parametrize(
    ("source", "page", "text", "expected"),
    [
        ("README.md", "index.md", "[a](docs/ray.md#b)", "[a](ray.md#b)"),
        ("README.md", "index.md", "![p](docs/images/x.png)", "![p](images/x.png)"),
        ("docs/ray.md", "ray.md", "[s](../slurm/README.md)", "[s](slurm.md)"),
        ("docs/how-to/x.md", "how-to/x.md", "[s](../../slurm/README.md#a)", "[s](../slurm.md#a)"),
        ("docs/ray.md", "ray.md", "[code](../setup.py)", "code"),
        ("docs/ray.md", "ray.md", "[lost](../no_such.py)", "[lost](no_such.py)"),  # mkdocs refuses it
        ("docs/ray.md", "ray.md", "[w](https://a.org/b)", "[w](https://a.org/b)"),
        ("docs/ray.md", "ray.md", "```\n[a](../setup.py)\n```", "```\n[a](../setup.py)\n```"),
        ("docs/ray.md", "ray.md", '[x][t]\n\n[t]: ../setup.py "name"\n', "x\n\n\n"),
    ],
)
def test_links_lead_to_pages(source: str, page: str, text: str, expected: str) -> None:
    assert site_links(text, source, page) == expected
