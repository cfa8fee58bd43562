"""The experiments: the loop, going on after a kill, many runs, tables, and the command line."""

import json
import math
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench_command import run
from payload import Payload
from process import ROOT
from torch import nn

import divnorm_kernels as dk
from bench import pages
from bench.options import INTERRUPTED
from bench.training import luma, superres, words
from bench.training.loop import CHECKPOINT, LOG, Plan, Task, train
from bench.training.runs import EXPERIMENTS, RESULTS, Run, collect, run_all
from bench.training.settings import Settings
from bench.training.summary import table
from bench.training.text import TextSettings, plan

pytestmark = pytest.mark.usefixtures("torchs_defaults")


def test_the_rate_falls_where_the_plan_says():
    steps = Plan(100, 0.5, ((0.25, 0.1), (0.5, 0.1)))
    assert [steps.rate_at(s) for s in (0, 24, 25, 49, 50, 99)] == pytest.approx([0.5, 0.5, 0.05, 0.05, 0.005, 0.005])
    language = plan(TextSettings("lstm", None, 1300), "dn")
    assert [language.rate_at(100 * epoch) for epoch in (0, 3, 4, 5, 12)] == pytest.approx([1, 1, 0.5, 0.25, 2**-9])
    chosen = plan(TextSettings("tanh", None, 10, rate=0.3, decay=(0.5,)), "none")
    assert [chosen.rate_at(s) for s in (4, 5)] == pytest.approx([0.3, 0.03])


@pytest.mark.parametrize(("steps", "evaluations"), [(10, 1), (10, 3), (10, 10), (1, 1), (7, 5)])
def test_evaluations_are_spread_and_the_last_is_at_the_end(steps, evaluations):
    at = [s for s in range(steps) if Plan(steps, 1.0, evaluations=evaluations).evaluates_after(s)]
    assert len(at) == evaluations
    assert at[-1] == steps - 1
    gaps = [b - a for a, b in zip([-1, *at], at, strict=False)]
    assert max(gaps) - min(gaps) <= 1


class Line(Task):
    """A linear layer behind a norm with a penalty; the loss can be made infinite from one step on."""

    def __init__(self, steps, broken=None, weight_decay=0.0):
        self.model = nn.Sequential(
            nn.Linear(4, 6), dk.DivisiveNormFeatures(6, 3, learn_sigma=True, l1_weight=0.1), nn.Linear(6, 1)
        )
        self.plan = Plan(steps, 0.1, weight_decay=weight_decay, evaluations=2, checkpoint_every=1)
        self.broken, self.seen = broken, []

    def loss(self, step):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        self.seen.append(step)
        factor = math.inf if step == self.broken else 1.0
        return factor * (self.model(x) - x.sum(1, keepdim=True)).square().mean()

    def evaluate(self, final):
        assert not self.model.training
        return {"error": 1.0, **({"final": 2.0} if final else {})}

    def places(self):
        return {"norm": self.model[1]}

    def probe(self):
        self.model(torch.ones(3, 4))


def test_a_step_is_sgd_on_loss_and_penalty(tmp_path):
    """Against torch's optimizer by hand; the learned sigma is not decayed."""
    made = []

    def make():
        made.append(Line(5, weight_decay=0.5))
        return made[-1]

    log = train(make, {}, 3, tmp_path, lambda step: None)
    torch.manual_seed(3)
    task = Line(5)
    named = dict(task.model.named_parameters())
    with torch.enable_grad():
        for step in range(5):
            loss, penalty = task.loss(step), 0.1 * task.model[1].l1
            gradients = torch.autograd.grad(loss + penalty, list(named.values()))
            with torch.no_grad():
                for (name, p), gradient in zip(named.items(), gradients, strict=True):
                    p -= 0.1 * (gradient + (0 if name == "1.sigma" else 0.5 * p))
            assert log["records"][step]["loss"] == pytest.approx(loss.item(), rel=1e-6)
            assert log["records"][step]["penalty"] == pytest.approx(penalty.item(), rel=1e-6)
    for name, p in made[0].model.named_parameters():
        torch.testing.assert_close(p, named[name])
    assert log["figures"] == {"error": 1.0, "final": 2.0}
    assert [record["step"] for record in log["records"] if "error" in record] == [3, 5]
    assert log["activations"]["norm"].keys() == {"sparsity", "zeros", "correlation"}


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    log = train(lambda: Line(6, broken=3), {}, 0, tmp_path / "run", lambda step: None)
    assert log["diverged"]
    assert log["figures"] == {}
    assert [record["step"] for record in log["records"]] == [1, 2, 3]
    assert collect(tmp_path, {}) == [log]


