"""Charts as inline SVG: lines, grouped columns and stacked rows, coloured by the page's style.

The drawing is small (440 wide) and scales with its box, so text stays readable on a telephone.
Every mark has a tooltip (``<title>``), every chart a description; all text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from distrec.report.scales import Axis, NumberFormat, Scale, fit

WIDTH, HEIGHT = 440, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 424, 32, 204
_MOST_ON_TWO_LINES = 8
NUM_COLORS = 6
# more marks than this cannot be pointed at one by one
MAX_TOOLTIPS = 120


@dataclass(frozen=True)
class Series:
    """One line: its name and its points (x, y), x ascending."""

    name: str
    points: Sequence[tuple[float, float]]


def color_class(index: int) -> str:
    """Style class of the index-th series; the last colour is the neutral one of "other"."""
    return f"c{index}" if index < NUM_COLORS else "cx"


def legend(names: Sequence[str], colors: Sequence[int] | None = None) -> Markup:
    """Names beside their colours."""
    entries = Markup("").join(
        Markup('<li><span class="swatch {}" aria-hidden="true"></span>{}</li>').format(
            color_class(colors[position] if colors else position), name
        )
        for position, name in enumerate(names)
    )
    return Markup('<ul class="legend">{}</ul>').format(entries)


def cell_bar(share: float, color: int = 0) -> Markup:
    """A thin bar under a number in a table: `share` of the cell's width."""
    width = 100 * min(max(share, 0.0), 1.0) if math.isfinite(share) else 0.0
    return Markup(
        '<svg class="cellbar" width="100%" height="4" aria-hidden="true">'
        '<rect class="track" width="100%" height="4" rx="2"/>'
        '<rect class="fill {}" width="{:.1f}%" height="4" rx="2"/></svg>'
    ).format(color_class(color), width)


