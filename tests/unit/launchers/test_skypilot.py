"""With SkyPilot's variables, the command of docs/examples/skypilot.yaml starts all ranks of a valid run."""

import os
import subprocess
from pathlib import Path

import yaml
from typer.testing import CliRunner

import moe_dist.train.__main__
from moe_dist.runtime.command_line import command_app
from tests.support.stand_ins import stand_in

ROOT = Path(__file__).parents[3]


def test_its_command_starts_each_node_of_a_valid_run(tmp_path: Path) -> None:
    task = yaml.safe_load((ROOT / "docs" / "examples" / "skypilot.yaml").read_text())
    stand_in(tmp_path, torchrun='printf "%s\\n" "$@"')
    nodes = {"NUM_NODES": "2", "NODE_RANK": "1", "NUM_GPUS_PER_NODE": "8", "NODE_IPS": "10.0.0.1\n10.0.0.2"}
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    env |= {f"SKYPILOT_{name}": value for name, value in nodes.items()}
    words = subprocess.run(["bash", "-c", task["run"]], env=env, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    at = words.index("-m")
    assert words[:at] == [
        *("--nnodes", "2", "--node-rank", "1", "--nproc-per-node", "8"),
        *("--master-addr", "10.0.0.1", "--master-port", "29500"),
    ]
    assert words[at : at + 2] == ["-m", "moe_dist.train"]
    arguments = [word for word in words[at + 2 :] if word]
    done = CliRunner().invoke(command_app(moe_dist.train.__main__.main), [*arguments, "--dry-run"])
    assert done.exit_code == 0, done.output
