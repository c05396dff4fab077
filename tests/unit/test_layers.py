"""The import graph stays small, and the code has no forbidden imports or calls. Each rule reads imports or syntax
trees, and must fail if a test plants a forbidden line.

docs/import_graph.py defines and computes rooms, floors and arrows. Imports inside functions and under TYPE_CHECKING count
like all others.
"""

import ast
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from docs.import_graph import DRAWING, TOPS, ImportGraph, Source, draw, reachable, read_sources, room_of

ROOT = Path(__file__).parents[2]

MOST_FLOORS, MOST_ROOMS, MOST_ARROWS = 8, 22, 112
LOOSE_FILES = ("__init__.py", "__main__.py", "errors.py")
# Research measures Megatron-Core itself.
MEASURED_PEER = ("research/gpu_bench/megatron_core.py",)
SINGLE_DEVICE = ("moe", "model")
EVALUATION = ("moe_dist.train.evaluation", "moe_dist.inference")


def imports(file: Source) -> Iterator[tuple[int, str]]:
    """Yields line and dotted name of every import, also inside functions."""
    return ((each.line, each.name) for each in file.imports)


@cache  # several rules ask for the nodes of the same files
def nodes(file: Source) -> list[ast.Call | ast.Attribute | ast.Name]:
    return [node for node in ast.walk(file.tree) if isinstance(node, ast.Call | ast.Attribute | ast.Name)]


@cache
def calls(file: Source) -> list[tuple[ast.Call, str]]:
    """Returns every call with the dotted name of the called function."""
    return [(node, dotted(node.func)) for node in nodes(file) if isinstance(node, ast.Call)]


