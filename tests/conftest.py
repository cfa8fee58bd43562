"""What every test shares: seeds, poisoned memory and hypothesis profiles."""

import importlib.util
import os

# Read when torch loads OpenMP. Tests run in several processes, whose threads would spin for each other's processors.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from hypothesis import HealthCheck, settings
from processor import once_more_if_it_erred, watched
from torchvisions import define_operators

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the Triton backend is imported
    if importlib.util.find_spec("triton"):
        import interpreter

        interpreter.quicken()

settings.register_profile(
    "default",
    max_examples=1000,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("ci", settings.get_profile("default"), max_examples=50)
settings.register_profile("quick", settings.get_profile("default"), max_examples=50)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

torch.set_num_threads(2)
define_operators()

LONGEST = ("test_install.py", "test_triton_compile.py", "test_cuda_costs.py", "test_tuning.py", "test_cuda_sources.py")


def pytest_collection_modifyitems(items):
    """What takes longest comes first: of several processes none is left with it at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_configure(config):
    """Watches the processor, once for all processes of a run."""
    if not hasattr(config, "workerinput"):
        watch = watched()
        watch.__enter__()
        config.add_cleanup(lambda: watch.__exit__(None, None, None))


@pytest.fixture(autouse=True)
def _seeded_and_poisoned():
    """Fixed random numbers; and fresh memory holds NaN, so that an element a kernel forgot is found."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # several processes share a GPU's memory, and each keeps what it has had


@pytest.fixture
def torchs_defaults(_seeded_and_poisoned):
    """Torch as users have it, for what is not about kernels."""
    torch.use_deterministic_algorithms(False)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """A test's call, and once more where the processor erred."""
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    once_more_if_it_erred(lambda: pyfuncitem.obj(**arguments))
    return True
