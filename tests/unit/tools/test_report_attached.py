"""Tests the report, the pictures and the hints of models that another trainer trains while `attach` watches."""

import logging
import re
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from moe_dist.monitor import attach
from moe_dist.monitor.report.findings import problems
from moe_dist.monitor.report.verdicts import verdicts
from tests.support.invoked import invoke
from tests.support.tiny_hf import VOCAB, tiny_model
from tools.report import main, open_routing

STEPS = 60


def trained(folder: Path, *, collapsed: int | None = None, **options: object) -> Path:
    """Trains a tiny Mixtral for some steps in a plain loop. The router of layer `collapsed` has zero weights, so that all
    tokens take the same two experts."""
    torch.manual_seed(0)
    model = tiny_model("mixtral", output_router_logits=True, router_aux_loss_coef=0.1).train()
    if collapsed is not None:
        model.model.layers[collapsed].mlp.gate.weight.requires_grad_(False).zero_()  # pyright: ignore
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-3)
    with attach(model, folder, trace_every=20, **options) as watch:  # pyright: ignore
        for _ in range(STEPS):
            tokens = torch.randint(0, VOCAB, (4, 12))
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            watch.step(loss, lr=1e-3)
    return folder


def page_of(folder: Path) -> str:
    invoke(main, folder, "-o", folder / "report.html", code=0)
    return (folder / "report.html").read_text()


def test_the_report_of_a_foreign_run(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    Tokenizer(WordLevel({f"word{i}": i for i in range(VOCAB)}, unk_token="word0")).save(str(tokenizer))
    folder = trained(tmp_path / "run", tokenizer=tokenizer)
    routing = open_routing(folder)
    assert (routing.source, routing.window_steps, routing.window.last) == ("from metrics.jsonl", 50, STEPS)
    assert routing.window.tokens_LG.tolist() == [[50 * 48], [50 * 48]]
    assert routing.tokens.steps == (1, 21, 41)
    assert not problems(routing)
    page = page_of(folder)
    assert {each.subject for each in verdicts(routing) if each.state == "bad"} <= {"Speed"}  # on a busy machine
    assert "2 MoE layers (routed: 8 experts + 0 null, top 2)" in page
    assert re.search(r"word\d+", page)
    assert "bytes a token" in page


@pytest.mark.slow
def test_a_collapsed_router_is_named_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "moe_dist"):
        folder = trained(tmp_path, collapsed=1)
    first, second = problems(open_routing(folder))
    assert re.match(
        r"Routed expert \d takes 100% of its group's tokens in layer 1, 4 x the mean expert \(25%\); try a larger weight",
        first,
    )
    assert "loss.balance" not in first + second
    assert re.match(r"Routed experts \d \(layer 1\), .* and 2 more took no token in the last 50 steps", second)
    page = page_of(folder)
    assert re.search("<h2>Look at [a-z, ]*routing", page)
    assert page.index(first.split(";")[0].replace("'", "&#x27;")) < page.index("<h2>In words")
    warned = [record.message for record in caplog.records if record.name.startswith("moe_dist.monitor")]
    routed = [text for text in warned if "routed" in text]  # other hints may be about slow steps on a busy machine
    (cause,) = routed  # no hints of busy or dead experts follow from it
    assert re.match(r"step 10: the router of layer 1 gives all tokens the same scores .* choose \d, \d;", cause)
    events = EventAccumulator(str(folder / "tensorboard"), {"images": 0, "scalars": 0}).Reload()
    assert {"moe/load/routed", "moe/relative_entropy"} <= set(events.Tags()["images"])
    assert len(events.Scalars("0_first/loss/total")) == STEPS
    assert "comm/bytes_sent" not in events.Tags()["scalars"]


def test_a_run_without_trace_has_a_report_of_its_counts(tmp_path: Path) -> None:
    model = tiny_model("mixtral").train()
    with attach(model, tmp_path, sinks=["jsonl", "prometheus"], trace_every=0) as watch:
        model(torch.randint(0, VOCAB, (2, 12)))
        watch.step()
    assert 'group="routed"' in (tmp_path / "metrics.prom").read_text()
    assert open_routing(tmp_path).tokens is None
    assert "Report on" in page_of(tmp_path)