def test_a_run_that_has_ended_is_not_trained_again(tmp_path):
    first, counted = train(lambda: Line(4), {"a": 1}, 0, tmp_path, lambda step: None), []
    again = train(lambda: pytest.fail("built anew"), {"a": 1}, 0, tmp_path, counted.append)
    assert again == first
    assert counted == [4]
    (tmp_path / LOG).unlink()  # killed between checkpoint and log
    train(lambda: pytest.fail("built anew"), {"a": 1}, 0, tmp_path, counted.append)
    assert json.loads((tmp_path / LOG).read_text()) == first
    with pytest.raises(ValueError, match=r"expected a run with these settings, .* \(a 1 there and 2 here\)"):
        train(lambda: Line(4), {"a": 2}, 0, tmp_path, lambda step: None)


def test_a_checkpoint_is_never_unpickled(tmp_path):
    (tmp_path / CHECKPOINT).write_bytes(pickle.dumps(Payload(tmp_path / "unpickled")))
    with pytest.raises(ValueError, match=r"checkpoint.pt: expected a checkpoint of this command"):
        train(lambda: Line(4), {}, 0, tmp_path, lambda step: None)
    torch.save({"log": "{}", "extra": Payload(tmp_path / "unpickled")}, tmp_path / CHECKPOINT)
    with pytest.raises(ValueError, match=r"checkpoint.pt: expected a checkpoint of this command"):
        train(lambda: Line(4), {}, 0, tmp_path, lambda step: None)
    assert not (tmp_path / "unpickled").exists()


def _curve(folder):
    return json.loads((folder / LOG).read_text())["records"]


@pytest.fixture
def small_text(tmp_path):
    """A folder of texts that are evaluated in no time."""
    folder = tmp_path / "small"
    folder.mkdir()
    generator = random.Random(0)
    for part, lines in zip(words.PARTS, (200, 20, 20), strict=True):
        text = "\n".join(" ".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=10)) for _ in range(lines))
        (folder / f"{part}.txt").write_text(text)
    return folder


def _children(process):
    """The processes that a process has started, where the system tells."""
    found = Path(f"/proc/{process}/task/{process}/children")
    return found.read_text().split() if found.exists() else []


def _wait_for_the_end_of(processes):
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{process}/stat").exists() for process in processes):
        assert time.monotonic() < deadline, "the workers of a killed command train on"
        time.sleep(0.01)