def dotted(node: ast.expr) -> str:
    """Returns a name or attribute as `a.b.c`; empty for other nodes. `ast.unparse` takes 20 times as long."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def rooms_imported(file: Source) -> Iterator[tuple[int, str]]:
    for line, name in imports(file):
        if name.partition(".")[0] in TOPS:
            yield line, room_of(name)


def planted(path: str, code: str) -> Source:
    return Source(path, ast.parse(code))


@pytest.fixture(scope="module")
def sources() -> list[Source]:
    """Returns the files of the product and of research. Rules about forbidden imports apply to both. The import graph
    has only the product."""
    return [file for file in read_sources(tops=(*TOPS, "research")) if not file.path.startswith("research/tests/")]


@pytest.fixture(scope="module")
def graph(sources: list[Source]) -> ImportGraph:
    return ImportGraph(file for file in sources if file.room != "research")


def size_faults(graph: ImportGraph) -> list[str]:
    """Returns an error for too many floors, rooms or arrows. It lists the arrows that rest on one file, because these are
    the first to reconsider."""
    arrows, floors = sum(map(len, graph.arrows.values())), graph.floors()
    problems = []
    if max(floors.values()) > MOST_FLOORS:
        problems.append(f"{max(floors.values())} floors, at most {MOST_FLOORS}: {' > '.join(longest_chain(graph))}")
    if len(graph.arrows) > MOST_ROOMS:
        problems.append(f"{len(graph.arrows)} rooms, at most {MOST_ROOMS}: {', '.join(sorted(graph.arrows))}")
    if arrows > MOST_ARROWS:
        thin = "\n  ".join(f"{room} -> {other}: {file}" for room, other, file in graph.thin_arrows())
        problems.append(f"{arrows} arrows between rooms, at most {MOST_ARROWS}; these rest on one file each:\n  {thin}")
    return problems


def longest_chain(graph: ImportGraph) -> list[str]:
    floors = graph.floors()
    chain = [max(sorted(floors), key=lambda room: floors[room])]
    while below := [other for other in sorted(graph.arrows[chain[-1]]) if floors[other] == floors[chain[-1]] - 1]:
        chain.append(below[0])
    return chain


def circle_faults(graph: ImportGraph) -> list[str]:
    return [
        *(f"these files import each other: {', '.join(circle)}" for circle in graph.circles()),
        *(f"these folders import each other: {', '.join(circle)}" for circle in graph.folder_circles()),
    ]


def loose_file_faults(files: list[Source]) -> list[str]:
    return [
        f"{file.path}: a file of the package lives in a room; only {', '.join(LOOSE_FILES)} stand loose"
        for file in files
        if Path(file.path).parent == Path("moe_dist") and Path(file.path).name not in LOOSE_FILES
    ]


def package_faults(files: list[Source]) -> list[str]:
    """moe_dist must not import launchers or tools. `moe_dist/__main__.py` starts them by name."""
    return [
        f"{file.path}:{line}: an installed package without the clone has no {room}"
        for file in files
        if file.path.startswith("moe_dist/")
        for line, room in rooms_imported(file)
        if room in ("launchers", "tools")
    ]


def research_faults(files: list[Source]) -> list[str]:
    return [
        f"{file.path}:{line}: imports {name}; research imports the product, and nothing outside imports research"
        for file in files
        if file.room != "research"
        for line, name in imports(file)
        if name.partition(".")[0] == "research"
    ]


def forward_faults(graph: ImportGraph) -> list[str]:
    """A training step must not import evaluation, neither directly nor through other files."""
    reached = reachable(
        {module: set(others) for module, others in graph.files.items()}, "moe_dist.train.step.training_step"
    )
    return [f"a training step imports {module}" for module in sorted(reached) if module.startswith(EVALUATION)]


def single_device_faults(files: list[Source]) -> list[str]:
    return [
        f"{file.path}:{line}: {file.room}/ is written for one device and takes plain values; it must not import {room}"
        for file in files
        if file.room in SINGLE_DEVICE
        for line, room in rooms_imported(file)
        if room in ("parallel", "megatron", "train", "config")
    ]


def comm_faults(files: list[Source]) -> list[str]:
    return [
        f"{file.path}:{line}: comm/ knows process groups and tensors only; it must not import {room}"
        for file in files
        if file.room == "comm"
        for line, room in rooms_imported(file)
        if room not in ("comm", "errors")
    ]


def process_group_faults(files: list[Source]) -> list[str]:
    makers = ("new_group", "new_subgroups", "init_process_group", "init_device_mesh", "DeviceMesh", "DeviceMesh.from_group")
    return [
        f"{file.path}:{call.lineno}: {name} makes process groups; they are made in moe_dist/parallel/mesh.py"
        for file in files
        if file.path != "moe_dist/parallel/mesh.py" and file.room != "megatron"
        for call, name in calls(file)
        if any(name == maker or name.endswith(f".{maker}") for maker in makers)
    ]


def rank_faults(files: list[Source]) -> list[str]:
    return [
        f"{file.path}:{call.lineno}: {name}() asks for the rank in the world; take it from the mesh or RankEnv"
        for file in files
        if file.path != "moe_dist/parallel/mesh.py" and file.room != "megatron"
        for call, name in calls(file)
        if name.rpartition(".")[2] in ("get_rank", "get_world_size") and not call.args and not call.keywords
    ]


def megatron_faults(files: list[Source]) -> list[str]:
    return [
        f"{file.path}:{line}: imports {name}; only moe_dist/megatron may"
        for file in files
        if file.room != "megatron"
        for line, name in imports(file)
        if name.partition(".")[0] == "megatron" and file.path not in MEASURED_PEER
    ]


def object_collective_faults(files: list[Source]) -> list[str]:
    names = ("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list", "send_object_list",
             "recv_object_list")  # fmt: skip
    return [
        f"{file.path}:{node.lineno}: object collectives unpickle what comes over the wire; send tensors"
        for file in files
        for node in nodes(file)
        if (isinstance(node, ast.Attribute) and node.attr in names) or (isinstance(node, ast.Name) and node.id in names)
    ]


GUARDS = ("weights_only", "allow_pickle")


def unpickling_faults(files: list[Source]) -> list[str]:
    problems = []
    for file in files:
        for call, name in calls(file):
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg in GUARDS}
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
        for line, name in imports(file):
            if name.partition(".")[0] in ("dill", "cloudpickle", "shelve", "marshal", "joblib"):
                problems.append(f"{file.path}:{line}: {name} can run code from a file")
    return problems


def command_line_faults(files: list[Source]) -> list[str]:
    return [
        f"{file.path}:{call.lineno}: {name} decorates tracebacks, which can print secrets; use runtime/command_line.py"
        for file in files
        for call, name in calls(file)
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
    loose_file_faults: (planted("moe_dist/trainer.py", "pass"),),
    package_faults: (
        planted("moe_dist/train/x.py", "def f():\n    import tools.evaluate"),
        planted("moe_dist/hf/x.py", "if TYPE_CHECKING:\n    from tools import import_hf"),
    ),
    research_faults: (planted("tools/x.py", "def f():\n    from research.experiments import study"),),
    single_device_faults: (
        planted("moe_dist/moe/x.py", "from moe_dist.config.schema import Config"),
        planted("moe_dist/model/x.py", "import moe_dist.megatron"),
    ),
    comm_faults: (planted("moe_dist/comm/x.py", "from moe_dist.placement.placement import ExpertPlacement"),),
    process_group_faults: (
        planted("moe_dist/moe/x.py", "import torch.distributed as dist\ndist.new_group([0])"),
        planted("moe_dist/data/x.py", "mesh = DeviceMesh.from_group(group, 'cpu')"),
    ),
    rank_faults: (planted("moe_dist/moe/x.py", "half = dist.get_rank() // 2"),),
    megatron_faults: (
        planted("moe_dist/moe/x.py", "from megatron.core.transformer import module"),
        planted("moe_dist/data/x.py", "from megatron.core.datasets import indexed_dataset"),
    ),
    object_collective_faults: (
        planted("moe_dist/comm/x.py", "dist.all_gather_object(out, value)"),
        planted("moe_dist/comm/x.py", "broadcast_object_list([1])"),
    ),
    unpickling_faults: (
        planted("moe_dist/checkpoint/x.py", "pickle.load(stream)"),
        planted("moe_dist/checkpoint/x.py", "torch.load(path)"),
        planted("moe_dist/data/x.py", "np.load(path, allow_pickle=True)"),
        planted("moe_dist/config/x.py", "yaml.load(text)"),
        planted("moe_dist/config/x.py", "import dill"),
    ),
    command_line_faults: (planted("launchers/x.py", "app = typer.Typer(add_completion=False)"),),
    name_faults: (planted("moe_dist/common/x.py", "pass"),),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.slow
def test_holds(rule: Callable[[list[Source]], list[str]], sources: list[Source]) -> None:
    assert not (problems := rule(sources)), "\n".join(problems)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_would_fail(rule: Callable[[list[Source]], list[str]]) -> None:
    for plant in RULES[rule]:
        assert rule([plant]), f"{rule.__name__} does not see {ast.unparse(plant.tree)!r} in {plant.path}"


def test_tests_and_documents_import_no_research() -> None:
    files = [path for top in ("docs", "tests") for path in (ROOT / top).rglob("*.py")]
    assert not [path for path in files if re.search(r"^\s*(from|import) research\b", path.read_text(), re.MULTILINE)]


def test_the_import_graph_stays_small(graph: ImportGraph) -> None:
    assert not (problems := circle_faults(graph)), "\n".join(problems)
    assert not (problems := size_faults(graph)), "\n".join(problems)
    for kind in ("typing", "function"):
        print(f"imported in this way only ({kind}):", *graph.apart(kind), sep="\n  ")


@pytest.mark.parametrize(
    "back", ["def f():\n    from moe_dist.train.c import x", "if TYPE_CHECKING:\n    from .c import x"]
)
def test_a_circle_of_files_would_fail(back: str) -> None:
    there = planted("moe_dist/train/a.py", "from moe_dist.train.b import B")
    between = planted("moe_dist/train/b.py", back)
    close = planted("moe_dist/train/c.py", "import moe_dist.train.a")
    assert circle_faults(ImportGraph([there, between, close]))
    assert not circle_faults(ImportGraph([there, between, planted(close.path, "import torch")]))


def test_a_circle_of_folders_would_fail() -> None:
    """left/a imports right/b, and right/c imports left/d. This is a circle of folders, but not of files."""
    left = [planted("moe_dist/moe/left/a.py", "import moe_dist.moe.right.b"), planted("moe_dist/moe/left/d.py", "pass")]
    right = [planted("moe_dist/moe/right/b.py", "pass"), planted("moe_dist/moe/right/c.py", "import moe_dist.moe.left.d")]
    assert circle_faults(ImportGraph([*left, *right]))
    assert not circle_faults(ImportGraph([*left, right[0]]))


def test_a_training_step_imports_no_evaluation(graph: ImportGraph) -> None:
    assert "moe_dist.train.step.training_step" in graph.sources
    assert not (problems := forward_faults(graph)), "\n".join(problems)


def test_the_drawing_is_current(graph: ImportGraph) -> None:
    assert DRAWING.read_text() == draw(graph), (
        "the rooms' imports have changed: python docs/import_graph.py draws them anew"
    )


def test_the_map_names_each_room(graph: ImportGraph) -> None:
    """docs/architecture.md lists all rooms, and says which rooms can be imported without torch. The files that it names
    exist."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| .* \| (yes|no) \|$", page, re.MULTILINE)
    plain = graph.rooms_without_torch()
    expected = {room: "no" if room in plain else "yes" for room in graph.arrows}
    assert dict(rows) == expected
    for file in set(re.findall(r"\b\w+/[\w/]+\.py", page)):
        assert (ROOT / file).exists() or (ROOT / "moe_dist" / file).exists(), f"docs/architecture.md names {file}"
