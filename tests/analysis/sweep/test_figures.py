"""A sweep's figures draw what its table says, show holes as holes, and leave in every format with the table behind."""

import json

import polars as pl
import pytest

from analysis.drawing import svg
from analysis.sweep_figures import WITHOUT, curves, heat_maps, pareto_fronts, sweep_figures, write_figures

GROUPS = ("SS", "LL")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def swept(table_of):
    """TP 2 and 4 at two clocks and unlocked, two repeats; two sizes. What `holes` names is `standing`, not sound."""

    def swept(holes=None, **change):
        cells, groups = [], []
        for repeat in (0, 1):
            for tp in (2, 4):
                for clock in (800.0, 1980.0, None):
                    standing = (holes or {}).get((tp, clock), "sound")
                    where = {"tp": tp, "freq_mhz": clock, "repeat": repeat, "standing": standing}
                    energy_j = 50.0 * tp + (clock or 2000.0) / 20 + repeat
                    figures = {"energy_per_request_j": energy_j, "ttft_p99_ms": 1e5 / (tp * (clock or 2000.0))}
                    cells.append({**where, **figures, "duration_s": 10.0, **change})
                    for k, group in enumerate(GROUPS if standing != "missing" else ()):
                        groups.append({**where, "group": group, "energy_per_request_j": energy_j * (1 + 9 * k)})
        return table_of(cells, groups)

    return swept


def test_a_map_has_every_size_at_every_setting_and_the_least_of_a_row_is_one(swept):
    (figure,) = heat_maps(swept())
    assert figure.frame.height == len(GROUPS) * 2 * 3
    least = figure.frame.group_by("group").agg(pl.col("over_least").min())
    assert least["over_least"].to_list() == [1.0, 1.0], "of each size, whatever another size costs"
    row = figure.frame.filter(pl.col("group") == "SS", pl.col("tp") == 4, pl.col("freq_mhz") == 800.0)
    assert row["value"].item() == pytest.approx(240.5), "the mean over repeats"
    assert row["text"].item() == "240"


@pytest.mark.parametrize(("standing", "text"), [("saturated", "sat."), ("missing", "fail")])
def test_a_hole_in_a_map_says_why_and_is_never_zero(swept, standing, text):
    (figure,) = heat_maps(swept({(4, 800.0): standing}))
    holes = figure.frame.filter(pl.col("tp") == 4, pl.col("freq_mhz") == 800.0)
    assert holes["value"].to_list() == [None, None]
    assert holes["text"].to_list() == [text, text]
    assert holes["why"].to_list() == [WITHOUT[text]] * 2
    assert f"{text}: {WITHOUT[text]}" in figure.says
    assert figure.frame.filter(pl.col("value").is_not_null())["why"].null_count() == figure.frame.height - 2


def test_a_size_without_requests_and_a_setting_that_was_not_asked_for_are_told_apart(swept):
    table = swept()
    groups = table.settings["group"] == "LL"
    unserved = table.settings.with_columns(
        energy_per_request_j=pl.when(groups & (pl.col("tp") == 2)).then(None).otherwise("energy_per_request_j"),
        served=pl.when(groups & (pl.col("tp") == 2)).then(0.0).otherwise("served"),
    ).filter(~((pl.col("tp") == 4) & (pl.col("freq_mhz") == 800.0)))
    (figure,) = heat_maps(_with(table, settings=unserved))
    said = {(row["tp"], row["freq_mhz"], row["group"]): row["text"] for row in figure.frame.iter_rows(named=True)}
    assert said[2, 800.0, "LL"] == "none"
    assert said[4, 800.0, "LL"] == said[4, 800.0, "SS"] == "n/a"


def _with(table, **change):
    from dataclasses import replace

    return replace(table, **change)


def test_invalid_settings_stand_in_brackets(swept):
    (figure,) = heat_maps(swept({(2, 800.0): "invalid"}))
    texts = figure.frame.filter(pl.col("tp") == 2, pl.col("freq_mhz") == 800.0)["text"].to_list()
    assert all(text.startswith("(") for text in texts)
    assert "In brackets" in figure.says


def test_clocks_stand_in_order_with_the_drivers_own_last(swept):
    figure = next(f for f in curves(swept(), ["energy"]) if f.name == "energy-by-tp")
    assert figure.chart.to_dict()["concat"][0]["layer"][0]["encoding"]["x"]["sort"] == ["800", "1980", "unlocked"]


