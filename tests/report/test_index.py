"""Another configuration under the same name replaces no report: each is kept, and an index tells them apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cpift.disk.top_files import REPORTS, is_ours
from cpift.errors import ConfigError
from cpift.report.html import document
from cpift.report.index import SWEEP, write_page
from cpift.report.page import page
from cpift.report.write import write_run
from tests.helpers.reports import made_up_run

CONFIG = "name: x\nregions:\n  p: {p}\nfusion:\n  omega: {omega}\n"


@pytest.mark.slow
def test_every_configuration_keeps_its_report(tmp_path: Path) -> None:
    data = made_up_run()
    configs = [CONFIG.format(p=p, omega=omega) for p, omega in ((0.01, "uniform"), (0.05, "uniform"), (0.05, 0.5))]
    for config in configs:
        top = write_run(replace(data, config_yaml=config), tmp_path)
    kept = sorted((tmp_path / REPORTS).iterdir())
    assert len(kept) == 3
    assert all(map(is_ours, [*kept, tmp_path / "index.html"]))
    assert "omega: 0.5" in top.read_text(encoding="utf-8")
    index = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert all(f'href="{REPORTS}/{file.name}"' in index for file in kept)
    assert "fusion.omega uniform (0.5)" in index
    assert "regions.p 0.01 (0.05); fusion.omega uniform (0.5)" in index
    before = {file: file.stat().st_mtime_ns for file in kept}
    write_run(replace(data, config_yaml=configs[0]), tmp_path)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / REPORTS).iterdir()} == before
    assert "regions.p 0.05 (0.01)" in (tmp_path / "index.html").read_text(encoding="utf-8"), "the newest is another"


@pytest.mark.slow
def test_a_report_from_before_is_kept_when_another_replaces_it(tmp_path: Path) -> None:
    data = made_up_run()
    old = replace(data, config_yaml=CONFIG.format(p=0.01, omega="uniform"))
    (tmp_path / "report.html").write_text(page(old), encoding="utf-8")  # no mark, no index
    write_run(replace(data, config_yaml=CONFIG.format(p=0.2, omega="uniform")), tmp_path)
    assert sorted("p: 0.01" in file.read_text() for file in (tmp_path / REPORTS).iterdir()) == [False, True]


@pytest.mark.slow
def test_nobodys_own_file_is_replaced(tmp_path: Path) -> None:
    data = made_up_run()
    write_run(data, tmp_path)
    (kept,) = (tmp_path / REPORTS).iterdir()
    kept.write_text("mine")
    write_run(data, tmp_path)
    assert kept.read_text() == "mine"
    assert len(list((tmp_path / REPORTS).iterdir())) == 2
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(ConfigError, match=r"report\.html"):
        write_run(data, tmp_path)
    assert (tmp_path / "report.html").read_text() == "mine"


def test_sweeps_are_kept_too(tmp_path: Path) -> None:
    for p in ("0.1", "0.2"):
        body = {"sweep": ("Sweep", f"<pre><code>space:\n  regions.p: [{p}]</code></pre>")}
        write_page(tmp_path, SWEEP, document("s", "CPI-FT sweep", "CPI-FT sweep", "", body), {})
    assert len(list((tmp_path / REPORTS).glob("sweep-*.html"))) == 2
    assert "space.regions.p.0 0.1 (0.2)" in (tmp_path / "index.html").read_text()
