"""The documentation: its code and commands run, its links lead somewhere, and every public name is in the reference."""

import doctest
import importlib
import pkgutil
import re
import shlex

import pytest
import torch
from process import ROOT
from torch import nn
from typer.testing import CliRunner

import divnorm_kernels
from bench.cli import app as bench
from bench.pictures.__main__ import app as pictures
from divnorm_kernels import weights

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
ALONE = ("converting.md", "recipes.md", "training.md")
"""Pages that say that each of their sections runs by itself."""


def blocks(kind, text):
    return re.findall(rf"^```{kind}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def programs():
    """The Python of the pages, as (name, source): of a page from its first line to its last, or of a section."""
    for page in PAGES:
        parts = [page.read_text()]
        if page.name in ALONE:
            parts = re.split(r"^## ", parts[0], flags=re.MULTILINE)[1:]
        for part in parts:
            source = "\n".join(blocks("python", part))
            if source:
                yield page.name if page.name not in ALONE else f"{page.name}: {part.partition(chr(10))[0]}", source


@pytest.mark.parametrize(("name", "source"), [pytest.param(*one, id=one[0]) for one in programs()])
def test_its_code_runs(name, source, capsys):
    exec(compile(source, name, "exec"), {"__name__": "page"})


def documented():
    modules = pkgutil.walk_packages(divnorm_kernels.__path__, "divnorm_kernels.")
    names = [m.name for m in modules if "triton" not in m.name and not m.name.endswith(("_native", "__main__"))]
    for name in names:
        yield from (test for test in doctest.DocTestFinder().find(importlib.import_module(name)) if test.examples)


@pytest.mark.parametrize("example", [pytest.param(test, id=test.name) for test in documented()])
def test_examples_of_docstrings_run(example):
    known = {name: getattr(module, name) for module in (divnorm_kernels, weights) for name in module.__all__}
    model = nn.Sequential(nn.Conv2d(3, 8, 3), divnorm_kernels.DivisiveNorm2d(8))
    example.globs = {"torch": torch, "nn": nn, "model": model, **known}
    report = []
    result = doctest.DocTestRunner().run(example, out=report.append, clear_globs=False)
    assert result.failed == 0, "".join(report)


def test_the_reference_reads_docstrings_as_they_are_meant():
    """A letter and a period alone make a list; what stands before a colon in a property or in Returns is a type."""
    for module in (divnorm_kernels, weights):
        for name in set(module.__all__) - {"__version__"}:
            public = getattr(module, name)
            assert not re.search(r"^\s+[\w, ]+: [A-Z]\.$", public.__doc__, flags=re.MULTILINE), name
            assert not re.search(r"(Returns|Yields):\n[^`\n]*:", public.__doc__), name
            for member, value in vars(public).items() if isinstance(public, type) else ():
                if isinstance(value, property) and value.__doc__ and not member.startswith("_"):
                    assert ":" not in re.sub("`.*?`", "", value.__doc__.partition("\n")[0]), (name, member)


def commands():
    for page in PAGES:
        for block in blocks("", page.read_text()):
            yield from (line for line in block.splitlines() if line.startswith("python -m bench"))


@pytest.mark.parametrize("line", sorted(set(commands())))
def test_commands_are_understood(line):
    """As far as the names of options: what they do is tested where it is."""
    _, _, module, *words = shlex.split(line, comments=True)
    result = CliRunner().invoke({"bench": bench, "bench.pictures": pictures}[module], [*words, "--help"])
    assert result.exit_code == 0, result.output


def test_targets_of_make_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    asked = {name for page in PAGES for name in re.findall(r"`?\bmake ([a-z]+(?:-[a-z]+)*)`", page.read_text())}
    assert {"bench", "test", "docs"} <= asked <= targets


def slug(heading):
    """The anchor that GitHub and MyST give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def links():
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if not re.match(r"https?:", target):
                yield page, target


@pytest.mark.parametrize(("page", "target"), [pytest.param(*one, id=f"{one[0].name}: {one[1]}") for one in links()])
def test_links_lead_somewhere(page, target):
    path, _, anchor = target.partition("#")
    there = page.parent / path if path else page
    assert there.exists()
    if anchor:
        assert anchor in map(slug, re.findall(r"^#+ (.*)$", there.read_text(), flags=re.MULTILINE))


def tables():
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for number, table in enumerate(re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE), 1):
            yield pytest.param(table, id=f"{page.name}: {number}")


@pytest.mark.parametrize("table", list(tables()))
def test_rows_of_tables_have_its_columns(table):
    """A bar ends a cell, in a formula or between backticks too, and what is behind the last column is not shown."""
    rows = [len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()]
    assert rows == rows[:1] * len(rows)


def test_every_public_name_has_its_place():
    reference = "\n".join(page.read_text() for page in (ROOT / "docs/api").glob("*.rst"))
    for name in {*divnorm_kernels.__all__, *weights.__all__} - {"__version__"}:
        assert re.search(rf"^\.\. auto(class|function):: {name}$", reference, flags=re.MULTILINE), name