def test_sizes_stand_in_order_even_where_the_first_panel_lacks_one(table_of):
    cells = [{"rate_rps": rate, "freq_mhz": clock} for rate in (1.0, 2.0) for clock in (800.0, 1200.0)]
    groups = [{**cell, "group": group} for cell in cells for group in ("SS", "SL", "LL")]
    table = table_of(cells, [g for g in groups if (g["rate_rps"], g["group"]) != (1.0, "SL")])
    figure = next(f for f in curves(table, ["energy"]) if f.name == "energy-by-bucket")
    colour = figure.chart.to_dict()["concat"][0]["layer"][0]["encoding"]["color"]
    assert colour["scale"]["domain"] == ["SS", "SL", "LL"]
    for heat in heat_maps(table):
        assert heat.frame["group"].unique(maintain_order=True).to_list() == ["SS", "SL", "LL"]


def test_a_setting_without_any_figure_keeps_its_panel(swept):
    saturated = {(2, clock): "saturated" for clock in (800.0, 1980.0, None)}
    figure = next(f for f in curves(swept(saturated), ["energy"]) if f.name == "energy-by-bucket")
    first, second = figure.chart.to_dict()["concat"]
    assert (first["title"], second["title"]) == ("TP2", "TP4")
    assert first["mark"]["type"] == "text"
    assert set(figure.frame.drop_nulls("value")["tp"]) == {4}


def test_power_and_throughput_of_a_size_are_over_the_windows_seconds(swept):
    table = swept()
    drawn = {figure.name: figure for figure in curves(table, ["power", "throughput"])}
    power, rate = (drawn[f"{name}-by-bucket"] for name in ("power", "throughput"))
    assert set(rate.frame["value"].to_list()) == {10.0}, "a hundred requests in ten seconds"
    energy = table.settings.filter(pl.col("group") != "all")["energy_per_request_j"] * 10.0
    assert sorted(power.frame["value"].to_list()) == pytest.approx(sorted(energy.to_list()))


def test_batch_sizes_have_curves_where_they_were_swept(table_of):
    cells = [{"batch_cap": cap, "energy_per_request_j": 10.0 * cap} for cap in (8, 32)]
    assert "energy-by-batch" in {figure.name for figure in curves(table_of(cells), ["energy"])}
    assert "energy-by-batch" not in {figure.name for figure in curves(table_of(cells[:1]), ["energy"])}


def test_a_front_is_marked_and_settings_off_it_are_there(swept):
    (figure,) = pareto_fronts(swept())
    ttft = figure.frame.filter(pl.col("latency") == "TTFT p99, ms")
    assert ttft.height == 6
    for row in ttft.iter_rows(named=True):
        better = ttft.filter(pl.col("energy_j") <= row["energy_j"], pl.col("latency_ms") < row["latency_ms"])
        assert row["on_front"] == better.is_empty()


def test_each_rate_has_a_map_and_a_front(table_of):
    cells = [{"rate_rps": rate} for rate in (0.5, 2.0)]
    table = table_of(cells, [{**cell, "group": "SS"} for cell in cells])
    names = {figure.name for figure in sweep_figures(table)}
    assert {"energy-map-0.5rps", "energy-map-2rps", "pareto-0.5rps", "pareto-2rps"} <= names


def test_every_figure_leaves_in_every_format_and_says_simulated(swept, tmp_path):
    table = swept(tbt_mean_ms=None, e2e_mean_ms=None, power_w=None)
    one = _with(table, groups=table.groups.clear(), settings=table.settings.filter(pl.col("group") == "all"))
    written = write_figures(one, tmp_path / "out", ["png", "svg", "vega", "csv"])
    assert len(written) == len(set(written)) == 4 * len(sweep_figures(one))
    for path in written:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(PNG)
            continue
        text = path.read_text(encoding="utf-8")
        assert "simulated" in text.lower(), path
        if path.suffix == ".json":
            assert "vega/v" in json.loads(text)["$schema"]
        if path.suffix == ".csv":
            assert pl.read_csv(path).height > 0


def test_names_from_a_run_are_escaped_in_drawings(table_of):
    evil = '<script>alert("x")</script>'
    table = table_of([{"tp": 2}, {"tp": 4}], [{"tp": 2, "group": evil}, {"tp": 4, "group": evil}], by="label")
    for figure in sweep_figures(table):
        assert "<script" not in svg(figure.chart)


def test_a_format_that_is_none_is_refused_before_anything_is_read(cli, tmp_path):
    code, _, err = cli("figures", str(tmp_path), "-o", str(tmp_path / "f"), "--format", "svg,gif")
    assert code == 2
    assert "--format 'gif': use png, svg, vega, csv" in err
    assert not (tmp_path / "f").exists()


def test_figures_of_a_simulated_sweep(sweep_dir, cli, tmp_path):
    code, out, _ = cli("figures", str(sweep_dir), "-o", str(tmp_path / "f"), "--format", "csv", "--by", "label")
    assert code == 0
    names = {path.name for path in (tmp_path / "f").iterdir()}
    assert {"energy-map.csv", "energy-map-1rps.csv"} & names
    assert "energy-by-label.csv" in names
    assert f"wrote {len(names)} files" in out
