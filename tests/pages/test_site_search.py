"""The search of the documentation, where its pages are opened from disk and no server answers."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
QUERY = "return [...document.querySelectorAll('.md-search-result__link')].map(one => one.href)"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Two pages as the site's own settings build them: the whole would run every tutorial."""
    pytest.importorskip("material", reason="needs mkdocs-material (extra docs)")
    yaml = pytest.importorskip("yaml")
    folder = tmp_path_factory.mktemp("site")
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    settings["hooks"] = [str(ROOT / one) for one in settings["hooks"]]
    settings["nav"] = ["index.md", {"Deeper": ["below/other.md"]}]
    (folder / "mkdocs.yml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    docs = folder / "docs"
    (docs / "below").mkdir(parents=True)
    for name in (*settings["extra_css"], *settings["extra"]["polyfills"]):
        shutil.copy(ROOT / "docs" / name, docs / name)
    (docs / "index.md").write_text("# Start\n\nNothing is said here.\n", encoding="utf-8")
    (docs / "below" / "other.md").write_text("# Other\n\nThe quokka is here.\n", encoding="utf-8")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / settings["site_dir"]


@pytest.mark.parametrize("page", ["index.html", "below/other.html"])
def test_search_of_pages_opened_from_disk_finds_them_without_a_network(browser, site, page):
    driver = browser.driver
    driver.set_window_size(1300, 900)
    driver.get("about:blank")
    browser.complaints()
    browser.requests()
    driver.get(f"file://{site / page}")
    field = driver.find_element("css selector", "input.md-search__input")
    field.click()
    field.send_keys("quokka")
    browser.wait("document.querySelector('.md-search-result__link')")
    (found,) = {address.split("?")[0] for address in browser.run(QUERY)}
    assert found == f"file://{site / 'below' / 'other.html'}"
    assert browser.complaints() == []
    assert browser.requests() == []
