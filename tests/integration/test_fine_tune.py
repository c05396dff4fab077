"""The fine-tuning of docs/huggingface.md, as written: from a Hugging Face folder and a JSONL file to an adapter of PEFT."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moe_dist.hf.adapters import CONFIG_FILE, WEIGHTS_FILE

ROOT = Path(__file__).parents[2]


@pytest.mark.full
def test_the_guide_leads_from_conversations_to_an_adapter(tmp_path: Path) -> None:
    import torch
    import transformers
    from peft import PeftModel

    page = (ROOT / "docs" / "huggingface.md").read_text()
    part = page.partition("## Fine-tune a mixture on your own conversations")[2].partition("```console\n")[2]
    commands = re.sub(r"\\\n\s*", "", part.partition("```")[0]).splitlines()
    assert [command.split()[:3] for command in commands][1:4] == [
        ["$", "moe-dist", "import-hf"],
        ["$", "moe-dist", "prepare-data"],
        ["$", "moe-dist", "launch"],
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for command in commands:
        python = command.removeprefix("$ ").replace("moe-dist", f"{sys.executable} -m moe_dist", 1)
        python = re.sub(r"^python ", f"{sys.executable} ", python)
        done = subprocess.run(
            python, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    records = [json.loads(line) for line in (tmp_path / "runs/chat/metrics.jsonl").read_text().splitlines()]
    losses = [record["losses"]["text"] for record in records if "losses" in record]
    assert losses[-1] < losses[0]
    adapter = tmp_path / ".cache/hf/chat-adapter"
    assert {each.name for each in adapter.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / ".cache/hf/chat", attn_implementation="eager")
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        before = model(tokens).logits
        after = PeftModel.from_pretrained(model, str(adapter))(tokens).logits
    assert (after - before).abs().max() > 1e-3
