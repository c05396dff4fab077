"""`moe-dist calibrate` measures this machine's rates, and writes them to a file that `moe-dist plan` reads."""

import platform
from pathlib import Path

import pytest

import tools.calibrate
from moe_dist.plan.rates import read_rates
from tests.support.invoked import invoke
from tools.calibrate import fitted_link


@pytest.mark.full  # starts two ranks
def test_rates_are_measured_into_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools.calibrate, "ROWS", (4, 16))
    for name, value in tools.calibrate.RANK_ENV.items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "rates.yaml"
    small = ["--device", "cpu", "--hidden", "32", "--ffn", "16", "--ranks", "2", "--seconds", "0.001"]
    invoke(tools.calibrate.main, "--out", out, *small, code=0)
    rates = read_rates(out)
    assert (rates.machine, rates.source, rates.ranks_per_node) == (platform.node(), "measured", 2)
    assert rates.gemm.sizes == (4.0, 16.0)
    (link,) = rates.inside
    assert link.ranks == 2
    assert 1e5 < link.bytes_per_second < 1e12
    assert rates.between is None
    assert rates.cores is not None


def test_latency_and_rate_fit_the_seconds() -> None:
    sent = [1e3, 1e6, 1e8]
    link = fitted_link(4, sent, [2e-4 + each / 5e9 for each in sent])
    assert link.latency == pytest.approx(2e-4)
    assert link.bytes_per_second == pytest.approx(5e9)
    noisy = fitted_link(2, sent, [1e-6, 1e-2, 1e-1])
    assert noisy.latency >= 0.0


def test_bad_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "the name must end with .yaml" in invoke(tools.calibrate.main, "--out", tmp_path / "rates.json", code=78).output
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = invoke(tools.calibrate.main, "--out", tmp_path / "rates.yaml", "--device", "cuda")
    assert done.exit_code != 0
    assert "--device cuda: torch finds no GPU on this machine; take --device cpu" in done.output.replace("\n", " ")
