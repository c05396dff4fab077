"""Tests which values count as secrets, and their removal from texts."""

import io
import logging
import os
from pathlib import Path

import pytest

from moe_dist.errors import ConfigError
from moe_dist.plan.preflight import check_file
from moe_dist.runtime.log import WithoutSecrets
from moe_dist.runtime.provenance import record_provenance
from moe_dist.runtime.secrets import secrets_of, without_secrets
from tests.support.messages import refused
from tests.support.tiny import tiny_config, write_config

PLANTED = {
    "WANDB_API_KEY": "tok_wandb_0123456789",
    "HF_TOKEN": "hf_abcdefgh",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUt/K7MDENG+bPx",
    "MY_DB_PASSWORD": "correct horse",
}
INNOCENT = {
    "TOKENIZERS_PARALLELISM": "false_but_long_enough",
    "KEYBOARD": "us-international",
    "SSH_KEY": "short",
    "GOOGLE_APPLICATION_CREDENTIALS": "/home/x/key.json",
    "PATH": "/usr/bin:/bin",
}


def test_names_and_values_decide() -> None:
    assert secrets_of({**PLANTED, **INNOCENT}) == {value: name for name, value in PLANTED.items()}


def test_every_secret_is_replaced_by_its_name_the_longest_first() -> None:
    text = " ".join([*PLANTED.values(), *INNOCENT.values()])
    clean = without_secrets(text, {**PLANTED, **INNOCENT})
    assert clean == " ".join([*(f"<{name}>" for name in PLANTED), *INNOCENT.values()])
    assert without_secrets("abcdefghij", {"A_KEY": "abcdefgh", "B_KEY": "abcdefghij"}) == "<B_KEY>"


def test_logs_and_their_tracebacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", PLANTED["HF_TOKEN"])
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(WithoutSecrets("%(message)s"))
    try:
        raise ValueError(f"401 for https://user:{PLANTED['HF_TOKEN']}@host")
    except ValueError:
        handler.emit(logging.LogRecord("x", 40, "x", 1, "with %s", (PLANTED["HF_TOKEN"],), __import__("sys").exc_info()))
    assert PLANTED["HF_TOKEN"] not in stream.getvalue()
    assert stream.getvalue().count("<HF_TOKEN>") == 2


def test_provenance_has_neither_the_command_lines_nor_the_diffs_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = PLANTED["WANDB_API_KEY"]
    monkeypatch.setenv("WANDB_API_KEY", token)
    monkeypatch.setattr("sys.argv", ["x", f"a={token}"])
    diff = b"+key = '" + token.encode() + b"' # \xff\n"
    monkeypatch.setattr("moe_dist.runtime.provenance.code_state", lambda _: ("c0ffee", diff, []))
    record_provenance(tmp_path, "a")
    (patch,) = tmp_path.glob("*.patch")
    assert patch.read_bytes() == b"+key = '<WANDB_API_KEY>' # \xff\n"
    assert '"a=<WANDB_API_KEY>"' in (tmp_path / "provenance.json").read_text()


def test_a_configuration_with_a_secret_is_refused_without_showing_it(
    tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_config(tiny_config(tiny_data, tmp_path), tmp_path / "x.yaml")
    token = PLANTED["WANDB_API_KEY"]
    monkeypatch.setenv("WANDB_API_KEY", token)
    check_file(path)
    override = f"monitor.sinks=[{{kind: wandb, project: x-{token}}}]"
    with refused(ConfigError, "monitor.sinks.0.project") as raised:
        check_file(path, [override])
    assert token not in str(raised.value)
    assert "WANDB_API_KEY" in os.environ
