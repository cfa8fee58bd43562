"""The long runs: the plan, what is run in which order, rates that are chosen, and what the pages say of it."""

import json
import math
import random
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace

import pytest
from bench_command import run

from bench import pages
from bench.evidence import answers, command, plan, plots, schedule, views
from bench.evidence.plan import Contrast
from bench.evidence.results import Results
from bench.evidence.table import Choice, Table, Work
from bench.training.dense import DenseClassification, DenseSettings
from bench.training.loop import train
from bench.training.runs import RESULTS

pytestmark = pytest.mark.usefixtures("torchs_defaults")

SMALL = Table(
    "small",
    "dense",
    DenseSettings("wine", None, 30, evaluations=3, checkpoint_every=10, depth=2),
    ("none", "bn"),
    2,
    1.0,
    choice=Choice((1e-5, 0.1), 20, 0.25),
)


@pytest.mark.parametrize("table", plan.TABLES.values(), ids=lambda table: table.name)
def test_tables_of_the_plan_can_be_trained(table):
    for norm in table.norms:
        table.program.check_norm(norm, table.settings.model)
    assert table.settings.model in table.program.models
    assert table.data is None or table.settings.data is None
    assert set(table.paper) >= set(table.norms) or not table.paper
    assert max(seeds for name, seeds in plan.ORDER if name == table.name) == table.seeds
    rates = () if table.choice is None else (*table.choice.rates, *table.choice.further)
    assert len({*rates}) == len(rates)
    choosing = [Work(table, norm, 0, rate) for norm in table.norms for rate in rates]
    for work in (*choosing, *table.counting()):
        settings = work.settings(None)
        assert settings.steps >= settings.evaluations
        assert (getattr(settings, "held_out", 0) > 0) == (work.rate is not None)


def test_contrasts_are_between_norms_that_run():
    for contrasts in plan.QUESTIONS.values():
        for contrast in contrasts:
            assert contrast.norm in plan.TABLES[contrast.table].norms
            other = plan.TABLES[contrast.than_table or contrast.table]
            assert contrast.than in other.norms
            assert other.program.figure == plan.TABLES[contrast.table].program.figure


def _log(work, results, figure, diverged=False):
    return {
        "settings": {},
        "diverged": diverged,
        "finished": True,
        "records": [{"step": 1, "loss": 1.0}, {"step": 30, "loss": 0.123456789, "accuracy": figure}],
        "figures": {} if diverged else {"accuracy": figure},
        "seconds_per_step": 0.5,
        "activations": {},
    }


def test_the_rate_is_the_best_on_what_is_held_out(tmp_path):
    table = replace(SMALL, choice=Choice((0.1, 0.2, 0.3), 20, 0.25, seeds=2))
    results = Results(table, tmp_path)
    figures = {0.1: (0.5, 0.6), 0.2: (0.9, 0.4), 0.3: (1.0, None)}  # means 0.55 and 0.65, and one that diverged
    works = [work for work in results.choosing() if work.norm == "bn"]
    for work in works:
        assert results.chosen("bn") is None
        assert not results.ready(Work(table, "bn", 0))
        figure = figures[work.rate][work.seed]
        results.add(work, _log(work, results, figure, figure is None))
    assert results.chosen("bn") == 0.2
    assert results.ready(Work(table, "bn", 0))
    assert not results.ready(Work(table, "none", 0))
    assert Work(table, "bn", 0).settings(0.2) == replace(table.settings, rate=0.2)
    short = works[0].settings(None)
    assert (short.steps, short.held_out, short.rate) == (20, 0.25, 0.1)


def _pretended(monkeypatch, log, fails=None):
    """The rates of runs as they come up, which end at once with what ``log`` gives, or fail at one rate."""
    ran = []

    @contextmanager
    def processes(jobs, threads, runs):
        def submit(_, experiment, settings, run, folder):
            ran.append(settings.rate)
            future = Future()
            if settings.rate == fails:
                future.set_exception(OSError("no room"))
            else:
                future.set_result(None)
            return future

        yield submit, None

    monkeypatch.setattr(schedule, "processes", processes)
    monkeypatch.setattr(schedule, "finished", log)
    return ran


