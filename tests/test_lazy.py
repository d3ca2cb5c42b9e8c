"""Every package's `__init__` is its page: what it hands out is there, and its example does what it says."""

from __future__ import annotations

import doctest
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from cpift.lazy import homes

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for path in (ROOT / "cpift").rglob("__init__.py") if "handed_out(__name__)" in path.read_text())
NAMES = [".".join(path.parent.relative_to(ROOT).parts) for path in PAGES]


@pytest.mark.parametrize("package", NAMES)
def test_what_a_package_hands_out_is_there(package: str) -> None:
    page = import_module(package)
    folder = Path(str(page.__file__)).parent
    assert homes(package)
    for name, home in homes(package).items():
        assert getattr(page, name) is getattr(import_module(home), name)
        assert not (folder / f"{name}.py").exists(), f"{name} is a module of it too: which one is meant?"
    assert set(homes(package)) <= set(dir(page))
    with pytest.raises(AttributeError, match="has no attribute 'nothing_here'"):
        page.nothing_here  # noqa: B018


@pytest.mark.parametrize("package", NAMES)
def test_the_example_of_a_page_does_what_it_says(package: str) -> None:
    (found,) = doctest.DocTestFinder(recurse=False).find(import_module(package), package)
    assert found.examples, "a page has an example"
    said: list[str] = []
    result = doctest.DocTestRunner().run(found, out=said.append)
    assert not result.failed, "".join(said)


def test_pages_cost_nothing_until_a_name_is_asked_for() -> None:
    code = f"import sys, {', '.join(NAMES)}; print([one for one in sys.modules if one.startswith('cpift')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert set(eval(done.stdout)) == {"cpift", "cpift.lazy", *NAMES, *(name.rpartition(".")[0] for name in NAMES)}