def line_chart(
    description: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    best: tuple[float, float] | None = None,
) -> Markup:
    """Lines over a common x.

    Args:
        description: What a reader who does not see the chart should know.
        series: At least one point in all; points that are not finite (or, on a logarithmic axis,
            not positive) are left out.
        x: The horizontal axis.
        y: The vertical axis.
        best: A point to mark.
    """
    lines = [Series(one.name, _drawable(one.points, x.log, y.log)) for one in series]
    xs = [point[0] for one in lines for point in one.points]
    ys = [point[1] for one in lines for point in one.points]
    if not xs:
        return empty_chart(description)
    across, up = fit(x, xs, LEFT, RIGHT, 5), fit(y, ys, BOTTOM, TOP, 5)
    across = _tight(across, xs)
    parts = [_horizontal_grid(up, y), _vertical_ticks(across, x, [*across.ticks])]
    for index, one in enumerate(lines):
        path = " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in one.points)
        parts.append(_polyline(path, index))
        stride = max(1, len(one.points) // MAX_TOOLTIPS)
        for a, b in one.points[::stride]:
            name = f"{one.name}: " if len(lines) > 1 else ""
            tip = f"{name}{x.label} {x.exact(a)}, {y.label} {y.exact(b)}"
            dot = "dot" if len(one.points) == 1 else "spot"
            parts.append(_circle(across(a), up(b), dot, index, tip))
    if best is not None and all(map(math.isfinite, best)):
        tip = f"best: {y.label} {y.exact(best[1])} at {x.label} {x.exact(best[0])}"
        parts.append(_circle(across(best[0]), up(best[1]), "best", 0, tip))
    return _svg(description, HEIGHT, parts)


def column_chart(
    description: str,
    groups: Sequence[str],
    names: Sequence[str],
    values: Sequence[Sequence[float | None]],
    x_label: str,
    y: Axis,
) -> Markup:
    """Columns from zero, in groups.

    Args:
        description: What a reader who does not see the chart should know.
        groups: Labels along the horizontal axis.
        names: Columns of each group, each in its colour.
        values: [name][group]; None leaves a gap.
        x_label: Quantity and unit of the groups.
        y: The vertical axis.
    """
    known = [value for row in values for value in row if value is not None and math.isfinite(value)]
    if not known:
        return empty_chart(description)
    up = fit(Axis(y.label, zero=True), [*known, 0.0], BOTTOM, TOP, 5)
    parts = [_horizontal_grid(up, y), _x_label(x_label)]
    slot = (RIGHT - LEFT) / len(groups)
    width = min(0.76 * slot / len(names), 34.0)
    # labels that would touch are left out, or set lower where text is larger: on a telephone; a few
    # names stand on two lines
    longest = max(len(group) for group in groups)
    every = max(1, math.ceil((5 + 7.8 * longest) / slot))
    narrow = max(1, math.ceil((6 + 9.4 * longest) / slot))
    two_lines = every == 2 and len(groups) <= _MOST_ON_TWO_LINES
    for place, group in enumerate(groups):
        middle = LEFT + (place + 0.5) * slot
        if two_lines:
            parts.append(_text(middle, BOTTOM + 15 + 13 * (place % 2), group, "tick", "middle"))
        elif place % every == 0:
            kind = "tick low" if narrow > every and place % 2 else "tick"
            parts.append(_text(middle, BOTTOM + 17, group, kind, "middle"))
        for index, name in enumerate(names):
            value = values[index][place]
            if value is None or not math.isfinite(value):
                continue
            left = middle + (index - len(names) / 2) * width
            top, bottom = sorted((up(value), up(0.0)))
            who = f"{name}, " if len(names) > 1 else ""
            tip = f"{who}{x_label} {group}: {y.exact(value)}"
            parts.append(_rect(left, top, width - 1, bottom - top, color_class(index), tip))
    return _svg(description, HEIGHT, parts)


def stacked_rows(
    description: str,
    rows: Sequence[str],
    names: Sequence[str],
    values: Sequence[Sequence[float]],
    exact: NumberFormat,
    colors: Sequence[int] | None = None,
) -> Markup:
    """One horizontal bar a row, cut into named parts, with its total at the end.

    Args:
        description: What a reader who does not see the chart should know.
        rows: Labels at the left.
        names: Parts of each bar.
        values: [row][name], none below zero.
        exact: Text of a value.
        colors: Colour of each part.
    """
    label_width, height, top = 92, 26, 6
    room = WIDTH - label_width - 84
    totals = [sum(row) for row in values]
    longest = max(totals, default=0.0)
    if longest <= 0:
        return empty_chart(description)
    parts = []
    for place, row in enumerate(values):
        y = top + place * height
        left = float(label_width)
        parts.append(_text(label_width - 8, y + 14, rows[place], "label", "end"))
        for index, value in enumerate(row):
            width = room * value / longest
            if width > 0:
                color = color_class(colors[index] if colors else index)
                tip = f"{rows[place]}, {names[index]}: {exact(value)}"
                parts.append(_rect(left, y + 2, max(width - 1, 0.6), height - 10, color, tip))
            left += width
        parts.append(_text(left + 6, y + 14, exact(totals[place]), "tick", "start"))
    return _svg(description, top + height * len(rows) + 4, parts)


def interval_rows(
    description: str,
    rows: Sequence[str],
    values: Sequence[tuple[float, float, float]],
    x: Axis,
    colors: Sequence[int] | None = None,
) -> Markup:
    """A point with its interval a row, over one horizontal axis.

    Args:
        description: What a reader who does not see the chart should know.
        rows: Names, which stand above their intervals.
        values: Of each row: mean, lower end, upper end.
        x: The axis.
        colors: Of each row.
    """
    numbers = [number for row in values for number in row if math.isfinite(number)]
    if not numbers:
        return empty_chart(description)
    left, height, top = 12, 36, 4
    across = fit(x, numbers, left, RIGHT, 5)
    bottom = top + height * len(rows)
    parts = []
    for tick in across.ticks:
        kind = "base" if tick == 0 else "grid"
        parts.append(_line(kind, across(tick), across(tick), top, bottom))
        parts.append(_text(across(tick), bottom + 16, x.tick(tick), "tick", "middle"))
    for place, (mean, low, high) in enumerate(values):
        y = top + place * height
        color = colors[place] if colors else place
        parts.append(_text(left + 4, y + 13, rows[place], "label", "start"))
        if not all(map(math.isfinite, (mean, low, high))):
            continue
        tip = f"{rows[place]}: {x.exact(mean)}, {x.exact(low)} to {x.exact(high)}"
        parts.append(_line(f"line {color_class(color)}", across(low), across(high), y + 24, y + 24))
        parts.append(_circle(across(mean), y + 24, "dot", color, tip))
    parts.append(_text((left + RIGHT) / 2, bottom + 36, x.label, "axis", "middle"))
    return _svg(description, bottom + 42, parts)


def empty_chart(description: str) -> Markup:
    """Stands where there is nothing to draw."""
    return _svg(
        f"{description} There is nothing to draw.",
        60,
        [_text(WIDTH / 2, 34, "nothing to draw", "tick", "middle")],
    )


def _drawable(
    points: Iterable[tuple[float, float]], x_log: bool, y_log: bool
) -> list[tuple[float, float]]:
    return [
        (a, b)
        for a, b in points
        if math.isfinite(a) and math.isfinite(b) and (a > 0 or not x_log) and (b > 0 or not y_log)
    ]


def _tight(scale: Scale, values: Sequence[float]) -> Scale:
    """A scale that ends with the data, so that a curve fills its chart."""
    low, high = min(values), max(values)
    if high <= low:
        return scale
    inner = [tick for tick in scale.ticks if low < tick < high]
    return Scale([low, *inner, high], scale.start, scale.stop, scale.log)


def _horizontal_grid(scale: Scale, axis: Axis) -> Markup:
    lines = [_text(4, 14, axis.label, "axis", "start")]
    for tick in scale.ticks:
        y = scale(tick)
        kind = "base" if tick == scale.ticks[0] else "grid"
        lines.append(_line(kind, LEFT, RIGHT, y, y))
        lines.append(_text(LEFT - 7, y + 4, axis.tick(tick), "tick", "end"))
    return Markup("").join(lines)


def _vertical_ticks(scale: Scale, axis: Axis, ticks: Sequence[float]) -> Markup:
    marks = [_x_label(axis.label)]
    last = -math.inf
    for tick in ticks:
        x = scale(tick)
        # the ends of a tight scale are data, not round: drop what would touch its neighbour
        if x - last < 44 or (tick != ticks[-1] and scale(ticks[-1]) - x < 44):
            continue
        last = x
        anchor = "end" if x > RIGHT - 12 else "middle"
        marks.append(_line("base", x, x, BOTTOM, BOTTOM + 4))
        marks.append(_text(min(x, RIGHT + 8), BOTTOM + 19, axis.tick(tick), "tick", anchor))
    return Markup("").join(marks)


def _x_label(label: str) -> Markup:
    return _text((LEFT + RIGHT) / 2, HEIGHT - 6, label, "axis", "middle")


def _text(x: float, y: float, text: str, kind: str, anchor: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        kind, x, y, anchor, text
    )


def _rect(x: float, y: float, width: float, height: float, color: str, tip: str) -> Markup:
    return Markup(
        '<rect class="fill {}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" rx="1.5">'
        "<title>{}</title></rect>"
    ).format(color, x, y, width, max(height, 0.0), tip)


def _line(kind: str, x1: float, x2: float, y1: float, y2: float) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>').format(
        kind, x1, x2, y1, y2
    )


def _polyline(points: str, color: int) -> Markup:
    return Markup('<polyline class="line {}" points="{}"/>').format(color_class(color), points)


def _circle(x: float, y: float, kind: str, color: int, tip: str) -> Markup:
    return Markup(
        '<circle class="{} {}" cx="{:.1f}" cy="{:.1f}" r="5"><title>{}</title></circle>'
    ).format(kind, color_class(color), x, y, tip)


def _svg(description: str, height: float, parts: Iterable[str]) -> Markup:
    # every part is made above of escaped text and numbers
    body = Markup("\n".join(str(part) for part in parts))
    return Markup(
        '<svg class="chart" viewBox="0 0 {} {:.0f}" role="img" aria-label="{}">\n{}\n</svg>'
    ).format(WIDTH, height, description, body)