@pytest.mark.parametrize(
    ("scores", "tried", "chosen"),
    [
        ({0.1: 1, 0.2: 2, 0.3: 1}, (0.1, 0.2, 0.3), 0.2),
        ({0.01: 1, 0.1: 2, 0.2: 1, 0.3: 1}, (0.01, 0.1, 0.2, 0.3), 0.1),
        ({0.001: 4, 0.01: 3, 0.1: 2, 0.2: 1, 0.3: 1}, (0.001, 0.01, 0.1, 0.2, 0.3), 0.001),
        ({0.1: 1, 0.2: 1, 0.3: 2, 0.9: None}, (0.1, 0.2, 0.3, 0.9), 0.3),
        ({0.1: 1, 0.2: 1, 0.3: 2, 0.9: 3}, (0.1, 0.2, 0.3, 0.9), 0.9),
        ({0.1: 1, 0.2: 1, 0.3: 1}, (0.1, 0.2, 0.3), 0.2),
        ({0.001: 1, 0.01: 2, 0.1: None, 0.2: None, 0.3: None}, (0.001, 0.01, 0.1, 0.2, 0.3), 0.01),
    ],
    ids=["inside", "below", "lowest", "diverges beyond", "highest", "all alike", "only below"],
)
def test_rates_beyond_an_end_are_tried_while_the_best_is_there(scores, tried, chosen, tmp_path, monkeypatch):
    """With the works in the order in which they come up, as the schedule runs them."""
    choice = Choice((0.1, 0.2, 0.3), 20, 0.25, further=(0.9, 0.001, 0.01))
    table = replace(SMALL, norms=("bn",), choice=choice, seeds=1)
    results = {"small": Results(table, tmp_path / "results")}

    def log(folder):
        score = scores[ran[-1]] if len(ran) <= len(scores) else 0.5
        return _log(None, None, None if score is None else score / 10, score is None)

    ran = _pretended(monkeypatch, log)
    works = schedule.in_order(results, (("small", 1),))
    assert schedule.run(works, results, tmp_path / "out", 1, lambda line: None) == []
    assert sorted(ran[:-1]) == sorted(scores)
    assert ran[-1] == chosen
    assert results["small"].tried("bn") == tried
    assert results["small"].left() == []


def test_a_rate_whose_run_fails_is_not_tried_again(tmp_path, monkeypatch):
    choice = Choice((0.1, 0.2, 0.3), 20, 0.25, further=(0.01, 0.9))
    table = replace(SMALL, norms=("bn",), choice=choice, seeds=1)
    results = {"small": Results(table, tmp_path / "results")}
    ran = _pretended(monkeypatch, lambda folder: _log(None, None, 0.5), fails=0.1)
    works = schedule.in_order(results, (("small", 1),))
    failed = schedule.run(works, results, tmp_path / "out", 1, lambda line: None)
    assert ran == [0.1, 0.2, 0.3]
    assert failed == ["small: bn, seed 0: OSError('no room')", "small: bn, seed 0: no rate was chosen"]


def test_what_had_ended_before_further_rates_were_planned_is_not_run_again(tmp_path, monkeypatch):
    scores = {0.1: 1, 0.2: 2, 0.3: 3, 0.9: 1}
    table = replace(SMALL, norms=("bn",), choice=Choice((0.1, 0.2, 0.3), 20, 0.25), seeds=1)
    before = Results(table, tmp_path / "results")
    for work in before.choosing():
        before.add(work, _log(None, None, scores[work.rate] / 10))
    before.add(Work(table, "bn", 0), _log(None, None, 0.5))
    before.write()
    wider = replace(table, choice=replace(table.choice, further=(0.9,)))
    results = {"small": Results(wider, tmp_path / "results")}
    ran = _pretended(monkeypatch, lambda folder: _log(None, None, 0.1))
    works = schedule.in_order(results, (("small", 1),))
    assert len(works) == 2  # the rate beyond, and the run that may hang on it
    assert schedule.run(works, results, tmp_path / "out", 1, lambda line: None) == []
    assert ran == [0.9]
    assert results["small"].chosen("bn") == 0.3
    assert len(results["small"].runs) == 1


