"""The documentation: its code runs, and every public name is in the reference."""

import re

import pytest
from process import ROOT

import divnorm_kernels

PAGES = ROOT / "docs"
SECTIONS = re.split(r"^## ", (PAGES / "recipes.md").read_text(), flags=re.MULTILINE)[1:]


def code(text):
    return "\n".join(re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.partition("\n")[0])
def test_recipes_run(section, capsys):
    source = code(section)
    assert source
    exec(compile(source, "recipes.md", "exec"), {"__name__": "recipe"})


def test_overview_runs():
    exec(compile(code((PAGES / "index.md").read_text()), "index.md", "exec"), {})


def test_every_public_name_has_its_place():
    documented = "\n".join(page.read_text() for page in (PAGES / "api").glob("*.rst"))
    for name in set(divnorm_kernels.__all__) - {"__version__"}:
        assert re.search(rf"^\.\. auto(class|function):: {name}$", documented, flags=re.MULTILINE), name
