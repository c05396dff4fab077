"""The nevers of the design, each a rule over the imports or the syntax tree, and each shown to fail on a planted line."""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Top down: a room imports from lower floors, and on its own floor only where no circle comes of it.
FLOORS = (
    {"train", "dry_run", "tools"},
    {
        "trainer",
        "build",
        "build_dispatch",
        "build_routing",
        "build_tuning",
        "build_lora",
        "base_weights",
        "session",
        "resume",
        "starting_weights",
        "trained",
        "training_step",
        "sizes",
        "doctor",
    },
    {"router_tuning"},
    {"parallel", "megatron", "evaluation", "generation", "hf"},
    {"model", "monitor", "checkpoint", "loss"},
    {"moe", "data", "optim"},
    {"preflight", "runtime", "launchers"},
    {"placement", "config", "comm", "errors"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
SINGLE_DEVICE = ("moe", "model")
TORCH_FREE = (
    "moe_dist/__init__.py",
    "moe_dist/errors.py",
    "moe_dist/config",
    "moe_dist/placement",
    "moe_dist/plan/preflight.py",
    "moe_dist/runtime",
    "moe_dist/train/__main__.py",
    "moe_dist/checkpoint/contents.py",
    "moe_dist/checkpoint/describe.py",
    "moe_dist/checkpoint/directory.py",
    "moe_dist/monitor/compare.py",
    "tools/compare_runs.py",
    "tools/doctor.py",
    "tools/inspect_checkpoint.py",
    "moe_dist/doctor",
    "moe_dist/plan/sizes.py",
    "moe_dist/plan/flops.py",
    "moe_dist/plan/memory.py",
    "launchers",
)


@dataclass(frozen=True)
class Source:
    """One file: its path below the root, its room, its syntax tree."""

    path: str
    tree: ast.Module

    @property
    def room(self) -> str:
        parts = Path(self.path).with_suffix("").parts
        return parts[1] if parts[0] == "moe_dist" else parts[0]

    def imports(self) -> Iterator[tuple[int, str]]:
        """Line and dotted name of everything imported, inside functions as well."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)

    def calls(self) -> Iterator[tuple[ast.Call, str]]:
        """Every call with the dotted name of what is called."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call):
                yield node, ast.unparse(node.func)

    def rooms_imported(self) -> Iterator[tuple[int, str]]:
        for line, name in self.imports():
            top, _, rest = name.partition(".")
            room = rest.partition(".")[0]
            if top == "moe_dist" and room not in ("", "__version__"):
                yield line, room
            elif top in ("launchers", "tools"):
                yield line, top


def planted(path: str, code: str) -> Source:
    return Source(path, ast.parse(code))


@pytest.fixture(scope="module")
def sources() -> list[Source]:
    paths = [path for top in ("moe_dist", "launchers", "tools") for path in sorted((ROOT / top).rglob("*.py"))]
    return [Source(str(path.relative_to(ROOT)), ast.parse(path.read_text())) for path in paths]


def floor_faults(files: list[Source]) -> list[str]:
    problems = [
        f"{f.path}: room {f.room!r} has no floor in {__file__}" for f in files if f.room not in FLOOR_OF | {"__init__": 0}
    ]
    for file in files:
        for line, room in file.rooms_imported():
            if FLOOR_OF.get(room, -1) < FLOOR_OF.get(file.room, -1):
                problems.append(f"{file.path}:{line}: {file.room} imports {room}, which is on a floor above it")
    return problems


def circle_faults(files: list[Source]) -> list[str]:
    """Rooms that import each other, over any number of rooms between."""
    direct: dict[str, set[str]] = {}
    for file in files:
        direct.setdefault(file.room, set()).update(room for _, room in file.rooms_imported() if room != file.room)

    def reachable(room: str) -> set[str]:
        seen: set[str] = set()
        stack = [room]
        while stack:
            for other in direct.get(stack.pop(), set()) - seen:
                seen.add(other)
                stack.append(other)
        return seen

    return [f"{room} imports itself through other rooms" for room in direct if room in reachable(room)]


def single_device_faults(files: list[Source]) -> list[str]:
    return [
        f"{file.path}:{line}: {file.room}/ is written for one device and takes plain values; it must not import {room}"
        for file in files
        if file.room in SINGLE_DEVICE
        for line, room in file.rooms_imported()
        if room in ("parallel", "megatron", "trainer", "config")
    ]


def comm_faults(files: list[Source]) -> list[str]:
    return [
        f"{file.path}:{line}: comm/ knows process groups and tensors only; it must not import {room}"
        for file in files
        if file.room == "comm"
        for line, room in file.rooms_imported()
        if room not in ("comm", "errors")
    ]


def process_group_faults(files: list[Source]) -> list[str]:
    makers = ("new_group", "new_subgroups", "init_process_group", "init_device_mesh", "DeviceMesh", "DeviceMesh.from_group")
    return [
        f"{file.path}:{call.lineno}: {name} makes process groups; they are made in moe_dist/parallel/mesh.py"
        for file in files
        if file.path != "moe_dist/parallel/mesh.py" and file.room != "megatron"
        for call, name in file.calls()
        if any(name == maker or name.endswith(f".{maker}") for maker in makers)
    ]


def rank_faults(files: list[Source]) -> list[str]:
    return [
        f"{file.path}:{call.lineno}: {name}() asks for the rank in the world; take it from the mesh or RankEnv"
        for file in files
        if file.path != "moe_dist/parallel/mesh.py" and file.room != "megatron"
        for call, name in file.calls()
        if name.rpartition(".")[2] in ("get_rank", "get_world_size") and not call.args and not call.keywords
    ]


def megatron_faults(files: list[Source]) -> list[str]:
    return [
        f"{file.path}:{line}: imports {name}; only moe_dist/megatron may (and data/ its datasets)"
        for file in files
        if file.room != "megatron"
        for line, name in file.imports()
        if name.partition(".")[0] == "megatron"
        and not (file.room == "data" and name.startswith("megatron.core.datasets."))
        and file.path != "tools/bench/megatron_core.py"  # the peer that is measured
    ]


def object_collective_faults(files: list[Source]) -> list[str]:
    names = ("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list", "send_object_list",
             "recv_object_list")  # fmt: skip
    return [
        f"{file.path}:{node.lineno}: object collectives unpickle what comes over the wire; send tensors"
        for file in files
        for node in ast.walk(file.tree)
        if (isinstance(node, ast.Attribute) and node.attr in names) or (isinstance(node, ast.Name) and node.id in names)
    ]


def unpickling_faults(files: list[Source]) -> list[str]:
    problems = []
    for file in files:
        for call, name in file.calls():
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            runs_code = (
                name.endswith(
                    ("pickle.load", "pickle.loads", "pickle.Unpickler", "yaml.load", "yaml.unsafe_load", "yaml.full_load")
                )
                or (name.endswith("torch.load") and options.get("weights_only") != "True")
                or options.get("allow_pickle") == "True"
                or name in ("eval", "exec")
            )
            if runs_code:
                problems.append(
                    f"{file.path}:{call.lineno}: {name} can run code from a file; read safetensors, JSON or safe YAML"
                )
        for line, name in file.imports():
            if name.partition(".")[0] in ("dill", "cloudpickle", "shelve", "marshal", "joblib"):
                problems.append(f"{file.path}:{line}: {name} can run code from a file")
    return problems


def command_line_faults(files: list[Source]) -> list[str]:
    return [
        f"{file.path}:{call.lineno}: {name} decorates tracebacks, which can print secrets; use runtime/command_line.py"
        for file in files
        for call, name in file.calls()
        if name == "typer.run"
        or (
            name == "typer.Typer"
            and {k.arg: ast.unparse(k.value) for k in call.keywords}.get("pretty_exceptions_enable") != "False"
        )
    ]


def name_faults(files: list[Source]) -> list[str]:
    return [
        f"{file.path}: a file is named after what it holds"
        for file in files
        if Path(file.path).stem in ("utils", "util", "common", "helpers", "helper", "misc")
        or any(part in ("utils", "common", "helpers", "misc") for part in Path(file.path).parts)
    ]


RULES: dict[Callable[[list[Source]], list[str]], tuple[Source, ...]] = {
    floor_faults: (
        planted("moe_dist/config/x.py", "from moe_dist.plan.preflight import check"),
        planted("moe_dist/moe/x.py", "def f():\n    import moe_dist.model.transformer"),
        planted("moe_dist/data/x.py", "from moe_dist import loss"),
        planted("moe_dist/comm/x.py", "from launchers.local import launch"),
        planted("moe_dist/new_room/x.py", "pass"),
    ),
    single_device_faults: (
        planted("moe_dist/moe/x.py", "from moe_dist.config.schema import Config"),
        planted("moe_dist/model/x.py", "from moe_dist.parallel import mesh"),
    ),
    comm_faults: (planted("moe_dist/comm/x.py", "from moe_dist.placement.placement import ExpertPlacement"),),
    process_group_faults: (
        planted("moe_dist/moe/x.py", "import torch.distributed as dist\ndist.new_group([0])"),
        planted("moe_dist/data/x.py", "mesh = DeviceMesh.from_group(group, 'cpu')"),
        planted("tools/x.py", "torch.distributed.init_process_group('gloo')"),
    ),
    rank_faults: (planted("moe_dist/moe/x.py", "half = dist.get_rank() // 2"),),
    megatron_faults: (
        planted("moe_dist/moe/x.py", "from megatron.core.datasets import indexed_dataset"),
        planted("moe_dist/data/x.py", "from megatron.core.transformer import module"),
        planted("tools/x.py", "import megatron"),
    ),
    object_collective_faults: (
        planted("moe_dist/comm/x.py", "dist.all_gather_object(out, value)"),
        planted("moe_dist/comm/x.py", "broadcast_object_list([1])"),
    ),
    unpickling_faults: (
        planted("moe_dist/checkpoint/x.py", "pickle.load(stream)"),
        planted("moe_dist/checkpoint/x.py", "torch.load(path)"),
        planted("moe_dist/checkpoint/x.py", "torch.load(path, weights_only=False)"),
        planted("moe_dist/data/x.py", "np.load(path, allow_pickle=True)"),
        planted("moe_dist/config/x.py", "yaml.load(text)"),
        planted("moe_dist/config/x.py", "import dill"),
    ),
    command_line_faults: (
        planted("tools/x.py", "typer.run(main)"),
        planted("launchers/x.py", "app = typer.Typer(add_completion=False)"),
    ),
    name_faults: (planted("moe_dist/moe/utils.py", "pass"), planted("moe_dist/common/x.py", "pass")),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_holds(rule: Callable[[list[Source]], list[str]], sources: list[Source]) -> None:
    assert not (problems := rule(sources)), "\n".join(problems)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_would_fail(rule: Callable[[list[Source]], list[str]]) -> None:
    for plant in RULES[rule]:
        assert rule([plant]), f"{rule.__name__} does not see {ast.unparse(plant.tree)!r} in {plant.path}"


def test_rooms_make_no_circle(sources: list[Source]) -> None:
    assert not (problems := circle_faults(sources)), "\n".join(problems)


def test_a_circle_would_fail() -> None:
    there = planted("moe_dist/train/build.py", "from moe_dist import trainer")
    back = planted("moe_dist/train/trainer.py", "def f():\n    from moe_dist.train.resume import x")
    close = planted("moe_dist/train/resume.py", "import moe_dist.train.build")
    assert circle_faults([there, back, close])
    assert not circle_faults([there, back])


def import_without_torch(modules: list[str]) -> subprocess.CompletedProcess[str]:
    """Imports modules in a process in which importing torch (or what needs it) fails."""
    code = (
        "import importlib, sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'megatron'):\n"
        "            raise ImportError(f'{name} is blocked here')\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except ImportError as error:\n"
        "        sys.exit(f'{name}: {error}')\n"
    )
    return subprocess.run([sys.executable, "-c", code, *modules], cwd=ROOT, capture_output=True, text=True, timeout=100)


def test_a_login_node_needs_no_torch() -> None:
    paths = [path for top in TORCH_FREE for path in ([ROOT / top] if top.endswith(".py") else (ROOT / top).rglob("*.py"))]
    parts = [path.relative_to(ROOT).with_suffix("").parts for path in paths if path.name != "__main__.py"]
    modules = sorted(".".join(each[:-1] if each[-1] == "__init__" else each) for each in parts)
    assert {"moe_dist", "moe_dist.config.load", "moe_dist.plan.preflight", "launchers.local"} <= set(modules)
    result = import_without_torch(modules)
    assert result.returncode == 0, result.stderr


def test_importing_torch_would_fail_there() -> None:
    assert import_without_torch(["moe_dist.model.transformer"]).returncode != 0
