"""The documentation: its code runs, and every public name is in the reference."""

import re

import pytest
from process import ROOT

import divnorm_kernels
from divnorm_kernels import weights

PAGES = ROOT / "docs"
SECTIONS = re.split(r"^## ", (PAGES / "recipes.md").read_text(), flags=re.MULTILINE)[1:]


def code(text):
    return "\n".join(re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.partition("\n")[0])
def test_recipes_run(section, capsys):
    source = code(section)
    assert source
    exec(compile(source, "recipes.md", "exec"), {"__name__": "recipe"})


@pytest.mark.parametrize("page", ["index.md", "kalman.md", "weights.md"])
def test_pages_run(page, capsys):
    exec(compile(code((PAGES / page).read_text()), page, "exec"), {"__name__": "page"})


def test_every_public_name_has_its_place():
    documented = "\n".join(page.read_text() for page in (PAGES / "api").glob("*.rst"))
    for name in {*divnorm_kernels.__all__, *weights.__all__} - {"__version__"}:
        assert re.search(rf"^\.\. auto(class|function):: {name}$", documented, flags=re.MULTILINE), name