def test_the_order_has_whole_comparisons_of_a_seed_before_the_next(tmp_path):
    other = replace(SMALL, name="other", choice=None)
    results = {"small": Results(SMALL, tmp_path), "other": Results(other, tmp_path)}
    works = schedule.in_order(results, (("small", 1), ("other", 2), ("small", 2)))
    assert [(w.table.name, w.seed, w.rate is None, w.norm) for w in works] == [
        *(("small", 0, False, norm) for norm in ("none", "bn") for _ in range(2)),
        *(("small", 0, True, norm) for norm in ("none", "bn")),
        *(("other", seed, True, norm) for seed in range(2) for norm in ("none", "bn")),
        *(("small", 1, True, norm) for norm in ("none", "bn")),
    ]


def test_the_plan_is_run_once_by_several_processes_and_gives_what_one_does(tmp_path):
    """What had ended before a stop is not run again; a run that fails is told, and the others go on."""
    table = replace(SMALL, norms=("none", "bn", "nonsense"), choice=replace(SMALL.choice, seeds=1), seeds=1)
    results = {"small": Results(table, tmp_path / "results")}
    works = schedule.in_order(results, (("small", 1),))
    assert len(works) == 6 + 3
    said = []
    assert schedule.run(works[:2], results, tmp_path / "out", 1, said.append) == []
    assert [line.split(":")[:2] for line in said] == [
        ["small", " none, seed 0, rate 1e-05"],
        ["small", " none, seed 0, rate 0.1"],
    ]
    again = {"small": Results(table, tmp_path / "results")}
    assert again["small"].left() == works[2:]
    failed = schedule.run(works[2:], again, tmp_path / "out", 2, said.append)
    assert len(failed) == 3
    assert failed[0].startswith("small: nonsense, seed 0: KeyError")
    assert failed[2] == "small: nonsense, seed 0: no rate was chosen"
    ended = Results(table, tmp_path / "results")
    assert {work.norm for work in ended.left()} == {"nonsense"}
    for log in ended.counting():
        assert log["settings"]["rate"] == 0.1
        settings, norm = replace(table.settings, rate=0.1), log["settings"]["norm"]
        here = train(lambda: DenseClassification(settings, norm, 0), {}, 0, tmp_path / norm, lambda step: None)  # noqa: B023
        assert log["figures"]["accuracy"] == pytest.approx(here["figures"]["accuracy"], abs=1e-5)
        assert log["records"][-1]["loss"] == pytest.approx(here["records"][-1]["loss"], rel=1e-3)


def test_a_process_that_is_killed_ends_the_command_with_a_word(tmp_path, monkeypatch):
    @contextmanager
    def broken(jobs, threads, runs):
        def submit(*arguments):
            future = Future()
            future.set_exception(BrokenProcessPool("killed"))
            return future

        yield submit, None

    monkeypatch.setattr(schedule, "processes", broken)
    results = {"small": Results(replace(SMALL, choice=None), tmp_path / "results")}
    works, said = schedule.in_order(results, (("small", 2),)), []
    failed = schedule.run(works, results, tmp_path / "out", 1, said.append)
    assert failed == ["small: none, seed 0: its process or another ended"]
    assert said[0].startswith("a process has ended without a word")
    assert results["small"].left() == works


def test_results_keep_what_the_pages_need(tmp_path):
    results = Results(replace(SMALL, choice=None), tmp_path)
    results.add(Work(results.table, "bn", 0), _log(None, None, 1 / 3))
    results.write()
    document = json.loads((tmp_path / "small" / RESULTS).read_text())
    (log,) = document["runs"]
    assert log["records"] == [{"step": 30, "loss": 0.123457, "accuracy": 0.333333}]
    assert log["settings"]["data"] is None
    assert str(tmp_path) not in json.dumps(document)
    changed = Results(replace(SMALL, choice=None, settings=replace(SMALL.settings, steps=31)), tmp_path)
    assert len(changed.left()) == 4  # a run with other settings is none of the plan's


