"""Draw docs/method.svg: how a tile of φ is made in the circular order, and its pairs in h.

Everything in it is read from pera_kernels.terms.
"""

from pathlib import Path
from typing import Any

from pera_kernels.terms import circular_order, lane_count, offsets, pairs

from .documents import GREY, ROOT, drawing

PICTURE = ROOT / "docs" / "method.svg"
# The least rank that shows whole blocks, half a block and unused lanes.
R = 6
# Of the rows of a factor, and of the offsets.
ROWS = ("#a6cee3", "#b2df8a", "#fb9a99", "#fdbf6f", "#cab2d6", "#ffff99")
OFFSETS = ("#9ecae1", "#a1d99b", "#fdae6b", "#bcbddc")
SMALL = "₀₁₂₃₄₅"
LINEAR, UNUSED, INK = "#d9d9d9", "none", "#1f2328"


def lanes() -> list[tuple[int, int, int, int]]:
    """i, j, circular offset and position in h of each lane of pairs."""
    order, ordered = circular_order(R, "full").tolist(), pairs(R)
    found = []
    for lane, position in enumerate(order):
        i, d = lane % R, offsets(R, "full")[lane // R]
        j = (i + d) % R
        assert ordered[position] == (min(i, j), max(i, j))
        found.append((i, j, d, position))
    return found


def described() -> str:
    return f"r={R}, {lane_count(R)} lanes; i, j, offset, position in h: {lanes()}"


def draw(path: Path) -> None:
    layout = {"figsize": (11, 6.6), "height_ratios": (1, 1.6)}
    with drawing(path, described(), nrows=2, **layout) as axes:
        _lanes(axes[0, 0])
        _triangle(axes[1, 0])


def _lanes(axes: Any) -> None:
    """Above each other for each lane: the row f_i, the row f_j, φ, the position in h."""
    names = ("lane", "row i", "row j", "φ", "in h")
    for line, name in enumerate(names):
        axes.text(-0.3, -line, name, ha="right", va="center", size=11)
    total, known = lane_count(R), lanes()
    for lane in range(total):
        axes.text(lane + 0.5, 0, str(lane), ha="center", va="center", size=8)
        if lane < R:
            _cell(axes, lane, -1, f"f{SMALL[lane]}", ROWS[lane])
            _cell(axes, lane, -2, "1", UNUSED, GREY)
            _cell(axes, lane, -3, f"f{SMALL[lane]}", LINEAR)
        elif lane < R + len(known):
            i, j, d, position = known[lane - R]
            _cell(axes, lane, -1, f"f{SMALL[i]}", ROWS[i])
            _cell(axes, lane, -2, f"f{SMALL[j]}", ROWS[j])
            _cell(axes, lane, -3, f"f{SMALL[i]}f{SMALL[j]}", OFFSETS[d])
            axes.text(lane + 0.5, -4, str(position), ha="center", va="center", size=8)
        else:
            for line in (-1, -2, -3):
                _cell(axes, lane, line, "0" if line == -3 else "", UNUSED, GREY)
    blocks = ["linear: φ = f", *(f"d = {d}: f ∘ roll(f, {-d})" for d in offsets(R, "full"))]
    blocks[1] = "d = 0: squares"
    blocks[-1] = "d = R/2:\nhalf a block"
    for number, text in enumerate(blocks):
        first, last = number * R, min((number + 1) * R, R + len(known))
        axes.plot([first + 0.1, last - 0.1], [0.6, 0.6], color=GREY, lw=1)
        axes.text((first + last) / 2, 0.8, text, ha="center", va="bottom", size=10)
    axes.text((R + len(known) + total) / 2, 0.8, "unused", ha="center", va="bottom", size=10)
    axes.set(xlim=(-2.4, total), ylim=(-4.5, 2), aspect="equal")
    axes.axis("off")


def _triangle(axes: Any) -> None:
    """The pairs i <= j with their positions in h, in the colours of their offsets."""
    for i, j, d, position in lanes():
        low, high = min(i, j), max(i, j)
        _cell(axes, high, -low, f"h[{position}]\nlane {R + R * d + i}", OFFSETS[d])
    for k in range(R):
        axes.text(k + 0.5, 0.7, f"j = {k}", ha="center", va="center", size=10)
        axes.text(-0.15, -k, f"i = {k}", ha="right", va="center", size=10)
    notes = [
        "Each pair once, public order of h by rows;",
        "the colour is the circular offset",
        "d = min(j − i, R − j + i):",
        "diagonals, and the corner that closes the circle.",
    ]
    axes.text(R + 0.6, -0.4, "\n".join(notes), va="top", size=11, linespacing=1.5)
    for d in offsets(R, "full"):
        _cell(axes, R + 0.6 + 1.1 * d, -3.4, f"d = {d}", OFFSETS[d])
    axes.set(xlim=(-4, R + 9), ylim=(-R + 0.4, 1.1), aspect="equal")
    axes.axis("off")


def _cell(axes: Any, x: float, y: float, text: str, face: str, ink: str = INK) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(
        Rectangle((x + 0.03, y - 0.47), 0.94, 0.94, fc=face, ec=GREY, lw=0.5, clip_on=False)
    )
    axes.text(x + 0.5, y, text, ha="center", va="center", size=8, color=ink)


if __name__ == "__main__":
    draw(PICTURE)
