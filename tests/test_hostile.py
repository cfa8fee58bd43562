"""Any tensor a caller can hand in gives the right values or an error that names the argument; none ends the process."""

import json
import multiprocessing.forkserver
import re

import pytest
from hostile import KINDS, main_into
from process import ROOT

CLEAR = r"(Type|Value)Error: (x|dy|weight|bias|sigma|groups): got "
"""An error that names the argument."""
TORCHS = {
    "left behind by vmap": "RuntimeError: Either your tensor may have escaped from inside a function being vmapped",
    "gradient sparse": "NotImplementedError: Could not run 'aten::view' with arguments from the 'SparseCPU' backend"
    "|RuntimeError: reshape is not implemented for sparse tensors",
    "gradient freed": "RuntimeError: setStorage: .* are out of bounds for storage of size",
}
"""Torch's words, where it fails before the operator is called: in a view of x, or in what changes y or a buffer."""


@pytest.fixture(scope="module")
def processes():
    """Makes processes by forking one that has imported what they need: the import takes longer than the calls."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT / "tests"))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["hostile"])
        multiprocessing.forkserver.ensure_running()
    return context


@pytest.mark.parametrize("name", KINDS)
def test_kind(name, processes, tmp_path):
    """Every layer and form, forward and backward, in a process of its own."""
    out, errors = tmp_path / "out", tmp_path / "errors"
    process = processes.Process(target=main_into, args=(name, out, errors))
    process.start()
    process.join()
    lines = out.read_text().splitlines()
    assert process.exitcode == 0, f"ended at {lines[-1] if lines else 'the start'}:\n{errors.read_text()}"
    outcomes = [json.loads(line) for line in lines if not line.startswith("#")]
    assert outcomes
    for subject, outcome, right in outcomes:
        if right:
            assert outcome == "right", f"{subject}: {outcome}"
        else:
            # a layer's view of x may have shed what was odd about it
            clear = "|".join((CLEAR, TORCHS[name])) if name in TORCHS else CLEAR
            assert outcome == "right" or re.match(clear, outcome, re.DOTALL), f"{subject}: {outcome}"
