"""The demonstration trains, traces and draws in an empty folder. A second call keeps all that is finished."""

import re
import shutil
from pathlib import Path

import pytest

from moe_dist.errors import ConfigError
from moe_dist.monitor.report.panels import PANELS
from moe_dist.monitor.report.token_panels import NO_TOKENS
from tests.support.invoked import invoke
from tests.support.pictured import VOCAB
from tests.support.tiny import tiny_config, write_config
from tools import demo
from tools.report import main as report


@pytest.mark.slow
def test_a_small_model_is_trained_traced_and_drawn(own_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"model.vocab_size": VOCAB, "model.max_seq_len": 96, "data.seq_len": 96}
    config = write_config(tiny_config(own_data, tmp_path, changes), tmp_path / "small.yaml")
    monkeypatch.setattr(demo, "CONFIG", str(config))  # the real data and job take minutes
    monkeypatch.setattr(demo, "make_data_set", lambda options: shutil.copytree(own_data, options.out, dirs_exist_ok=True))
    first, second = (invoke(demo.main, tmp_path / "out", "--steps", 2, code=0).output for _ in range(2))
    assert "held-out tokens; show them with moe-dist report" in first
    assert "held-out tokens; show them with moe-dist report" not in second, "a trace is made once"
    named = re.findall(r"^- ([\w ]+): ", second.partition("Look at these panels")[2], re.MULTILINE)
    assert len(named) == 3
    assert set(named) <= {title for title, _, _ in PANELS}
    run = tmp_path / "out/runs/demo"
    assert NO_TOKENS not in (run / "report.html").read_text()

    shutil.rmtree(run / "traces")
    (tmp_path / "out/data/manifest.json").unlink()
    said = invoke(report, run, code=0).output
    assert "not traced: " in said, "a run whose data are gone has a report without a trace"
    assert NO_TOKENS in (run / "report.html").read_text()
    invoke(report, run, "--trace", code=ConfigError.exit_code)
