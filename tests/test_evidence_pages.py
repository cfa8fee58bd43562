"""What the pages say of the long runs: answers, tables and plots."""

import math
import random
from dataclasses import replace

import pytest
from small_evidence import SMALL, log_of

from bench import pages
from bench.evidence import answers, plan, plots, views
from bench.evidence.plan import Contrast
from bench.evidence.results import Results
from bench.evidence.table import Work

pytestmark = pytest.mark.usefixtures("torchs_defaults")


def test_intervals_are_students():
    """By the 97.5% points of the t distribution, as printed in any table."""
    assert answers.interval([1.0, 3.0]) == pytest.approx(12.706 * math.sqrt(2) / math.sqrt(2), rel=1e-4)
    assert answers.interval([1.0, 2.0, 3.0]) == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert answers.interval([5.0]) == math.inf


@pytest.mark.parametrize(
    ("ours", "others", "verdict", "written"),
    [
        ((0.60, 0.61, 0.62), (0.50, 0.511, 0.519), "better", "+0.1000 ± 0.0025"),
        ((0.50, 0.511, 0.519), (0.60, 0.61, 0.62), "worse", "-0.1000 ± 0.0025"),
        ((0.60, 0.50, 0.55), (0.50, 0.60, 0.55), "undecided", "+0.0000 ± 0.2484"),
        ((0.60,), (0.50, 0.51), "one seed", "+0.1000"),
        ((), (0.50, 0.51), "not yet run", "-"),
        ((None, 0.5), (0.50, 0.51), "bn diverged", "-0.0100"),
    ],
)
def test_answers_are_by_pairs_of_a_seed(ours, others, verdict, written, tmp_path, monkeypatch):
    table = replace(SMALL, choice=None, seeds=3)
    monkeypatch.setitem(plan.TABLES, "small", table)
    monkeypatch.setitem(plan.QUESTIONS, "a question", (Contrast("small", "bn", "none"),))
    results = Results(table, tmp_path)
    for norm, figures in (("bn", ours), ("none", others)):
        for seed, figure in enumerate(figures):
            results.add(Work(table, norm, seed), log_of(figure, figure is None))
    results.write()
    found = answers.answer(Contrast("small", "bn", "none"), tmp_path)
    assert found.verdict == verdict
    shown = views.answers(["a", "question"], tmp_path)
    cells = {column.header: next(iter(column.cells)) for column in shown.columns}
    assert cells["difference"] == written
    assert cells["verdict"] == verdict
    pairs = min(len([f for f in ours if f is not None]), len(others))
    assert cells["seeds"] == ("3" if pairs == 3 else f"{pairs} of 3")


def test_lower_perplexities_are_better():
    found = answers.Answer(Contrast("text-relu", "dn*", "bn*"), (-3.0, -3.1), 2, (), False)
    assert found.verdict == "better"


def test_tables_say_what_has_not_run(tmp_path, monkeypatch):
    table = replace(SMALL, paper={"bn": 0.75})
    monkeypatch.setitem(plan.TABLES, "small", table)
    page = "<!-- table norms small -->\n<!-- end -->\n<!-- table progress small -->\n<!-- end -->\n"
    page += "From <!-- figure small none --><!-- end --> to <!-- figure small bn -->old<!-- end -->.\n"
    empty = pages.filled(page, tmp_path)
    assert empty.count("Not yet run") == 1
    assert "0 of 8" in empty
    results = Results(table, tmp_path / pages.EVIDENCE)
    for work in results.choosing():
        results.add(work, log_of(work.rate))
    results.add(Work(table, "bn", 0), log_of(0.25))
    results.add(Work(table, "bn", 1), log_of(0.75))
    results.add(Work(table, "none", 0), log_of(None, True))
    results.write()
    filled = pages.filled(page, tmp_path)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in filled.splitlines() if line.startswith("|")]
    assert ["bn", "0.5000 ± 0.3536", "0.1 (highest)", "2", "0.7500"] in rows
    assert ["none", "- (1 diverged)", "0.1 (highest)", "1 of 2", "-"] in rows
    assert "7 of 8" in filled
    assert "bn -->0.5000 ± 0.3536<!-- end -->.\n" in filled
    assert pages.filled(filled, tmp_path) == filled


def test_a_probe_that_orders_the_norms_has_rank_correlation_one():
    generator = random.Random(0)
    logs = []
    for rank, norm in enumerate(("bn", "ln", "in", "gn")):
        for seed in range(2):
            noise = generator.random() / 10
            probes = {"rank": [9.0, rank + noise], "gradient": [10.0 ** -(rank + noise), 1.0]}
            settings = {"norm": norm, "seed": seed}
            logs.append({"settings": settings, "diverged": False, "probes": probes, "figures": {"accuracy": rank / 10}})
    assert answers.rank_correlation(logs, "rank")[0] == pytest.approx(1)
    assert answers.rank_correlation(logs, "gradient")[0] == pytest.approx(-1)


