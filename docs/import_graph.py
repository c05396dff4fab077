"""Measures which rooms of the code import each other, and draws the graph.

`python docs/import_graph.py` writes docs/import_graph.svg and prints the figures that tests/unit/test_layers.py checks. A
room is one of: a folder directly below moe_dist with everything in it, a single file of moe_dist, launchers, tools. Imports
inside functions and under TYPE_CHECKING count. Two tables that name modules as text do not count: the subcommands in
moe_dist/__main__.py and the public API in moe_dist/__init__.py. These two files import a module when it is first used.
"""

import ast
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import fsum
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).parents[1]
DRAWING = ROOT / "docs" / "import_graph.svg"
TOPS = ("moe_dist", "launchers", "tools")

Kind = Literal["module", "typing", "function"]
"""Whether an import runs with its file, is read by type checkers only, or runs when a function is called."""


@dataclass(frozen=True)
class Import:
    line: int
    name: str  # dotted, with the imported object: moe_dist.errors.ConfigError
    kind: Kind


@dataclass(frozen=True)
class Source:
    """One file: its path below the root and its syntax tree."""

    path: str
    tree: ast.Module

    @cached_property
    def module(self) -> str:
        parts = Path(self.path).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def room(self) -> str:
        return room_of(self.module)

    @property
    def folder(self) -> str:
        """The folder of the file. A file directly in moe_dist counts as a folder, as it counts as a room."""
        folder = str(Path(self.path).parent)
        return self.path if folder == "moe_dist" else folder

    @cached_property
    def imports(self) -> list[Import]:
        return list(self._imports(self.tree, "module"))

    def _imports(self, node: ast.AST, kind: Kind) -> Iterator[Import]:
        for child in _statements(node):
            if isinstance(child, ast.Import):
                yield from (Import(child.lineno, alias.name, kind) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = self._absolute(child)
                yield from (Import(child.lineno, f"{base}.{alias.name}", kind) for alias in child.names)
            inner = kind
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                inner = "function"
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                inner = "typing"
            yield from self._imports(child, inner)

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        package = Path(self.path).parts[: -node.level]
        return ".".join((*package, node.module) if node.module else package)


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Returns the statements, handlers and cases directly below a node. No expression has an import."""
    for name in ("body", "handlers", "orelse", "finalbody", "cases"):
        below = getattr(node, name, ())
        if isinstance(below, list):  # the body of a lambda or a conditional expression is one expression
            yield from below


def room_of(module: str) -> str:
    top, *below = module.split(".")
    return [*below, "__init__"][0] if top == "moe_dist" else top


def read_sources(root: Path = ROOT, tops: Iterable[str] = TOPS) -> list[Source]:
    paths = [path for top in tops for path in sorted((root / top).rglob("*.py"))]
    return [Source(str(path.relative_to(root)), ast.parse(path.read_text())) for path in paths]


class ImportGraph:
    """`files[a][b]`: the imports of module b in module a. `arrows[a]`: the rooms that room a imports."""

    def __init__(self, sources: Iterable[Source]) -> None:
        self.sources = {source.module: source for source in sources}
        self.files: dict[str, dict[str, list[Import]]] = {module: defaultdict(list) for module in self.sources}
        self.arrows: dict[str, set[str]] = {source.room: set() for source in self.sources.values()}
        for module, source in self.sources.items():
            for each in source.imports:
                other = self.module_of(each.name)
                if other and other != module:
                    self.files[module][other].append(each)
                    self.arrows[source.room] |= {room_of(other)} - {source.room}

    def module_of(self, name: str) -> str:
        """The longest prefix of a dotted name that is a module of this graph, or an empty string."""
        while name and name not in self.sources:
            name = name.rpartition(".")[0]
        return name

    def apart(self, kind: Kind) -> list[str]:
        """Returns `importing file:line imports module` for each pair of modules whose imports are all of this kind."""
        return [
            f"{self.sources[a].path}:{found[0].line} imports {b}"
            for a, others in self.files.items()
            for b, found in others.items()
            if {each.kind for each in found} == {kind}
        ]

    def circles(self) -> list[list[str]]:
        """Groups of files that import each other, directly or through other files, by imports of any kind."""
        return circles({module: set(others) for module, others in self.files.items()})

    def folder_circles(self) -> list[list[str]]:
        """Groups of folders that import each other, directly or through other folders."""
        arrows: dict[str, set[str]] = defaultdict(set)
        for module, others in self.files.items():
            folder = self.sources[module].folder
            arrows[folder] |= {self.sources[other].folder for other in others} - {folder}
        return circles(arrows)

    def thin_arrows(self) -> list[tuple[str, str, str]]:
        """(room, imported room, path) for each imported room that only one file of the importing room imports."""
        by: dict[tuple[str, str], list[str]] = defaultdict(list)
        for module, others in self.files.items():
            for other in {room_of(name) for name in others} - {room_of(module)}:
                by[room_of(module), other].append(self.sources[module].path)
        return sorted((*arrow, paths[0]) for arrow, paths in by.items() if len(paths) == 1)

    def floors(self) -> dict[str, int]:
        """Returns each room's floor: the number of rooms on the longest chain of imports that starts there."""
        if found := circles(self.arrows):
            raise ValueError(f"rooms that import each other have no floor: {found}")
        floors: dict[str, int] = {}

        def floor(room: str) -> int:
            if room not in floors:
                floors[room] = 1 + max((floor(other) for other in self.arrows[room]), default=0)
            return floors[room]

        for room in sorted(self.arrows):
            floor(room)
        return floors

    def rooms_without_torch(self) -> set[str]:
        """Rooms whose files all import without torch, directly and through other files."""
        needs = {m for m, s in self.sources.items() if any(torch_or_megatron(i) for i in s.imports if i.kind == "module")}
        while more := {
            a
            for a, others in self.files.items()
            if a not in needs and any(b in needs and any(i.kind == "module" for i in found) for b, found in others.items())
        }:
            needs |= more
        return set(self.arrows) - {room_of(module) for module in needs}


def torch_or_megatron(each: Import) -> bool:
    return each.name.partition(".")[0] in ("torch", "megatron")


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Sets of nodes that reach each other. Nodes without arrows in or out are on no circle, and are removed first."""
    left = {node: set(others) for node, others in arrows.items()}
    while True:
        targets = set().union(*left.values()) if left else set()
        ends = {node for node, others in left.items() if not others & left.keys() or node not in targets}
        if not ends:
            break
        left = {node: others - ends for node, others in left.items() if node not in ends}
    reached = {node: reachable(left, node) for node in left}
    found = {frozenset(b for b in reached[a] if a in reached[b]) for a in left}
    return sorted(sorted(circle) for circle in found if circle)


def reachable(arrows: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    stack = [start]
    while stack:
        new = arrows.get(stack.pop(), set()) - seen
        seen |= new
        stack.extend(new)
    return seen


# The drawing. An arrow over several floors gets a bend on each floor in between, so that it crosses no box.

BOX_WIDTH, BOX_HEIGHT, BEND_WIDTH, GAP, FLOOR_HEIGHT, MARGIN = 108, 34, 16, 22, 96, 56
SWEEPS = 24
Node = str | tuple[str, str, int]
"""A room, or the bend of the arrow (from, to) on a floor."""


def unimplied(arrows: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The arrows that are not implied by a longer path: if a imports b and c, and b imports c, a to c is left out."""
    return sorted(
        (a, b) for a, others in arrows.items() for b in others if not any(b in reachable(arrows, c) for c in others - {b})
    )


def draw(graph: ImportGraph) -> str:
    floors = graph.floors()
    ways = [[a, *((a, b, f) for f in range(floors[a] - 1, floors[b], -1)), b] for a, b in unimplied(graph.arrows)]
    x = place(floors, ways)
    height = max(floors.values())
    left, right = min(x.values()) - BOX_WIDTH / 2 - MARGIN, max(x.values()) + BOX_WIDTH / 2 + MARGIN / 2

    def y(floor: int) -> int:
        return MARGIN // 2 + (height - floor) * FLOOR_HEIGHT

    plain = graph.rooms_without_torch()
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{left:.0f} 0 {right - left:.0f} {y(1) + BOX_HEIGHT + MARGIN}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="14">',
        "<defs><marker id='tip' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='7' markerHeight='7' orient='auto'>"
        "<path d='M0 0.8 L8 4 L0 7.2 z' fill='#5b6573'/></marker></defs>",
        f'<rect x="{left:.0f}" width="100%" height="100%" fill="#ffffff"/>',
    ]
    for floor in range(1, height + 1):
        lines.append(f'<text x="{left + 14:.0f}" y="{y(floor) + 22}" fill="#8a93a0">{floor}</text>')
    lines += [f'<path d="{path(way, floors, x, y)}" fill="none" stroke="#5b6573" marker-end="url(#tip)"/>' for way in ways]
    for room, floor in sorted(floors.items()):
        fill = "#e3f1e4" if room in plain else "#e6ecf7"
        lines.append(
            f'<rect x="{x[room] - BOX_WIDTH / 2:.0f}" y="{y(floor)}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="5" '
            f'fill="{fill}" stroke="#39424e"/>'
            f'<text x="{x[room]:.0f}" y="{y(floor) + 22}" text-anchor="middle">{room}</text>'
        )
    note = "Arrows that a longer way implies are left out. Rooms in green import without torch."
    lines.append(f'<text x="{left + 14:.0f}" y="{y(1) + BOX_HEIGHT + 34}" fill="#5b6573" font-size="13">{note}</text>')
    return "\n".join([*lines, "</svg>", ""])


