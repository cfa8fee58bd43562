"""Several processes: data parallel, sharded, and batch statistics over all of them."""

from process import run_python


def test_two_processes_do_what_one_does(tmp_path):
    assert run_python("tests/distributed_step.py", tmp_path) == "equal\n"