def test_scales_are_those_of_the_last_evaluation(tmp_path, monkeypatch):
    monkeypatch.setitem(plan.TABLES, "small", replace(SMALL, choice=None))
    results = Results(plan.TABLES["small"], tmp_path)
    for seed, growth in enumerate((2.0, 3.0)):
        log = log_of(0.5)
        log["records"] = [{"step": 1, "accuracy": 0.1, "growth": 9.0}, {"step": 2, "accuracy": 0.5, "growth": growth}]
        results.add(Work(results.table, "bn", seed), log)
    results.write()
    shown = views.scales(["small"], tmp_path)
    assert [list(column.cells) for column in shown.columns] == [["none", "bn"], ["-", "2.500 ± 0.707"], ["-", "-"]]


def test_pictures_are_drawn_from_the_results(tmp_path, monkeypatch):
    monkeypatch.setitem(plan.TABLES, "small", replace(SMALL, choice=None))
    results = Results(plan.TABLES["small"], tmp_path)
    results.add(Work(results.table, "bn", 0), log_of(0.25))
    results.write()
    for view in ("points", "curves", "shares"):
        plots.VIEWS[view](tmp_path / f"{view}.png", ["small", "small"], tmp_path)
        assert (tmp_path / f"{view}.png").stat().st_size > 5_000
    page = tmp_path / "page.md"
    page.write_text("<!-- plot points small in pictures/points.png: points -->\n<!-- end -->\n![other](other.png)\n")
    monkeypatch.setattr(pages, "RESULTS", tmp_path / "none")
    assert pages.pictures(page) == {}
    assert "![points]" not in pages.filled(page.read_text(), pages.RESULTS)
    results.folder = tmp_path / "some" / pages.EVIDENCE
    results.write()
    monkeypatch.setattr(pages, "RESULTS", tmp_path / "some")
    assert list(pages.pictures(page)) == [tmp_path / "pictures" / "points.png"]
    filled = pages.filled(page.read_text(), pages.RESULTS)
    assert "![points](pictures/points.png)" in filled
    assert pages.filled(filled, pages.RESULTS) == filled


def test_curves_have_one_scale_and_end_where_a_run_has(tmp_path, monkeypatch):
    """Of the seeds of a norm: a run may end before another, or diverge before it is evaluated."""
    table = replace(SMALL, choice=None, seeds=3)
    other = replace(table, name="other", settings=replace(table.settings, model="digits"))
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure))
    for one in (table, other):
        monkeypatch.setitem(plan.TABLES, one.name, one)
        results = Results(one, tmp_path)
        for seed, figures in enumerate(((0.2, 0.4, 0.9), (0.4, 0.6), ())):
            log = log_of(0.5, diverged=not figures)
            log["records"] = [{"step": 10 * (i + 1), "accuracy": figure} for i, figure in enumerate(figures)]
            results.add(Work(one, "bn", seed), log)
        results.write()
    plots.curves(tmp_path / "curves.png", ["small", "small", "other"], tmp_path)
    panels = drawn[0].axes
    (line,) = panels[0].lines
    assert line.get_xdata().tolist() == [10, 20]
    assert line.get_ydata().tolist() == pytest.approx([0.3, 0.5])
    shared = panels[0].get_shared_y_axes()
    assert shared.joined(panels[0], panels[1])
    assert not shared.joined(panels[0], panels[2])


def test_points_are_all_within_their_panels_which_no_small_difference_fills(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure))
    found = {"near": ("wine", (0.97, 0.972)), "far": ("wine", (0.1, 0.6)), "lone": ("digits", (0.5, 0.501))}
    for name, (model, figures) in found.items():
        table = replace(SMALL, name=name, choice=None, settings=replace(SMALL.settings, model=model))
        monkeypatch.setitem(plan.TABLES, name, table)
        results = Results(table, tmp_path)
        for seed, figure in enumerate(figures):
            results.add(Work(table, "bn", seed), log_of(figure))
        results.write()
    plots.points(tmp_path / "points.png", list(found), tmp_path)
    for axes in drawn[0].axes[: len(found)]:
        low, high = axes.get_ylim()
        values = [value for line in axes.lines for value in line.get_ydata()]
        assert values
        assert low < min(values) <= max(values) < high
        assert high - low >= 0.05 - 1e-9


def test_a_norm_has_one_colour_in_all_panels(tmp_path, monkeypatch):
    """Also where a table has other norms, or where another's runs have not ended yet."""
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure))
    tables = {"small": ("none", "bn"), "other": ("none", "ln", "bn")}
    for name, norms in tables.items():
        table = replace(SMALL, name=name, norms=norms, choice=None)
        monkeypatch.setitem(plan.TABLES, name, table)
        results = Results(table, tmp_path)
        for norm in set(norms) - ({"none"} if name == "small" else set()):
            log = log_of(0.5)
            results.add(Work(table, norm, 0), {**log, "records": [{"step": 1, "accuracy": 0.5}]})
        results.write()
    plots.curves(tmp_path / "curves.png", list(tables), tmp_path)
    first, second = ({line.get_label(): line.get_color() for line in axes.lines} for axes in drawn[0].axes)
    shown = {line.get_label(): line.get_color() for line in drawn[0].legends[0].get_lines()}
    assert first["bn"] == second["bn"]
    assert shown == first | second
    assert len(set(shown.values())) == len(shown) == 3
