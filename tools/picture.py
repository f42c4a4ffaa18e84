"""Draw docs/architecture.svg: the files of pera_kernels, what they import, the way of x and of dy.

All of it is read from the sources. A file stands above all that it imports; a circle is an error.
The ways follow calls, from PeraLinear.forward and from PeraFunction.backward.
"""

import ast
from collections.abc import Iterator
from functools import cache
from importlib.util import resolve_name
from pathlib import Path
from typing import Any

from tools.documents import drawing

PACKAGE = Path(__file__).parents[1] / "pera_kernels"
# By the names of modules.
FILES = {
    ".".join((PACKAGE.name, *path.with_suffix("").parts)).removesuffix(".__init__"): str(path)
    for path in (found.relative_to(PACKAGE) for found in PACKAGE.rglob("*.py"))
}
PICTURE = PACKAGE.parent / "docs" / "architecture.svg"
# One box each.
FOLDERS = ("adapters", "cli", "peft")
STARTS = {"x": ("module.py", "PeraLinear.forward"), "dy": ("autograd.py", "PeraFunction.backward")}
KINDS = {
    "x": ("#1f77b4", "on the way of x, forward"),
    "dy": ("#d1495b", "on the way of dy, backward"),
    "both": ("#6a3d9a", "on both"),
    "import": ("#aab2bb", "an import that neither takes"),
}
Edge = tuple[str, str]


@cache
def source(file: str) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text(encoding="utf-8"))


@cache
def definition(file: str, name: str) -> ast.AST:
    """The function ``f`` or the method ``Class.f``; an empty module where there is none."""
    found: ast.AST = source(file)
    for part in name.split("."):
        inside = (n for n in ast.walk(found) if isinstance(n, (ast.FunctionDef, ast.ClassDef)))
        found = next((n for n in inside if n.name == part), ast.Module([], []))
    return found


def imports(file: str, tree: ast.AST) -> Iterator[tuple[str, str, str]]:
    """(name here, file, name there, "" for the file itself) of what comes from the package."""
    package = ".".join([PACKAGE.name, *file.split("/")[:-1]])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and node.names[0].name == PACKAGE.name:
            yield from imports("__init__.py", source("__init__.py"))
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                inside = FILES.get(f"{module}.{alias.name}")
                if where := inside or FILES.get(module):
                    yield alias.asname or alias.name, where, "" if inside else alias.name