def test_runs_are_found_by_rates_of_any_digits(tmp_path):
    rate = 0.1 + 0.2  # 0.30000000000000004
    table = replace(SMALL, norms=("bn",), choice=Choice((rate,), 20, 0.25))
    results = Results(table, tmp_path)
    results.add(Work(table, "bn", 0, rate), _log(None, None, 0.5))
    results.add(Work(table, "bn", 0), _log(None, None, 0.5))
    results.write()
    for found in (results, Results(table, tmp_path)):
        assert found.chosen("bn") == rate
        assert [work.seed for work in found.left()] == [1]


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
            results.add(Work(table, norm, seed), _log(None, None, figure, figure is None))
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
        results.add(work, _log(None, None, work.rate))
    results.add(Work(table, "bn", 0), _log(None, None, 0.25))
    results.add(Work(table, "bn", 1), _log(None, None, 0.75))
    results.add(Work(table, "none", 0), _log(None, None, None, True))
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
        log = _log(None, None, 0.5)
        log["records"] = [{"step": 1, "accuracy": 0.1, "growth": 9.0}, {"step": 2, "accuracy": 0.5, "growth": growth}]
        results.add(Work(results.table, "bn", seed), log)
    results.write()
    shown = views.scales(["small"], tmp_path)
    assert [list(column.cells) for column in shown.columns] == [["none", "bn"], ["-", "2.500 ± 0.707"], ["-", "-"]]


def test_pictures_are_drawn_from_the_results(tmp_path, monkeypatch):
    monkeypatch.setitem(plan.TABLES, "small", replace(SMALL, choice=None))
    results = Results(plan.TABLES["small"], tmp_path)
    results.add(Work(results.table, "bn", 0), _log(None, None, 0.25))
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
            log = _log(None, None, 0.5, diverged=not figures)
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
    found = {"near": ("wine", (0.97, 0.972)), "far": ("wine", (0.1, 0.6)), "lone": ("digits", (0.5,))}
    for name, (model, figures) in found.items():
        table = replace(SMALL, name=name, choice=None, settings=replace(SMALL.settings, model=model))
        monkeypatch.setitem(plan.TABLES, name, table)
        results = Results(table, tmp_path)
        for seed, figure in enumerate(figures):
            results.add(Work(table, "bn", seed), _log(None, None, figure))
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
            log = _log(None, None, 0.5)
            results.add(Work(table, norm, 0), {**log, "records": [{"step": 1, "accuracy": 0.5}]})
        results.write()
    plots.curves(tmp_path / "curves.png", list(tables), tmp_path)
    first, second = ({line.get_label(): line.get_color() for line in axes.lines} for axes in drawn[0].axes)
    shown = {line.get_label(): line.get_color() for line in drawn[0].legends[0].get_lines()}
    assert first["bn"] == second["bn"]
    assert shown == first | second
    assert len(set(shown.values())) == len(shown) == 3


def test_the_command_lists_and_refuses(tmp_path):
    listed = run("evidence", "dense-digits-8", "--list", "--results", tmp_path)
    assert "0 of 91" in listed
    run("evidence", "no-such-table", code=2)
    assert "needs --data" in run("evidence", "cifar-cnn", "--results", tmp_path, code=2)
    assert "no folder" in run("evidence", "cifar-cnn", "--data", tmp_path, "--results", tmp_path, code=2)


def test_the_command_runs_what_is_left(tmp_path, monkeypatch):
    monkeypatch.setitem(plan.TABLES, "small", replace(SMALL, choice=None, seeds=1))
    monkeypatch.setattr(plan, "ORDER", (("small", 1),))
    asked = []

    def pretended(works, results, out, jobs, say):
        asked.append(works)
        for work in works:
            results["small"].add(work, _log(None, None, 0.5))
        results["small"].write()
        return []

    monkeypatch.setattr(command, "run", pretended)
    for _ in range(2):
        run("evidence", "small", "--results", tmp_path)
    assert [[work.norm for work in works] for works in asked] == [["none", "bn"], []]
    monkeypatch.setattr(command, "run", lambda *arguments: ["small: bn, seed 0: an error"])
    assert "runs that failed: 1" in run("evidence", "small", "--results", tmp_path, code=1)