def place(floors: dict[str, int], ways: list[list[Node]]) -> dict[Node, float]:
    """The x of each room's and bend's centre, in pixels. A floor's nodes are sorted by the mean x of their neighbours."""
    rows: dict[int, list[Node]] = defaultdict(list)
    for room, floor in sorted(floors.items()):
        rows[floor].append(room)
    joined: dict[Node, set[Node]] = defaultdict(set)
    for way in ways:
        for bend in way[1:-1]:
            rows[bend[2]].append(bend)  # type: ignore[arg-type]  # between its ends a way has bends only
        for a, b in pairwise(way):
            joined[a].add(b)
            joined[b].add(a)
    x: dict[Node, float] = {}
    for row in rows.values():
        spread(row, {node: i * BOX_WIDTH for i, node in enumerate(row)}, x)
    for sweep in range(SWEEPS):
        for floor in sorted(rows, reverse=sweep % 2 == 0):
            above = sweep % 2 == 0
            wish = {n: mean([x[o] for o in joined[n] if sweep >= SWEEPS - 6 or (level(o, floors) > floor) == above], x[n])
                    for n in rows[floor]}  # fmt: skip
            rows[floor].sort(key=lambda node: (wish[node], str(node)))
            spread(rows[floor], wish, x)
    return x


def level(node: Node, floors: dict[str, int]) -> int:
    return floors[node] if isinstance(node, str) else node[2]


