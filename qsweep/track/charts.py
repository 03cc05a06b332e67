"""The scatters of the report, with plotly."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import cycle
from typing import Any

from qsweep.records import Record
from qsweep.tasks import TaskMetric
from qsweep.track.flat import leaves
from qsweep.track.labels import placed
from qsweep.track.table import Column, draws_text, place_text

COLOURS = {"none": "#8a94a0", "cast": "#8250df", "ptq": "#1f6feb", "qat": "#d9580d"}
_MORE = ("#1a7f37", "#bf3989", "#0a7ea4", "#9a6700", "#6e40c9", "#57606a")
_SYMBOLS = {(False, False): "circle", (True, False): "square", (False, True): "diamond", (True, True): "cross"}
_EXTRAS = {
    (False, False): "",
    (True, False): " + prune",
    (False, True): " + distill",
    (True, True): " + prune + distill",
}
_FILLS = {"": 1.0, "-open": 1.8, "-open-dot": 1.8, "-dot": 1.0}
"""What plotly appends to the name of a shape, and how wide its lines are."""
_ENGINES = {
    "orientation": "h", "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom", "font": {"size": 11},
    "bgcolor": "rgba(0,0,0,0)", "itemclick": False, "itemdoubleclick": False,
}  # fmt: skip
"""The legend of engines, above the chart."""
_MOST = 4
"""Points that are told beside one that they lie on."""
_BELOW, _ABOVE = 0.05, 0.08
"""How far an axis goes on beyond what is in view, in shares of it."""
_INK, _GRID = "#1c2530", "#e7eaee"


def scatter(records: Sequence[Record], members: set[int], x: Column, y: Column, low: float | None) -> str:
    """One chart as an HTML fragment: metric `x` against `y`; `low` is the lower end of the view, a value of `y`."""
    import plotly.graph_objects as go

    shown = [r for r in records if getattr(r.metrics, x.key) is not None and getattr(r.metrics, y.key) is not None]
    figure = go.Figure(layout=_layout(x, y))
    fills = _fills(shown)
    xs, ys = _values(shown, x), _values(shown, y)
    stretched = bool(xs) and min(xs) > 0 and max(xs) > 3 * min(xs)  # else fp32 alone stretches the axis
    bottom = None if low is None else y.scale * low
    across = _shares([math.log(value) for value in xs] if stretched else xs)
    places = dict(zip([r.number for r in shown], zip(across, _shares(ys, bottom), strict=True), strict=True))
    traces = [*_trials(shown, x, y, fills), *_rings(shown, members, x, y), *_baselines(shown, x, y, fills, places)]
    figure.add_traces([go.Scatter(**trace) for trace in [*traces, *_engines(fills)]])
    if stretched:
        mantissas = (1, 2, 5) if max(xs) > 15 * min(xs) else (1, 1.5, 2, 3, 5, 7)
        ticks = [mantissa * 10**power for power in range(-6, 12) for mantissa in mantissas]
        figure.update_xaxes(type="log", tickvals=ticks, ticktext=[f"{tick:,g}" for tick in ticks])
    if bottom is not None and shown:
        top = max(ys)
        figure.update_yaxes(range=[bottom - _BELOW * (top - bottom), top + _ABOVE * (top - bottom)])
    config = {"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": ["select2d", "lasso2d"]}
    return str(figure.to_html(full_html=False, include_plotlyjs=False, div_id=f"{x.key}-{y.key}", config=config))


def _fills(records: Sequence[Record]) -> dict[str, str]:
    """How points are filled by engine, those of the trials first; empty where trials are of one engine. From the fifth
    engine on fills come again."""
    engines = {kind: {record.engine for record in records if record.kind == kind} for kind in ("trial", "baseline")}
    if len(engines["trial"]) < 2:
        return {}
    return dict(zip([*sorted(engines["trial"]), *sorted(engines["baseline"] - engines["trial"])], cycle(_FILLS)))


def _by_engine(trace: dict[str, Any], group: Sequence[Record], fills: dict[str, str]) -> list[dict[str, Any]]:
    """The trace of `group` as it is, or with each point filled by its engine; it stands in the legend by its shape
    alone then."""
    if not fills:
        return [trace]
    marker, told = trace["marker"], {"name": trace["name"], "legendgroup": trace["name"]}
    kinds = [fills[record.engine] for record in group]
    line = {"width": [_FILLS[kind] for kind in kinds], "color": "white"}
    filled = {"symbol": [marker["symbol"] + kind for kind in kinds], "line": line}
    return [
        trace | told | {"marker": marker | filled, "showlegend": False},
        told | {"x": [None], "y": [None], "mode": "markers", "marker": marker},
    ]


def _engines(fills: dict[str, str]) -> list[dict[str, Any]]:
    """Entries of the legend of engines, without points."""
    return [
        {
            "x": [None], "y": [None], "name": engine, "mode": "markers", "legend": "legend2",
            "marker": {"size": 9, "symbol": f"circle{fill}", "color": _INK,
                       "line": {"width": _FILLS[fill], "color": "white"}},
        }
        for engine, fill in fills.items()
    ]  # fmt: skip


def _trials(records: Sequence[Record], x: Column, y: Column, fills: dict[str, str]) -> list[dict[str, Any]]:
    """A trace for every combination of methods: colour says how it is quantized, shape what else was done."""
    groups: dict[tuple[str, tuple[bool, bool]], list[Record]] = {}
    for record in records:
        if record.kind == "trial":
            groups.setdefault(_methods(record), []).append(record)
    colours = dict(COLOURS)
    for method, _ in sorted(groups):
        colours.setdefault(method, _MORE[(len(colours) - len(COLOURS)) % len(_MORE)])
    traces = []
    for (method, extras), group in sorted(groups.items()):
        trace = _points(group, x, y) | {
            "mode": "markers",
            "name": ("float" if method == "none" else method) + _EXTRAS[extras],
            "marker": {"size": 9, "color": colours[method], "symbol": _SYMBOLS[extras], "opacity": 0.85,
                       "line": {"width": 1, "color": "white"}},
        }  # fmt: skip
        traces += _by_engine(trace, group, fills)
    return traces


def _rings(records: Sequence[Record], members: set[int], x: Column, y: Column) -> list[dict[str, Any]]:
    sure = [r for r in records if r.number in members and r.front != "probable"]
    maybe = [r for r in records if r.number in members and r.front == "probable"]
    rings = [
        ("front, certain" if any(r.front for r in sure) else "front so far", sure, 2.4),
        ("front, probable", maybe, 1.0),
    ]
    return [
        {
            "x": _values(group, x), "y": _values(group, y), "name": name, "mode": "markers", "hoverinfo": "skip",
            "marker": {"size": 17, "symbol": "circle-open", "color": _INK, "line": {"width": width}},
        }
        for name, group, width in rings if group
    ]  # fmt: skip


def _shares(values: Sequence[float], low: float | None = None) -> list[float]:
    """How far along an axis that shows them `values` are, from `low` or the least of them on."""
    low = min(values, default=0.0) if low is None else low
    span = max(values, default=0.0) - low or 1.0
    return [((value - low) / span + _BELOW) / (1 + _BELOW + _ABOVE) for value in values]


def _baselines(
    records: Sequence[Record], x: Column, y: Column, fills: dict[str, str], places: dict[int, tuple[float, float]]
) -> list[dict[str, Any]]:
    """`places`: of all points of the chart, by number, in shares of its width and height."""
    group = sorted((r for r in records if r.kind == "baseline"), key=lambda record: getattr(record.metrics, x.key))
    first = {record.name: record.number for record in sorted(group, key=lambda record: -record.number)}
    named = [record for record in group if first[record.name] == record.number]
    beside = placed([r.name for r in named], [places[r.number] for r in named], list(places.values()))
    texts = dict(zip([r.number for r in named], beside, strict=True))
    trace = _points(group, x, y) | {
        "mode": "markers+text",
        "name": "baseline",
        "text": [f"<b>{record.name}</b>" if record.number in texts else "" for record in group],
        "textposition": [texts.get(record.number, "top center") for record in group],
        "textfont": {"size": 11, "color": _INK},
        "marker": {"size": 13, "symbol": "star", "color": _INK},
    }
    return _by_engine(trace, group, fills)


def _points(group: Sequence[Record], x: Column, y: Column) -> dict[str, Any]:
    points: dict[str, Any] = {"x": _values(group, x), "y": _values(group, y)}
    places, here = list(zip(points["x"], points["y"], strict=True)), defaultdict(list)
    for record, place in zip(group, places, strict=True):
        here[place].append(record)
    texts = [hover(r, y.judged_by) + _below(r, here[place]) for r, place in zip(group, places, strict=True)]
    points |= {"customdata": texts, "hovertemplate": "%{customdata}<extra></extra>"}
    low, high = ([getattr(r.metrics, f"latency_{end}_ms") for r in group] for end in ("low", "high"))
    if x.key == "latency_ms" and group and all(v is not None for v in (*low, *high)):
        points["error_x"] = {
            "type": "data", "symmetric": False, "thickness": 1, "width": 0, "color": "rgba(92,107,122,.45)",
            "array": [top - value for top, value in zip(high, points["x"], strict=True)],
            "arrayminus": [value - bottom for bottom, value in zip(low, points["x"], strict=True)],
        }  # fmt: skip
    return points


def _below(record: Record, here: Sequence[Record]) -> str:
    """The others whose points lie on that of `record`, such as the same config on another engine by size."""
    others = [_heading(other) for other in here if other is not record]
    more = f"<br>… and {len(others) - _MOST} more" if len(others) > _MOST else ""
    return "".join(f"<br>here, too: {other}" for other in others[:_MOST]) + more


def _heading(record: Record) -> str:
    from html import escape

    return f"<b>{escape(record.name)}</b>  #{record.number}  {escape(place_text(record))}"


def hover(record: Record, judged_by: TaskMetric) -> str:
    """Name, number and config of a record, for its point."""
    from html import escape

    lines = [_heading(record)]
    for stage, config in (record.config.get("compress") or {}).items():
        if config:
            lines.append(f"{stage}: " + escape(", ".join(f"{key}={value}" for key, value in leaves(config))))
    counts = sorted(Counter(record.layer_bits.values()).items(), reverse=True)
    if len(counts) > 1:
        lines.append("layers: " + ", ".join(f"{count} of {bits} bits" for bits, count in counts))
    metrics, accuracy = record.metrics, Column("accuracy", judged_by)
    lines += [f"{judged_by.name} {accuracy.full(metrics.accuracy)}"] if metrics.accuracy is not None else []
    lines += [f"mean of draws {draws} {accuracy.unit}"] if (draws := draws_text(record, judged_by)) else []
    lines += [Column("size_bytes").full(metrics.size_bytes)] if metrics.size_bytes is not None else []
    lines += [f"{metrics.latency_ms:.3g} ms"] if metrics.latency_ms is not None else []
    return "<br>".join(lines)


def _methods(record: Record) -> tuple[str, tuple[bool, bool]]:
    compress = record.config.get("compress") or {}
    extras = (bool(compress.get("prune")), bool(compress.get("distill")))
    return (compress.get("quantize") or {}).get("method", "none"), extras


def _values(group: Sequence[Record], column: Column) -> list[float]:
    return [column.scale * getattr(record.metrics, column.key) for record in group]


def _layout(x: Column, y: Column) -> dict[str, Any]:
    axis = {"gridcolor": _GRID, "linecolor": "#c5ccd4", "zeroline": False, "ticks": "outside", "tickcolor": "#c5ccd4"}
    return {
        "title": {"text": f"{y.words} × {x.words}", "font": {"size": 15}, "x": 0.02},
        "height": 470,
        "margin": {"l": 60, "r": 20, "t": 48, "b": 50},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "font": {"family": "system-ui, Segoe UI, Helvetica, Arial, sans-serif", "color": _INK, "size": 12},
        "legend": {"orientation": "h", "y": -0.2, "font": {"size": 11}},
        "legend2": _ENGINES,
        "xaxis": axis | {"title": {"text": x.title}},
        "yaxis": axis | {"title": {"text": y.title}},
        "hoverlabel": {"align": "left", "bgcolor": "white", "font": {"size": 12}},
    }
