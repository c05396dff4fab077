"""Makes a data set from which questions can be asked, with the tokenizer of a Hugging Face folder.

    python -m research.experiments.words_data .cache/hf/smollm2 --out .cache/data/smollm2-words

The texts are WordNet's verbs with their glosses and examples. No task of the family wordnet asks about verbs. With
`prepare_data --tokenizer`, a data set would have no tokenizer, because the marks of a Hugging Face tokenizer have other
names. This module renames five marks in a copy. The mark between documents becomes <bos>, and the end of a turn becomes
<eos>. Three marks of source code, which no question contains, become <pad>, <boi> and <eoi>.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from moe_dist.data.tokenizer import BOI, BOS, EOI, EOS, PAD, load_tokenizer
from moe_dist.errors import DataError
from moe_dist.formats.manifest import load_manifest, write_manifest
from moe_dist.runtime.command_line import reports_errors, run_command
from moe_dist.runtime.signals import child_of
from research.experiments.instructed import check_new
from research.questions.sources import WORDNET

TOKENIZER = "tokenizer.json"
MARKS = {"<|endoftext|>": BOS, "<|im_end|>": EOS, "<repo_name>": PAD, "<reponame>": BOI, "<file_sep>": EOI}  # of SmolLM2


def verbs(wordnet: Path) -> list[str]:
    """Returns 'verb: gloss; "example"' of each synset in WordNet's data.verb."""
    lines = (wordnet / "data.verb").read_text().splitlines()
    synsets = [line.partition(" | ") for line in lines if not line.startswith("  ")]  # other lines are the licence
    return [f"{facts.split()[4].replace('_', ' ')}: {gloss.strip()}" for facts, _, gloss in synsets]


def renamed(tokenizer: Mapping[str, Any], marks: Mapping[str, str] = MARKS) -> dict[str, Any]:
    """Returns the content of a tokenizer.json in which the marks have the names of moe_dist. The ids stay the same.

    Raises:
        DataError: the tokenizer lacks a mark.
    """
    added, vocab = tokenizer["added_tokens"], tokenizer["model"]["vocab"]
    if missing := sorted(set(marks) - {each["content"] for each in added}):
        raise DataError(f"{TOKENIZER}: lacks {', '.join(missing)}; take SmolLM2's (`make smollm2`)")
    return {
        **tokenizer,
        "added_tokens": [{**each, "content": marks.get(each["content"], each["content"])} for each in added],
        "model": {**tokenizer["model"], "vocab": {marks.get(token, token): number for token, number in vocab.items()}},
    }


@reports_errors()
def main(
    model: Annotated[Path, typer.Argument(help="Hugging Face folder with tokenizer.json.")],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    wordnet: Annotated[Path, typer.Option(help="Folder with WordNet's files.")] = WORDNET,
) -> None:
    """Make the data."""
    check_new(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps(renamed(json.loads((model / TOKENIZER).read_text())), ensure_ascii=False)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as place:
        texts, made = Path(place) / "verbs.jsonl", Path(place) / out.name
        texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in verbs(wordnet)))
        command = [sys.executable, "-m", "tools.prepare_data", "--tokenizer", str(model), "--text", str(texts)]
        command += ["--licence", "WordNet licence", "--out", str(made)]
        ended = subprocess.run(command, check=False, preexec_fn=child_of(os.getpid(), ignore_stop=False))
        if ended.returncode:
            raise DataError(f"{made}: tools.prepare_data ended with {ended.returncode}")
        (made / TOKENIZER).write_text(content)
        load_tokenizer(made / TOKENIZER)
        manifest = load_manifest(made)
        write_manifest(manifest.model_copy(update={"name": out.name, "tokenizer": TOKENIZER}), made)
        made.rename(out)
    print(f"{out}: {manifest.sources['text'].train.documents} verbs to train on")


if __name__ == "__main__":
    run_command(main)
