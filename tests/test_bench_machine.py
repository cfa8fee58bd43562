"""The benchmark on a machine that others use too."""

import pytest
from bench_command import run

from bench import cli, machine

pytestmark = pytest.mark.usefixtures("torchs_defaults")


@pytest.mark.parametrize(("user", "idle", "share"), [(0, 100, 0), (25, 75, 0.25), (100, 0, 1)])
def test_what_others_take_of_the_processors(user, idle, share, monkeypatch, tmp_path):
    def written(user, idle):
        return f"cpu  {1000 + user} 0 50 {2000 + idle} 300 0 0 0 7 7\ncpu0 1 1 1 1 1 1 1 1 1 1\n"

    stat = tmp_path / "stat"
    stat.write_text(written(0, 0))
    monkeypatch.setattr(machine, "sleep", lambda seconds: stat.write_text(written(user, idle)))
    assert machine.taken_by_others(stat) == share
    assert machine.taken_by_others(tmp_path / "none") is None


@pytest.mark.parametrize("share", [0.02, 0.5])
def test_a_busy_machine_is_told_of(share, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "taken_by_others", lambda: share)
    output = run("run", "--case", "2x3x5x5", "--no-sweep", "--seconds", 0.01, "--window", 3, "--out", tmp_path)
    assert ("others take 50%" in output) == (share == 0.5)