@pytest.mark.parametrize(
    "command",
    [
        ("text", "--model", "lstm", "--norm", "dn*", "--vocabulary", 60, "--jobs", 2, "--steps", 60),
        ("cifar", "--norm", "bn*", "--model", "cnn", "--steps", 10),
    ],
    ids=["state of a recurrent network", "running statistics"],
)
def test_a_killed_run_goes_on_where_it_was(command, tmp_path, small_text):
    """Killed without warning after its first checkpoint, then given again: the same numbers as in one go."""
    name, steps = command[0], command[-1]
    arguments = [*command, "--seeds", 1, "--checkpoint-every", 1, "--evaluations", 1, "--device", "cpu"]
    arguments += ["--data", small_text] if name == "text" else []
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run("train", *arguments, "--out", whole)
    (folder,) = [path for path in whole.iterdir() if path.is_dir()]
    checkpoint = killed / folder.name / CHECKPOINT
    process = subprocess.Popen(
        [sys.executable, "-m", "bench", "train", *map(str, arguments), "--out", str(killed)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.01)
    workers = _children(process.pid)
    assert len(workers) >= ("--jobs" in command)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    _wait_for_the_end_of(workers)  # with their next step
    done = torch.load(checkpoint, weights_only=True)["step"]
    assert 1 <= done < steps
    run("train", *arguments, "--out", killed)
    assert _curve(killed / folder.name) == _curve(folder)
    assert len(_curve(folder)) == steps
    assert EXPERIMENTS[name].figure in json.loads((killed / RESULTS).read_text())["runs"][0]["figures"]


@pytest.mark.parametrize("jobs", [1, 2])
def test_ctrl_c_ends_all_processes_and_says_how_to_go_on(jobs, tmp_path, small_text):
    """A terminal sends it to all of them; what they would train on for is hours."""
    steps = 1_000_000
    arguments = ["text", "--norm", "dn*", "--vocabulary", 60, "--seeds", 2, "--jobs", jobs, "--steps", steps]
    arguments += ["--checkpoint-every", 1, "--device", "cpu", "--data", small_text, "--out", tmp_path / "out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "bench", "train", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell may have it ignored
    )
    runs = [tmp_path / "out" / Run("dn*", seed).folder(Path()) / CHECKPOINT for seed in range(jobs)]
    while not all(path.exists() for path in runs) and process.poll() is None:
        time.sleep(0.01)
    workers = _children(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED
    assert "the same command goes on" in output
    _wait_for_the_end_of(workers)
    for path in runs:
        assert torch.load(path, weights_only=True)["step"] < steps


def test_several_processes_train_what_one_does(tmp_path, small_text):
    settings = TextSettings("tanh", small_text, 3, evaluations=1, vocabulary=50)
    runs = [Run(norm, seed) for seed in (0, 1) for norm in ("ln*", "dn")]
    for jobs in (1, 2):
        seen = {}
        run_all("text", settings, runs, tmp_path / str(jobs), jobs, seen.__setitem__)
        assert seen == dict.fromkeys(range(4), 3)
    one, two = (collect(tmp_path / str(jobs), settings.record()) for jobs in (1, 2))
    assert [log["settings"] for log in one] == [log["settings"] for log in two]
    assert len({log["figures"]["perplexity"] for log in one}) == 4
    for a, b in zip(one, two, strict=True):
        assert a["figures"] == pytest.approx(b["figures"], rel=1e-4)  # other numbers of threads, other orders of sums


def test_an_error_in_a_process_ends_the_command(tmp_path, small_text):
    settings = TextSettings("tanh", small_text, 3, vocabulary=50)
    (tmp_path / "dn-0").mkdir()
    (tmp_path / "dn-0" / CHECKPOINT).write_text("none")
    with pytest.raises(ValueError, match="expected a checkpoint"):
        run_all("text", settings, [Run("dn", 0), Run("dn", 1)], tmp_path, 2, lambda number, step: None)


def document(**more):
    def log(norm, seed, accuracy):
        activations = {"one": {"sparsity": 0.5, "zeros": 0.1, "correlation": 0.25}}
        figures = {} if accuracy is None else {"accuracy": accuracy}
        return {
            "settings": {"norm": norm, "seed": seed},
            "figures": figures,
            "diverged": accuracy is None,
            "seconds_per_step": 0.02,
            "records": [{"step": 1, "loss": 2.0, "accuracy": 0.1}],
            "activations": activations,
        }

    return {
        "title": "title",
        "command": "python -m bench train cifar",
        "figure": "accuracy",
        "curve": "accuracy",
        "also": [],
        "higher_is_better": True,
        "jobs": 1,
        "norms": ["none", "dn"],
        "paper": {"dn": 0.8058},
        "runs": [log("dn", 0, 0.5), log("dn", 1, 0.7), log("none", 0, 0.25), log("gn", 0, None)],
        **more,
    }


def test_the_table_gives_mean_deviation_and_what_diverged(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / RESULTS).write_text(json.dumps(document()))
    page = "before\n<!-- table runs one/results.json -->\nold\n<!-- end -->\nafter\n"
    written = pages.filled(page, tmp_path)
    command = "```\npython -m bench train cifar\n```"
    assert written.startswith(f"before\n<!-- table runs one/results.json -->\n\n{command}\n\n| norm |")
    assert written.endswith("|\n\n<!-- end -->\nafter\n")
    assert pages.filled(written, tmp_path) == written
    lines = [re.split(r"\s*\|\s*", line.strip())[1:-1] for line in written.splitlines()]
    by_norm = {cells[0]: cells[1:] for cells in lines if len(cells) > 1}
    assert by_norm["none"] == ["0.2500", "1", "20", "0.50", "0.25", "-"]
    assert by_norm["dn"] == ["0.6000 ± 0.1414", "2", "20", "0.50", "0.25", "0.8058"]
    assert by_norm["gn"] == ["- (1 diverged)", "1", "20", "-", "-", "-"]
    assert list(by_norm)[-3:] == ["none", "dn", "gn"]


def test_perplexities_have_two_digits():
    text = document(figure="perplexity", paper={"dn": 103.7})
    for log in text["runs"]:
        log["figures"] = {"perplexity": 200 * log["figures"].get("accuracy", 1)}
    columns = {column.header: list(column.cells) for column in table(text).columns}
    assert columns["perplexity"][:2] == ["50.00", "120.00 ± 28.28"]
    assert columns["paper"] == ["-", "103.70", "-"]


def _shrunk(monkeypatch):
    monkeypatch.setattr(luma, "TRAINING_SAMPLES", ("coins",))
    monkeypatch.setattr(luma, "TEST_SAMPLES", ("coins",))
    superres.pictures.cache_clear()


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("cifar", "--norm", "dn*", "--norm", "none*", "--steps", 2), "textures of ten classes, made on the spot"),
        (("cifar", "--model", "resnet", "--norm", "dn", "--steps", 1), "textures of ten classes, made on the spot"),
        (("text", "--model", "relu", "--norm", "bn*", "--vocabulary", 50, "--steps", 2), "that come with Python"),
        (("superres", "--norm", "dn*", "--steps", 2), "the sample pictures of scikit-image"),
    ],
    ids=lambda value: " ".join(map(str, value[:3])) if isinstance(value, tuple) else "",
)
def test_commands_run_without_data_and_say_so(command, says, tmp_path, monkeypatch):
    _shrunk(monkeypatch)
    output = run("train", *command, "--seeds", 1, "--evaluations", 1, "--out", tmp_path)
    assert says in output
    found = json.loads((tmp_path / RESULTS).read_text())
    assert found["runs"]
    for log in found["runs"]:
        assert math.isfinite(log["figures"][found["figure"]])
        assert log["seconds_per_step"] > 0
        assert log["records"][-1]["penalty"] > 0 or not log["settings"]["norm"].endswith("*")
    for name in ("curves.png", "activations.png"):
        assert (tmp_path / name).stat().st_size > 5_000
        (tmp_path / name).unlink()
    if command[0] == "superres":
        (pictures,) = tmp_path.glob("*/pictures.png")
        assert pictures.stat().st_size > 5_000
        assert found["runs"][0]["pictures"].keys() == {"coins"}
    run("train", "show", tmp_path / RESULTS)
    assert (tmp_path / "curves.png").exists()


