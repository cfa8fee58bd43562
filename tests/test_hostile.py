"""Any tensor a caller can hand in gives the right values or an error that names the argument; none ends the process."""

import json
import re
import subprocess
import sys

import pytest
from hostile import KINDS
from process import ROOT

CLEAR = re.compile(
    r"(Type|Value)Error: (x|dy|weight|bias|sigma|groups): got "
    # torch's own words, where a layer needs a view of x before the operator sees it, and in the reference's nodes
    r"|RuntimeError: setStorage: .* are out of bounds for storage of size"
    r"|RuntimeError: Either your tensor may have escaped from inside a function being vmapped"
    r"|RuntimeError: .* got mixed torch.Tensor and DTensor"
    r"|NotImplementedError: Operator aten.unfold.default does not have a sharding strategy registered"
    r"|RuntimeError: .* mutating a non-functional tensor with a functional tensor is not allowed"
    r"|NotImplementedError: Could not run 'aten::view' with arguments from the 'SparseCPU' backend"
    r"|RuntimeError: reshape is not implemented for sparse tensors",
    re.DOTALL,
)
"""An error that names the argument."""


@pytest.mark.parametrize("name", KINDS)
def test_kind(name):
    """Every layer and form, forward and backward, in a process of its own."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "hostile.py", name], cwd=ROOT, capture_output=True, text=True, check=False
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"ended at {lines[-1] if lines else 'the start'}:\n{done.stderr}"
    outcomes = [json.loads(line) for line in lines if not line.startswith("#")]
    assert outcomes
    for subject, outcome, right in outcomes:
        if right:
            assert outcome == "right", f"{subject}: {outcome}"
        else:
            # a layer's view of x may have shed what was odd about it
            assert outcome == "right" or CLEAR.match(outcome), f"{subject}: {outcome}"
