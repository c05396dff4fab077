"""Every key has a type and a meaning, which `moe-dist explain` prints."""

from pathlib import Path

import pytest
from rich.console import Console

from launchers.explain import configs, explain, main, show
from moe_dist.config.keys import type_text, walk
from moe_dist.config.schema import Config
from tests.support.invoked import invoke


def text_of(key: str) -> str:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(explain(key))
    return console.export_text()


def test_every_key_has_a_type_and_a_meaning() -> None:
    for key in walk(Config):
        assert "typing" not in type_text(key.annotation), key.path
        assert explain(key.path) is not None
        described = key.field is None or key.field.description or key.sections or key.path.endswith((".kind", ".policy"))
        assert described, f"{key.path} has no description"


@pytest.mark.parametrize(
    ("key", "parts"),
    [
        ("optimizer.lr", ("number, above 0", "required", "Peak learning rate.", "may change")),
        ("model.qk_norm", ("one of 'none', 'head', 'full'", "none")),
        ("model.moe.capacity", ("section or null", "factor", "lowest probability", "default  null")),
        (
            "model.moe.router.capacity",
            ("number, above 0, 1 or less; or mapping from names to number", "null", "kind: expert_"),
        ),
        ("model.moe.groups.text.top_k", ("model.moe.groups.<name>.top_k", "a token chooses")),
        ("placement", ("policy: pinned", "policy: explicit", "slots", "default  policy: interleaved")),
        ("optimizer.schedule.min_ratio", ("kind: cosine", "kind: wsd", "0.1", "0.0")),
        ("monitor.sinks", ("[console, jsonl, tensorboard]", "kind: wandb", "project")),
        ("", ("run", "model", "optimizer", "all defaults")),
    ],
)
def test_explains(key: str, parts: tuple[str, ...]) -> None:
    text = text_of(key)
    for part in parts:
        assert part in text, text


def test_command_line(path) -> None:
    assert "Peak learning rate." in invoke(main, "optimizer.lr", code=0).stdout
    assert "did you mean optimizer.lr?" in invoke(main, "optimizer.lrr", code=78).stderr
    result = invoke(show, path, "train.steps=7", code=0)
    assert "steps: 7" in result.stdout
    assert "weight_decay: 0.1" in result.stdout
    assert invoke(show, path, "train.stepz=7").exit_code == 78
    listed = invoke(configs, code=0).stdout
    assert "The default job: text and pictures" in listed
    assert {each.stem for each in Path("configs").glob("*.yaml")} <= set(listed.split())