def mean(values: list[float], otherwise: float) -> float:
    return fsum(values) / len(values) if values else otherwise  # fsum, because `values` come from a set, in any order


def spread(row: list[Node], wish: dict[Node, float], x: dict[Node, float]) -> None:
    """Sets `x` of a row's nodes as near to `wish` as their widths allow, and keeps their order."""
    blocks: list[tuple[list[Node], float]] = []  # nodes that touch, and the left edge of the block
    for node in row:
        nodes, start = [node], wish[node] - width(node) / 2
        while blocks and blocks[-1][1] + sum(map(width, blocks[-1][0])) > start:
            before, its_start = blocks.pop()
            length = sum(map(width, before))
            start = (its_start * len(before) + (start - length) * len(nodes)) / (len(before) + len(nodes))
            nodes = before + nodes
        blocks.append((nodes, start))
    for nodes, start in blocks:
        for node in nodes:
            x[node] = start + width(node) / 2
            start += width(node)


def width(node: Node) -> int:
    return GAP + (BOX_WIDTH if isinstance(node, str) else BEND_WIDTH)


def path(way: list[Node], floors: dict[str, int], x: dict[Node, float], y: Callable[[int], int]) -> str:
    points = []
    for node in way:
        top = y(level(node, floors))
        points.append((x[node], top, top + BOX_HEIGHT))
    text = f"M{points[0][0]:.0f} {points[0][2]}"
    for (x0, _, y0), (x1, y1, bottom) in pairwise(points):
        middle = (y0 + y1) / 2
        text += f" C{x0:.0f} {middle:.0f} {x1:.0f} {middle:.0f} {x1:.0f} {y1} L{x1:.0f} {bottom}"
    return text[: text.rindex(" L")]


def main() -> None:
    graph = ImportGraph(read_sources())
    DRAWING.write_text(draw(graph))
    arrows = sum(map(len, graph.arrows.values()))
    print(f"{len(graph.arrows)} rooms on {max(graph.floors().values())} floors, {arrows} arrows: {DRAWING.name}")
    for room, other, file in graph.thin_arrows():
        print(f"{room} imports {other} in one file: {file}")
    for kind in ("typing", "function"):
        print(f"imported in this way only ({kind}):", *graph.apart(kind), sep="\n  ")


if __name__ == "__main__":
    main()
