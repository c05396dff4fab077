"""Writes a file of facts for `moe-dist evaluate --questions` and `moe-dist prepare-router-tuning --questions`:

python -m research.questions wordnet --out wordnet.jsonl
"""

from pathlib import Path
from typing import Annotated

import typer

from moe_dist.errors import ConfigError
from moe_dist.inference.questions.files import fact_lines
from moe_dist.runtime.command_line import reports_errors, run_command
from moe_dist.runtime.files import write_atomically
from research.questions.sources import FAMILIES, QUIZ, WORDNET, make_facts


@reports_errors("questions")
def main(
    family: Annotated[str, typer.Argument(help="wordnet, trivia or reasoning.")],
    out: Annotated[Path, typer.Option(help="File to write, FILE.jsonl.")],
    wordnet: Annotated[Path, typer.Option(help="Folder with WordNet's files.")] = WORDNET,
    quiz: Annotated[Path, typer.Option(help="Folder with the quiz files of bsdgames.")] = QUIZ,
    seed: Annotated[int, typer.Option(min=0, help="Seed of reasoning-gym.")] = 0,
) -> None:
    """Write the facts of a family of tasks."""
    if family not in FAMILIES:
        raise ConfigError(f"{family}: must be one of {', '.join(FAMILIES)}")
    facts = make_facts(FAMILIES[family], wordnet=wordnet, quiz=quiz, seed=seed)
    write_atomically(out, fact_lines(facts))
    print(f"{out}: {', '.join(f'{len(each):,} of {task}' for task, each in facts.items())}")


if __name__ == "__main__":
    run_command(main)
