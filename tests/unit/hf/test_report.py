"""The routing that a report shows for an imported model on our data set equals the routing in transformers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from moe_dist.monitor.trace.reader import read_trace
from tests.support.invoked import invoke
from tests.support.tiny import EOS, IMAGE_IDS, tiny_dataset
from tests.support.tiny_hf import save, tiny_model
from tools.import_hf import main as import_hf
from tools.report import main as report
from tools.trace import main as trace


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    tiny_dataset(folder)
    return folder


def test_the_report_of_an_imported_model(data: Path, tmp_path: Path) -> None:
    model = tiny_model("mixtral", vocab_size=IMAGE_IDS[1])
    save(model, tmp_path / "theirs")
    done = invoke(import_hf, tmp_path / "theirs", "--out", tmp_path / "ours", "--modalities", "text,image")
    assert done.exit_code == 0, done.output
    done = invoke(trace, tmp_path / "ours", "--data", data, "--sequences", 3)
    assert done.exit_code == 0, done.output
    out = tmp_path / "ours" / "traces" / "step_0"
    done = invoke(report, out, "--data", data, "-o", tmp_path / "report.html")
    assert done.exit_code == 0, done.output
    page = (tmp_path / "report.html").read_text()
    assert "2 MoE layers (all: 8 experts + 0 null, top 2)" in page
    assert "held-out tokens of step 0" in page

    step = read_trace(out).step(0)
    end = int((step.tokens["token"] == EOS).argmax()) + 1  # the first document's tokens attend to no other document
    assert end > 5
    first = slice(0, end)
    tokens = torch.from_numpy(step.tokens["token"][first].astype(np.int64))[None]
    with torch.no_grad():
        logits = model(tokens, output_router_logits=True).router_logits
    assert np.array_equal(step.ids[first], np.stack([each.topk(2).indices.numpy() for each in logits], axis=1))
