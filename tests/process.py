"""Other processes, as users start them, and modules built apart from the package."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(*command, cwd=ROOT, **environment):
    """Runs a command with additions to the environment; a failure raises with all the command printed."""
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def run_python(*arguments, cwd=ROOT, **environment):
    """What this interpreter prints to its standard output."""
    return run(sys.executable, *arguments, cwd=cwd, **environment).stdout


def load(name, folder):
    """The extension module of this name, built in a folder; ``import`` finds it from here on."""
    (built,) = folder.glob(f"{name.rpartition('.')[-1]}.*.so")
    spec = importlib.util.spec_from_file_location(name, built)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
