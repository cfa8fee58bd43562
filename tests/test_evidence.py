"""The long runs: the plan, what is run in which order, and rates that are chosen."""

import json
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace

import pytest
from bench_command import run
from small_evidence import SMALL, log_of

from bench.evidence import command, plan, schedule
from bench.evidence.results import Results
from bench.evidence.table import Choice, Work
from bench.training.dense import DenseClassification
from bench.training.loop import train
from bench.training.runs import RESULTS

pytestmark = pytest.mark.usefixtures("torchs_defaults")


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


def test_the_rate_is_the_best_on_what_is_held_out(tmp_path):
    table = replace(SMALL, choice=Choice((0.1, 0.2, 0.3), 20, 0.25, seeds=2))
    results = Results(table, tmp_path)
    figures = {0.1: (0.5, 0.6), 0.2: (0.9, 0.4), 0.3: (1.0, None)}  # means 0.55 and 0.65, and one that diverged
    works = [work for work in results.choosing() if work.norm == "bn"]
    for work in works:
        assert results.chosen("bn") is None
        assert not results.ready(Work(table, "bn", 0))
        figure = figures[work.rate][work.seed]
        results.add(work, log_of(figure, figure is None))
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
        return log_of(None if score is None else score / 10, score is None)

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
    ran = _pretended(monkeypatch, lambda folder: log_of(0.5), fails=0.1)
    works = schedule.in_order(results, (("small", 1),))
    failed = schedule.run(works, results, tmp_path / "out", 1, lambda line: None)
    assert ran == [0.1, 0.2, 0.3]
    assert failed == ["small: bn, seed 0: OSError('no room')", "small: bn, seed 0: no rate was chosen"]


def test_what_had_ended_before_further_rates_were_planned_is_not_run_again(tmp_path, monkeypatch):
    scores = {0.1: 1, 0.2: 2, 0.3: 3, 0.9: 1}
    table = replace(SMALL, norms=("bn",), choice=Choice((0.1, 0.2, 0.3), 20, 0.25), seeds=1)
    before = Results(table, tmp_path / "results")
    for work in before.choosing():
        before.add(work, log_of(scores[work.rate] / 10))
    before.add(Work(table, "bn", 0), log_of(0.5))
    before.write()
    wider = replace(table, choice=replace(table.choice, further=(0.9,)))
    results = {"small": Results(wider, tmp_path / "results")}
    ran = _pretended(monkeypatch, lambda folder: log_of(0.1))
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
    results.add(Work(results.table, "bn", 0), log_of(1 / 3))
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
    results.add(Work(table, "bn", 0, rate), log_of(0.5))
    results.add(Work(table, "bn", 0), log_of(0.5))
    results.write()
    for found in (results, Results(table, tmp_path)):
        assert found.chosen("bn") == rate
        assert [work.seed for work in found.left()] == [1]


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
            results["small"].add(work, log_of(0.5))
        results["small"].write()
        return []

    monkeypatch.setattr(command, "run", pretended)
    for _ in range(2):
        run("evidence", "small", "--results", tmp_path)
    assert [[work.norm for work in works] for works in asked] == [["none", "bn"], []]
    monkeypatch.setattr(command, "run", lambda *arguments: ["small: bn, seed 0: an error"])
    assert "runs that failed: 1" in run("evidence", "small", "--results", tmp_path, code=1)
