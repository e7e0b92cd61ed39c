"""Draw the scaling curve of `bench_planning` as SVG: ``python -m bench.plot_scaling`` and its dated JSON."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

WIDTH, HEIGHT, MARGIN = 640, 420, 60
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#8c564b", "#7f7f7f")


def curves_of(found: dict[str, object]) -> dict[str, list[tuple[int, float]]]:
    """Ranks and seconds, by kind of job."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for table in found["tables"]:  # type: ignore[attr-defined]
        for name, turns in table["seconds"].items() if table["title"] == "scaling" else ():
            match = re.fullmatch(r"([\d,]+) ranks x ([\d,]+) tensors, (\w+)", name)
            if match is None:
                raise ValueError(f"{name!r} is no job")
            curves.setdefault(f"{match[3]}, {match[2]} tensors", []).append((int(match[1].replace(",", "")), turns[0]))
    return {name: sorted(points) for name, points in curves.items()}


def drawn(curves: dict[str, list[tuple[int, float]]]) -> str:
    """Both axes logarithmic; a dashed line is linear growth from the first curve's first point."""
    ranks = [rank for points in curves.values() for rank, _ in points]
    seconds = [second for points in curves.values() for _, second in points]
    low_x, high_x = math.log2(min(ranks)), math.log2(max(ranks))
    low_y, high_y = math.floor(math.log10(min(seconds))), math.ceil(math.log10(max(seconds)))

    def place(rank: float, second: float) -> str:
        x = MARGIN + (math.log2(rank) - low_x) / (high_x - low_x) * (WIDTH - 3 * MARGIN)
        y = HEIGHT - MARGIN - (math.log10(second) - low_y) / (high_y - low_y) * (HEIGHT - 2 * MARGIN)
        return f"{x:.1f},{y:.1f}"

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">']
    parts.append(f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>')
    for power in range(low_y, high_y + 1):
        x, y = place(min(ranks), 10.0**power).split(",")
        end = place(max(ranks), 10.0**power).split(",")[0]
        parts.append(
            f'<path d="M{x},{y} H{end}" stroke="#ddd"/><text x="8" y="{y}" font-size="12">{10.0**power:g} s</text>'
        )
    for rank in sorted(set(ranks)):
        x = place(rank, min(seconds)).split(",")[0]
        parts.append(f'<text x="{x}" y="{HEIGHT - 30}" font-size="12" text-anchor="middle">{rank:,}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 10}" font-size="12" text-anchor="middle">ranks</text>')
    first = next(iter(curves.values()))
    linear = [(rank, first[0][1] * rank / first[0][0]) for rank, _ in first]
    parts.append(
        f'<polyline points="{" ".join(place(*point) for point in linear)}" fill="none" stroke="#999" '
        'stroke-dasharray="4"/>'
    )
    for colour, (name, points) in zip(COLOURS, curves.items(), strict=False):
        line = " ".join(place(*point) for point in points)
        x, y = place(*points[-1]).split(",")
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{float(x) + 6:.1f}" y="{y}" font-size="11" fill="{colour}">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    source = Path(sys.argv[1])
    source.with_suffix(".svg").write_text(drawn(curves_of(json.loads(source.read_text()))))