def test_networks_learn(tmp_path):
    """Before a step a word is one of 100 for a network; after 60 it knows which ones are frequent."""
    settings = TextSettings("tanh", None, 60, evaluations=1, vocabulary=100)
    run_all("text", settings, [Run("dn*", 0)], tmp_path, 1, lambda number, step: None)
    (log,) = collect(tmp_path, {})
    assert log["records"][0]["loss"] == pytest.approx(20 * math.log(100), rel=0.05)
    assert log["figures"]["perplexity"] < 25


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("train", "cifar", "--norm", "bnn"), "--norm: norm: got 'bnn', expected"),
        (("train", "text", "--norm", "gn"), "to: got 'gn' for a layer over the last dimension"),
        (("train", "cifar", "--model", "vgg"), "got 'vgg', expected one of cnn, cnn-he, resnet"),
        (("train", "cifar", "--backend", "cudnn"), "backend: got 'cudnn'"),
        pytest.param(
            ("train", "cifar", "--backend", "cuda"),
            "--backend: cuda is missing: ",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="it is there"),
        ),
        (("train", "cifar", "--data", "nowhere"), "nowhere: no folder; expected one with data_batch_1.bin"),
        (("train", "text", "--data", "nowhere"), "got none of train.txt"),
        (("train", "superres", "--data", "nowhere"), "not there or empty"),
        (("properties", "--data", "nowhere"), "nowhere: no folder"),
        (("properties", "--norm", "bnn"), "norm: got 'bnn', expected"),
        (("cells", "--cell", "gru"), "got 'gru', expected one of tanh, relu, lstm"),
    ],
)
def test_bad_options_are_clear_errors(command, message):
    assert message in re.sub(r"[\s│]+", " ", run(*command, code=2))


def test_results_hold_the_runs_of_one_setting(tmp_path):
    for norm, steps in (("dn", 1), ("ln", 2)):
        settings = Settings("cnn", None, steps)
        train(lambda: Line(1), {**settings.record(), "norm": norm}, 0, tmp_path / norm, lambda step: None)
    (log,) = collect(tmp_path, Settings("cnn", None, 2).record())
    assert log["settings"]["norm"] == "ln"


def test_the_documentations_tables_are_those_of_the_committed_results():
    assert all(re.search("<!-- (table|figure) ", (ROOT / page).read_text()) for page in pages.PAGES)
    run("pages", "--check")


def test_files_that_are_no_results_are_refused(tmp_path):
    for content in ("no json", "[]", '{"machine": 1}'):
        (tmp_path / RESULTS).write_text(content)
        assert "expected the results.json" in re.sub(r"[\s│]+", " ", run("train", "show", tmp_path / RESULTS, code=2))


def test_settings_tell_the_data_by_name_alone(tmp_path):
    settings = replace(Settings("cnn", tmp_path / "some" / "pictures", 5), decay=(0.5,))
    assert settings.record()["data"] == "pictures"
    assert json.loads(json.dumps(settings.record())) == settings.record()
