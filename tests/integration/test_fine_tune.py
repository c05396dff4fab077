"""Runs the fine-tuning of docs/huggingface.md as written, from a Hugging Face folder and a JSONL file to a PEFT adapter."""

from pathlib import Path

import pytest

from moe_dist.hf.data_files import README
from moe_dist.hf.peft_files import CONFIG_FILE, WEIGHTS_FILE
from tests.support.guides import guide_commands, run_commands, text_losses
from tests.support.served import run_readme


@pytest.mark.full
def test_three_commands_lead_from_conversations_to_an_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    import transformers
    from peft import PeftModel

    commands = guide_commands("huggingface.md", "## Fine-tune a mixture on your own conversations")
    assert [command.split()[:2] for command in commands[1:]] == [
        ["moe-dist", "import-hf"],
        ["moe-dist", "prepare-data"],
        ["moe-dist", "launch"],
    ]
    run_commands(commands, tmp_path)
    losses = text_losses(tmp_path / "runs/chat")
    assert losses[-1] < losses[0]
    adapter = tmp_path / "runs/chat/adapters/step_20"
    assert {each.name for each in adapter.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE, README}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / ".cache/hf/chat", attn_implementation="eager")
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        before = model(tokens).logits
        after = PeftModel.from_pretrained(model, str(adapter))(tokens).logits
    assert (after - before).abs().max() > 1e-3
    capsys.readouterr()
    run_readme(adapter, monkeypatch, lines=4)
    assert capsys.readouterr().out.startswith("The")