def calls(file: str, function: str) -> Iterator[Edge]:
    """(file, function) of what a function calls in the package."""
    known = {here: (where, name) for here, where, name in imports(file, source(file))}
    for node in ast.walk(definition(file, function)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        start, method = called.partition(".")[0], called.rpartition(".")[2]
        if method == "apply" and start in ("PeraFunction", "DeltaWeight"):
            yield "autograd.py", f"{start}.forward"
        elif "implementation" in known and method.endswith(("forward", "backward")):
            # Of the backend that was chosen: one of those that backends.implementation imports.
            choice = imports("backends.py", definition("backends.py", "implementation"))
            yield from (known["implementation"], *((backend, method) for _, backend, _ in choice))
        elif start in known:
            yield known[start][0], known[start][1] or method
            if called == "launch":
                yield file, ast.unparse(node.args[0])
        elif start in (called, "self"):
            yield file, method


def way(*start: str) -> set[Edge]:
    """Which file calls which, from this function on."""
    waiting, seen, found = [start], set(), set()
    while waiting:
        if (at := waiting.pop()) not in seen:
            seen.add(at)
            waiting += (following := list(calls(*at)))
            found |= {(at[0], where) for where, _ in following}
    return found


def graphs() -> dict[str, set[Edge]]:
    """What imports what, and what calls what on the two ways; a folder of FOLDERS is one box."""
    # The public names and the entry of the command line import from all of it.
    files = {*FILES.values()} - {"__init__.py", "__main__.py"}
    imported = {(file, where) for file in files for _, where, _ in imports(file, source(file))}
    found = {"import": imported} | {kind: way(*start) for kind, start in STARTS.items()}
    named = {file: file.partition("/")[0] + "/" for file in files if file.startswith(FOLDERS)}
    for kind, edges in found.items():
        named_edges = {(named.get(a, a), named.get(b, b)) for a, b in edges}
        found[kind] = {(a, b) for a, b in named_edges if a != b and b != "__init__.py"}
    return found


def below(graph: set[Edge], name: str, above: tuple[str, ...] = ()) -> dict[str, int]:
    """The boxes that lead on from a box, and how many steps away they are at most."""
    if name in above:
        raise ValueError(f"a circle: {' -> '.join([*above, name])}")
    found: dict[str, int] = {}
    for lower in (b for a, b in graph if a == name):
        for far, depth in {lower: 0, **below(graph, lower, (*above, name))}.items():
            found[far] = max(found.get(far, 0), depth + 1)
    return found


def arrows() -> dict[Edge, str]:
    """What is drawn, by its kind: edges that do not follow from others of the same graph."""
    found = graphs()
    drawn = {(a, b) for graph in found.values() for a, b in graph if below(graph, a)[b] == 1}
    both = found["x"] & found["dy"]
    kinds = {"both": both, "x": found["x"], "dy": found["dy"], "import": drawn}
    return {edge: next(k for k, own in kinds.items() if edge in own) for edge in sorted(drawn)}


def described(edges: dict[Edge, str]) -> str:
    return "; ".join(f"{upper} to {lower}: {kind}" for (upper, lower), kind in edges.items())


def placed(graph: set[Edge]) -> dict[str, tuple[float, float]]:
    """A place for every box: its floor, and there near the boxes that it is joined to."""
    place = {name: (0.0, 0.0) for name in sorted({name for edge in graph for name in edge})}
    rows: dict[int, list[str]] = {}
    edges = sorted(graph)
    for name in place:
        rows.setdefault(max(below(graph, name).values(), default=0), []).append(name)
    for floor, row in sorted(rows.items()) * 30:
        ends = {n: [place[a if b == n else b][0] for a, b in edges if n in (a, b)] for n in row}
        row.sort(key=lambda name: sum(ends[name]) / len(ends[name]))
        # Rows are staggered, so that few arrows pass behind a box.
        middle = (len(row) - 1) / 2 - (len(row) > 1) * (floor % 3 - 1) * 0.22
        for number, name in enumerate(row):
            place[name] = (number - middle, float(floor))
    return place


def draw(path: Path) -> None:
    found = arrows()
    # A test compares the description with the sources; the rest depends on matplotlib's version.
    with drawing(path, described(found), figsize=(10, 9.5)) as ((axes,),):
        fill(axes, found)


def fill(axes: Any, found: dict[Edge, str]) -> None:
    """Boxes of files and arrows of imports."""
    place = placed(graphs()["import"])
    for upper, lower in sorted(found, key=lambda edge: found[edge] != "import"):
        kind, (x, y), (at_x, at_y) = found[upper, lower], place[upper], place[lower]
        style = {"arrowstyle": "-|>", "color": KINDS[kind][0], "lw": 0.9 + 0.6 * (kind != "import")}
        axes.annotate("", (at_x, at_y + 0.22), (x, y - 0.22), arrowprops=style)
    for name, (x, y) in place.items():
        face = "#fff3d6" if name.startswith("kernels/") else "#eef2f7"
        style = {"boxstyle": "round,pad=0.45", "fc": face, "ec": "#57606a"}
        axes.text(
            x,
            y,
            name.removesuffix(".py"),
            ha="center",
            va="center",
            size=10,
            bbox=style,
            color="black",
        )
    for color, text in KINDS.values():
        axes.plot([], [], color=color, label=text)
    axes.legend(loc="upper right", frameon=False)
    width = 0.4 + max(abs(x) for x, _ in place.values())
    axes.set(xlim=(-width, width), ylim=(-0.4, max(y for _, y in place.values()) + 0.4))
    axes.axis("off")


if __name__ == "__main__":
    draw(PICTURE)
