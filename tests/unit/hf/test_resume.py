"""A killed import continues where it stopped. The memory of an import grows by less than a quarter of the model's size,
also if it continues after a kill."""

import json
import math
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from moe_dist.checkpoint.directory import find_checkpoint
from moe_dist.checkpoint.state import OPTIMIZER_PREFIX
from moe_dist.checkpoint.verify import verify
from moe_dist.config.load import load_config
from moe_dist.errors import ConfigError, DataError
from moe_dist.hf.importing import import_model
from moe_dist.hf.names import slots
from moe_dist.hf.plan import ImportOptions, changed_section
from moe_dist.hf.sections import read_section
from moe_dist.train.build.training import state_specs
from tests.support.messages import refused
from tests.support.special_files import SPECIAL
from tests.support.tiny_hf import save, tiny_config, tiny_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
LIMIT = 16 << 20
SHARD = 2 << 20


ROUND = """
import resource, sys
from pathlib import Path
from moe_dist.hf.exporting import export_model
from moe_dist.hf.importing import import_model
before = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (before + int(sys.argv[2]), -1))
for theirs in sorted(Path(sys.argv[1]).iterdir()):
    ours = theirs / "ours"
    import_model(theirs, ours, shard_bytes=int(sys.argv[3]))
    export_model(ours, theirs / "back", shard_bytes=int(sys.argv[4]))
"""


# This program prints a line after each shard, so that the test can kill it there.
IMPORT = """
import resource, sys
from pathlib import Path
from moe_dist.hf.importing import import_model
before = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (before + int(sys.argv[3]), -1))
report = lambda stage, done, total: print(done, total, flush=True)
print("kept", import_model(Path(sys.argv[1]), Path(sys.argv[2]), shard_bytes=int(sys.argv[4]), report=report).kept)
"""


def hollow(folder: Path, kind: str, **sizes: int) -> None:
    """Writes a model of bfloat16 zeros as one sparse file."""
    tiny_config(kind, **sizes).save_pretrained(folder)
    family, values, _ = read_section(json.loads((folder / "config.json").read_text()))
    section = changed_section(values, family, ImportOptions())
    places = [place for slot in slots(section, family) for place in slot.places[:1]]
    entries, end = {}, 0
    for name, shape in {place.name: place.shape for place in places}.items():  # a stored tensor may contain several of ours
        begin, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        stream.truncate(8 + len(header) + end)


def rounds(folder: Path, *, imports: int, exports: int) -> "subprocess.CompletedProcess[str]":
    """Imports and exports every model in the folder, in shards of `imports` and `exports` bytes, in a process whose memory
    may grow by LIMIT."""
    command = [sys.executable, "-c", ROUND, str(folder), str(LIMIT), str(imports), str(exports)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


WIDE = {"hidden_size": 256, "moe_intermediate_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 4}
EXPERTS: dict[str, dict[str, int]] = {
    "ernie4_5_moe": {"moe_num_experts": 16},
    "glm4_moe": {"n_routed_experts": 16},
    "deepseek_v3": {"n_routed_experts": 16},
    "longcat_flash": {"n_routed_experts": 20, "zero_expert_num": 4},
    "gpt_oss": {"num_local_experts": 4, "num_hidden_layers": 12},
}


@pytest.fixture
def wide(tmp_path: Path) -> Iterator[Path]:
    """A folder with a model of each family with many experts. Each model is larger than 4 x LIMIT."""
    for kind, experts in EXPERTS.items():
        hollow(tmp_path / kind, kind, **{**WIDE, **experts})
        assert (tmp_path / kind / "model.safetensors").stat().st_size > 4 * LIMIT
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.full
def test_families_of_many_experts_go_in_and_out_under_a_quarter_of_their_size(wide: Path) -> None:
    done = rounds(wide, imports=SHARD, exports=SHARD)
    assert done.returncode == 0, done.stderr
    for kind in EXPERTS:
        written = sum(file.stat().st_size for file in (wide / kind / "back").glob("*.safetensors"))
        assert written == pytest.approx((wide / kind / "model.safetensors").stat().st_size, rel=0.01)


@pytest.mark.full
def test_the_growth_of_memory_stays_under_a_quarter_of_the_model_also_after_a_kill(tmp_path: Path) -> None:
    """The model is dense, and has tensors larger than a shard."""
    theirs, out = tmp_path / "theirs", tmp_path / "made/ours"
    hollow(theirs, "llama", hidden_size=256, intermediate_size=12288, num_hidden_layers=4, vocab_size=8192)
    assert (theirs / "model.safetensors").stat().st_size > 4 * LIMIT
    out.parent.mkdir()
    command = [sys.executable, "-c", IMPORT, str(theirs), str(out), str(LIMIT), str(SHARD)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert all(first.stdout.readline() for _ in range(8))
        first.kill()
    assert not out.exists()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert int(again.stdout.split("kept")[1]) >= 8
    assert [path.name for path in out.parent.iterdir()] == ["ours"]
    specs = state_specs(load_config(out / "config.yaml")).items()
    weights = {name: spec for name, spec in specs if not name.startswith(OPTIMIZER_PREFIX)}
    assert verify(find_checkpoint(out), weights)[1] == []


@pytest.mark.parametrize("at", [0, 2, 5])
def test_what_goes_on_is_what_would_have_been(tmp_path: Path, at: int) -> None:
    theirs = save(tiny_model("qwen2_moe"), tmp_path / "theirs")
    options = ImportOptions(null_experts=8, top_k=5)
    import_model(theirs, tmp_path / "straight", options, shard_bytes=20_000)

    def stop(stage: str, done: int, total: int) -> None:
        told.append(done)
        if len(told) > at:
            raise KeyboardInterrupt

    told: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        import_model(theirs, tmp_path / "ours", options, shard_bytes=20_000, report=stop)
    # A kill in the middle of a shard leaves half a file that is not renamed yet. The test also damages a finished shard.
    shards = sorted((tmp_path / "ours.importing/tree/step_0").iterdir())
    shards[-1].write_bytes(shards[-1].read_bytes()[:-7])
    (tmp_path / "ours.importing/writing/shard_00007.safetensors").write_bytes(b"half")
    done = import_model(theirs, tmp_path / "ours", options, shard_bytes=20_000)
    assert done.kept == at
    one, other = (
        json.loads((tmp_path / name / "step_0/index.json").read_text())["tensors"] for name in ("straight", "ours")
    )
    assert one == other  # all fingerprints are equal, too
    assert not (tmp_path / "ours.importing").exists()


def test_an_import_of_something_else_does_not_go_on(tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    theirs = save(tiny_model("llama"), tmp_path / "theirs")
    with pytest.raises(KeyboardInterrupt):
        import_model(theirs, tmp_path / "ours", report=stop)
    with refused(ConfigError):
        import_model(theirs, tmp_path / "ours", ImportOptions(experts=2))
    save(tiny_model("llama", seed=2), tmp_path / "theirs")
    with refused(ConfigError):
        import_model(theirs, tmp_path / "ours")
    (tmp_path / "ours.importing/plan.json").unlink()
    SPECIAL["fifo"](tmp_path / "ours.importing/plan.json")
    with pytest.raises(DataError, match=r"plan\.json: damaged .*is no regular file"):
        import_model(theirs, tmp_path / "ours")


def test_two_imports_into_one_folder_do_not_mix(tmp_path: Path) -> None:
    theirs = save(tiny_model("llama"), tmp_path / "theirs")
    (tmp_path / "ours.importing").mkdir()
    with FileLock(tmp_path / "ours.importing/lock"), refused(ConfigError):
        import_model(theirs, tmp_path / "ours")
