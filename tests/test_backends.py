"""Which backend serves a call, what `python -m divnorm_kernels` says, and life without the compiled module."""

import ast

import pytest
import torch
from process import ROOT, run_python

from divnorm_kernels import __version__, divisive_norm
from divnorm_kernels.backends import KERNELS, availability, cpu, native, preference
from divnorm_kernels.fields import geometry
from divnorm_kernels.norm import Norm


def test_command_line_report():
    report = run_python("-m", "divnorm_kernels")
    assert f"divnorm_kernels {__version__}, torch {torch.__version__}" in report
    for name, reason in availability().items():
        assert f"backend {name}: {'available' if reason is None else 'missing: ' + reason}" in report
    assert f"instruction set: {cpu.instruction_set()}" in report
    assert "threads: " in report


def test_instruction_set_by_environment():
    for name in cpu.instruction_sets():
        assert f"instruction set: {name}" in run_python("-m", "divnorm_kernels", DIVNORM_INSTRUCTION_SET=name)


def test_unknown_instruction_set():
    with pytest.raises(ValueError, match=f"instruction set: got 'mmx', expected one of .*{cpu.instruction_sets()[-1]}"):
        cpu.use_instruction_set("mmx")


def test_a_plan_holds_nothing_that_grows_with_the_extents():
    """One number a position would be more than an address space."""
    shape = (1, 1, 1 << 50)
    g = geometry(Norm(5, 7), shape)
    assert native.module.CpuCalls(g, native.DTYPES[torch.float32], False, False) is not None


ANOTHER_DEFAULT_DEVICE = """
import torch
from divnorm_kernels.backends import cpu
from divnorm_kernels.fields import geometry
from divnorm_kernels.norm import Norm
for window in (3, "all"):
    for shape in ((2, 4, 5, 5), (0, 4, 5, 5)):
        g = geometry(Norm(window), shape)
        x = torch.randn(shape)
        with torch.device("meta"):
            y, maps, l1 = cpu.forward(g, x, None, None, 1.0, True)
            dx, *_ = cpu.backward(g, y, l1, x, maps, None, None, 1.0, (True, *(False,) * 5))
        print(*(t.device for t in (y, maps, l1, dx)))
"""


def test_results_are_where_x_is_whatever_the_default_device():
    """In a process of its own: what an address of the meta device leads to is a crash."""
    assert run_python("-c", ANOTHER_DEFAULT_DEVICE).split() == ["cpu"] * 16


def test_every_other_device_is_left_to_the_reference():
    y = divisive_norm(torch.empty(2, 4, 5, 5, device="meta"), window=3)
    assert y.shape == (2, 4, 5, 5)
    assert y.device.type == "meta"


WITHOUT_NATIVE = """
import sys, warnings
sys.modules["divnorm_kernels._native"] = None  # an import of it fails
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, divnorm_kernels
    from divnorm_kernels.backends import availability
assert any("slow reference (not built: " in str(w.message) for w in caught), caught
assert availability()["cpu"].startswith("not built: ")
x = torch.randn(2, 4, 5, 5, requires_grad=True)
layer = divnorm_kernels.DivisiveNorm2d(4, 3)
layer(x).sum().backward()
assert x.grad.isfinite().all()
try:
    divnorm_kernels.divisive_norm(x, window=3, backend="cpu")
except RuntimeError as error:
    print(error)
"""


def test_without_the_compiled_module_the_reference_serves_and_says_so():
    message = run_python("-c", WITHOUT_NATIVE)
    assert message.startswith("backend: got 'cpu', which cannot serve this call: not built: ")


def test_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, divnorm_kernels\n"
        "from divnorm_kernels.backends import availability\n"
        "divnorm_kernels.divisive_norm(torch.randn(2, 4, 5, 5), window=3)\n"
        "print(availability()['triton'])"
    )
    assert run_python("-c", code).strip() == "the package triton is not installed"


def test_triton_is_not_imported_before_its_first_call():
    code = (
        "import sys, torch, divnorm_kernels\n"
        "divnorm_kernels.divisive_norm(torch.randn(2, 4, 5, 5), window=3)\n"
        "print('triton' in sys.modules)"
    )
    assert run_python("-c", code).strip() == "False"


def test_importing_touches_no_accelerator():
    code = "import torch, divnorm_kernels; print(torch.cuda.is_initialized())"
    assert run_python("-c", code).strip() == "False"


def test_order_on_a_gpu_follows_the_table(monkeypatch):
    monkeypatch.setattr(preference, "ROWS", [{**row} for row in preference.ROWS])
    preference._order.cache_clear()
    assert preference._order("sm_90", 2, "windows") == ("cuda", "triton")
    assert preference._order("sm_90", 2, "whole") == ("triton", "cuda")
    measured = {"arch": "sm_90", "bytes": 2, "fields": "windows", "order": ["triton", "cuda"], "measured": True}
    preference.ROWS.insert(0, measured)
    preference._order.cache_clear()
    assert preference._order("sm_90", 2, "windows") == ("triton", "cuda")
    assert preference._order("sm_90", 4, "windows") == preference._order("sm_80", 2, "windows") == ("cuda", "triton")
    preference._order.cache_clear()


def test_tables_name_backends_and_rows_for_every_gpu():
    for row in preference.ROWS:
        assert set(row["order"]) <= set(KERNELS)
    for fields in ("whole", "windows"):
        assert preference._order("sm_123", 8, fields)


def test_the_stub_names_what_the_compiled_module_has():
    classes, others = {}, set()
    for entry in ast.parse((ROOT / "divnorm_kernels" / "_native.pyi").read_text()).body:
        if isinstance(entry, ast.ClassDef):
            classes[entry.name] = {m.name for m in entry.body if isinstance(m, ast.FunctionDef)} - {
                "__init__",
                "__call__",
            }
        elif isinstance(entry, ast.FunctionDef):
            others.add(entry.name)
        elif isinstance(entry, ast.AnnAssign):
            others.add(entry.target.id)
    module = native.module
    of_cuda = {name for name in (*classes, *others) if name.lower().startswith("cuda")}
    absent = {"without_cuda"} if hasattr(module, "CudaCalls") else of_cuda
    assert public(module) | {"__version__"} == (classes.keys() | others) - absent
    for name in classes.keys() - absent:
        assert public(getattr(module, name)) == classes[name]


def public(thing):
    return {name for name in vars(thing) if not name.startswith("_")}
