from __future__ import annotations

import csv
import io
import re
from html.parser import HTMLParser

import pytest
from realistic import TARGET, finished, record, records, spec
from small_sweep import small_spec

from qsweep.records import SHARES, Metrics
from qsweep.tasks import ACCURACY
from qsweep.track import front_table, full_table, pareto_html
from qsweep.track.charts import hover as hover_text
from qsweep.track.runs import note
from qsweep.track.table import Column, mixed_bits


class Page(HTMLParser):
    """What is loaded from elsewhere, and the text outside of scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.text = ""
        self.inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = tag
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        if self.inside not in ("script", "style"):
            self.text += data


@pytest.fixture(scope="module")
def html() -> str:
    return pareto_html(finished(records()), spec())


def test_the_page_needs_nothing_from_elsewhere(html: str) -> None:
    assert Page(html).loads == []
    assert "Plotly.newPlot" in html
    assert len(html) > 3_000_000  # plotly is inside of it


def test_every_trial_is_on_the_page_and_failed_ones_say_why(html: str) -> None:
    text = Page(html).text
    assert all(r.name in text for r in records())
    assert "top-1 agreement must be at least 0.95 (got 0.31) <on w2>" in text


def test_the_quickest_is_held_against_the_quickest_float_of_its_device_and_batch_size(html: str) -> None:
    assert "ptq-w8s-a8a, 1.60 times as fast as bf16, the quickest float" in Page(html).text
    target = {"engine": "cuda", "device": "cuda", "batch_size": 4}
    moved = [r.model_copy(update={"config": r.config | {"target": target}}) if r.number == 1 else r for r in records()]
    assert "2.00 times as fast as fp32, the quickest float" in Page(pareto_html(finished(moved), spec())).text
    assert "the quickest float" not in Page(pareto_html(finished(moved)[1:], spec())).text
    floats = finished(records()[:1])
    assert "fp32, a float: nothing on the front is quicker" in Page(pareto_html(floats, spec())).text


def test_the_best_are_told_with_their_engine_where_trials_are_of_several(html: str, of_two_engines: str) -> None:
    assert "ptq-w8s-a8a, 1.60 times" in Page(html).text
    assert "ptq-w8s-a8a on onnxruntime, 1.60 times" in Page(of_two_engines).text


def test_text_from_a_sweep_is_escaped(html: str) -> None:
    assert "<on w2>" not in html
    assert "&lt;i&gt;" in hover_text(record(0, "<i>", 0.9, 1.0, 1.0), ACCURACY)


def test_a_point_tells_of_others_that_lie_on_it() -> None:
    twins = [record(i, "ptq-w4s-a8a", 0.95, 5_000.0, 0.5 + i, engine=f"engine{i}") for i in range(8, 10)]
    page = pareto_html(finished(records()[:6] + twins), spec())
    assert r"here, too: \u003cb\u003eptq-w4s-a8a\u003c\u002fb\u003e  #9  engine9" in page
    assert "more" not in re.findall(r"here, too[^\"]*", page)[0]


def test_bits_that_differ_by_layer_are_told_at_the_points_and_in_the_table(html: str) -> None:
    mixed, alike = records()[3], record(3, "p", 0.9, 1.0, 1.0, layer_bits={"conv1.weight": 4, "linear.weight": 4})
    assert "layers: 1 of 8 bits, 2 of 2 bits" in hover_text(mixed, ACCURACY)
    assert "layers" not in hover_text(alike, ACCURACY)
    assert mixed_bits(alike) == ""
    assert "8 bits: conv1.weight; 2 bits: conv2.weight, linear.weight" in html


def test_a_config_that_was_repeated_stands_with_mean_and_spread_and_what_failed(html: str) -> None:
    told = "96.60 ± 0.28 of 2, NotFinite once"
    assert told in Page(html).text
    assert told in front_table(finished(records()), spec()).markdown()
    assert f"mean of draws {told} %" in hover_text(finished(records())[2], ACCURACY)
    assert "mean of draws" not in front_table(records(), spec()).markdown() + pareto_html(records(), spec())


CHARTS = ("size_bytes-accuracy", "latency_ms-accuracy")


def drawn(html: str, chart: str) -> str:
    """The code that draws a chart of the page."""
    return html[html.index(f'Plotly.newPlot(                        "{chart}"') :].split("</script>")[0]


@pytest.fixture(scope="module")
def of_two_engines() -> str:
    moved = [r.model_copy(update={"engine": "inductor"}) if r.number == 3 else r for r in records()]
    return pareto_html(finished(moved), spec())


def test_points_are_filled_by_engine_where_trials_are_of_several(html: str, of_two_engines: str) -> None:
    for chart in CHARTS:
        code = drawn(of_two_engines, chart)
        assert '"symbol":["circle","circle-open"]' in code  # ptq: number 3, number 5
        assert '"symbol":["square-open"]' in code
        assert code.count('"legend":"legend2"') == 3
        for engine, symbol in (("inductor", "circle"), ("onnxruntime", "circle-open"), ("float", "circle-open-dot")):
            assert re.search(rf'"symbol":"{symbol}"[^{{}}]*}},"mode":"markers","name":"{engine}"', code)
        alike = drawn(html, chart)
        assert '"symbol":[' not in alike
        assert '"legend":"legend2"' not in alike


@pytest.mark.parametrize("page", ["html", "of_two_engines"])
def test_both_charts_show_every_measured_trial_once_and_ring_the_front(
    page: str, request: pytest.FixtureRequest
) -> None:
    html = request.getfixturevalue(page)
    for chart in CHARTS:
        code = drawn(html, chart)
        hovers = [rf"\\u003cb\\u003e{r.name}\\u003c\\u002fb\\u003e  #{r.number} " for r in records()]
        assert [len(re.findall(hover, code)) for hover in hovers] == [1, 1, 1, 1, 1, 1, 0, 0]
        assert '"name":"front, certain"' in code
        assert '"name":"front, probable"' in code
        assert '"name":"baseline"' in code


def test_a_page_of_nothing_measured_can_be_made() -> None:
    assert "0 trials measured" in Page(pareto_html([records()[6]], spec())).text


def test_the_table_holds_the_front_and_the_baselines_best_first() -> None:
    table = front_table(finished(records()), spec())
    keys = [column.key for column in table.columns]
    rows = [dict(zip(keys, row, strict=True)) for row in table.rows]
    assert [row["number"] for row in rows] == [4, 0, 1, 2, 3]
    assert [row["front"] for row in rows] == ["certain", "baseline", "baseline", "probable", "certain"]


def test_batch_sizes_have_a_column_where_they_differ(html: str) -> None:
    alike = front_table(finished(records()), spec())
    assert "batch_size" not in [column.key for column in alike.columns]
    assert "batch" not in Page(html).text
    target = {"engine": "onnxruntime", "batch_size": 32}
    found = [r.model_copy(update={"config": r.config | {"target": target}}) if r.number == 4 else r for r in records()]
    asked = small_spec(target=TARGET | {"batch_size": {"choice": [4, 32]}})
    table = front_table(finished(found), asked)
    keys = [column.key for column in table.columns]
    rows = [dict(zip(keys, row, strict=True)) for row in table.texts()]
    assert [(row["number"], row["batch_size"]) for row in rows][:2] == [("4", "32"), ("0", "4")]
    assert "batch" in Page(pareto_html(finished(found), asked)).text


def test_while_searching_the_front_is_that_of_what_is_there() -> None:
    table = front_table(records(), spec())
    assert [row[3] for row in table.rows] == ["so far", "baseline", "baseline", "so far", "so far"]


def test_an_objective_of_the_spec_has_its_column() -> None:
    asked = spec().model_copy(update={"objectives": ("accuracy", "macs")})
    found = [r.model_copy(update={"metrics": r.metrics.model_copy(update={"macs": 5e6})}) for r in records()]
    assert "macs" in [column.key for column in front_table(found, asked).columns]
    html = pareto_html(found, asked)
    assert '<th class="num">macs</th>' in html
    assert html.index(">macs</th>") < html.index(">size KiB</th>")
    assert "front: best macs" in Page(html).text


def test_the_best_of_an_objective_is_told_by_the_title_of_its_column() -> None:
    asked = spec().model_copy(update={"objectives": ("accuracy", "peak_memory_bytes", "bit_operations")})
    more = {"peak_memory_bytes": 2048.0, "bit_operations": 5e6}
    found = [r.model_copy(update={"metrics": r.metrics.model_copy(update=more)}) for r in records()]
    text = Page(pareto_html(found, asked)).text
    assert "front: best memory2.0 KiB" in text
    assert "front: best bit operations5,000,000" in text


def test_the_csv_loses_nothing() -> None:
    rows = list(csv.DictReader(io.StringIO(full_table(finished(records()), spec()).csv())))
    assert len(rows) == 8
    by_number = {int(row["number"]): row for row in rows}
    for r in finished(records()):
        values = {name: by_number[r.number][name] for name in Metrics.model_fields}
        assert {name: float(value) for name, value in values.items() if value} == r.metrics.model_dump(
            exclude_none=True
        )
    assert by_number[6]["failure"].startswith("ParityFailure: ")


def test_units_are_in_the_titles_and_values_are_rounded() -> None:
    table = front_table(finished(records()), spec())
    titles = [column.title for column in table.columns]
    assert table.texts()[0][titles.index("accuracy %")] == "97.10"
    assert table.texts()[0][titles.index("size KiB")] == "8.8"
    assert table.texts()[0][titles.index("latency ms")] == "0.580"
    for column in full_table(records(), spec()).columns:
        assert column.title.endswith("KiB") == column.key.endswith("_bytes")
        assert column.title.endswith("%") == (column.key in SHARES)


def test_another_metric_gives_its_name_and_unit_to_all_that_is_shown() -> None:
    metric = {"name": "negative RMSE", "unit": "m"}
    asked = small_spec(
        target=TARGET,
        task={"method": "python", "file": "task.py:Task", "metric": metric},
        constraints={"accuracy_drop_pp": {"max": 0.3}, "size_bytes": {"max": 1e6}},
    )
    found = [
        r.model_copy(update={"metrics": r.metrics.model_copy(update={"accuracy": r.metrics.accuracy - 50.0})})
        for r in records() if r.metrics.accuracy is not None
    ]  # fmt: skip
    table = front_table(finished(found), asked)
    titles = [column.title for column in table.columns]
    assert {"negative RMSE m", "test m", "drop m", "mean of draws m"} <= set(titles)
    assert not {"accuracy %", "test %", "drop pp", "mean of draws %"} & set(titles)
    assert table.texts()[0][titles.index("negative RMSE m")] == "-49.029"
    page = pareto_html(finished(found), asked)
    text = Page(page).text
    assert re.search(r"fp32 baseline\s*-49.030 m\s*39.1 KiB, 1.000 ms", text)
    assert "front: best negative RMSE" in text
    assert "with accuracy_drop_pp ≤ 0.3 m and size_bytes ≤ 1e+06" in text
    assert "negative RMSE \\u00d7 size" in page
    assert "accuracy %" not in text


def test_a_drop_that_rounds_to_nothing_has_no_sign() -> None:
    assert Column("accuracy_drop_pp").text(-0.001) == "0.00"
    assert Column("accuracy_drop_pp").text(-0.01) == "-0.01"


def test_a_note_longer_than_mlflow_takes_is_cut_between_rows() -> None:
    many = [record(i, f"trial-{i}", 0.5 + i / 1000, 1e4 + 20 * i, 1.0) for i in range(200)]
    text = note(many, spec())
    assert len(text) < 8000
    assert re.search(r"… and \d+ more in `front.csv`", text)
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
