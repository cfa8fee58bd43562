"""A failure is forgiven once, and only where the processor was seen to err meanwhile."""

import os
import subprocess
import sys
import time
from pathlib import Path

import processor
import pytest
import torch


def failing(times):
    """A function that fails so many times, and the list of its calls."""
    calls = []

    def function():
        calls.append(None)
        assert len(calls) > times
        return "right"

    return function, calls


@pytest.fixture
def notes(tmp_path, monkeypatch):
    path = tmp_path / "notes"
    path.write_text(f"{time.time() - 100}\n")
    monkeypatch.setenv(processor.NOTES, str(path))
    monkeypatch.setattr(processor, "QUIET", 0.1)
    return path


def erring(function, notes):
    """``function``, during whose first call the watch notes an error."""
    begun = []

    def call():
        if not begun:
            begun.append(None)
            notes.write_text(f"{time.time()}\n")
        return function()

    return call


def test_a_failure_stands_where_the_processor_divides_well(notes):
    function, calls = failing(1)
    with pytest.raises(AssertionError):
        processor.once_more_if_it_erred(function)
    assert len(calls) == 1


def test_a_failure_while_it_errs_is_looked_at_once_more(notes):
    function, calls = failing(1)
    with pytest.warns(UserWarning, match="divided wrongly"):
        assert processor.once_more_if_it_erred(erring(function, notes)) == "right"
    assert len(calls) == 2


@pytest.mark.filterwarnings("ignore:the processor divided wrongly")
def test_a_second_failure_stands(notes):
    function, calls = failing(2)
    with pytest.raises(AssertionError):
        processor.once_more_if_it_erred(erring(function, notes))
    assert len(calls) == 2


def test_an_error_in_one_number_is_seen():
    def divide(a, b):
        y = a / b
        y[17] *= 1 + 2.0**-34
        return y

    assert processor.look()() or processor.erred(time.time() - 10)
    assert not processor.look(divide)()


def test_the_watch_ends_with_what_it_watches_for():
    code = "import processor, os\nwith processor.watched() as watches: print(*watches, flush=True); os._exit(0)"
    folder = Path(processor.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True, text=True)
    assert done.stdout
    deadline = time.monotonic() + 60
    for watch in done.stdout.split():
        while _runs(watch):
            assert time.monotonic() < deadline
            time.sleep(0.1)


def _runs(process):
    """Whether a process is there, and no more than waited for."""
    try:
        return bool(Path(f"/proc/{process}/cmdline").read_bytes())
    except OSError:
        return False


def test_the_tests_themselves_are_watched():
    assert Path(os.environ[processor.NOTES]).exists()
    assert torch.get_num_threads() == 2
