"""A guest whose balloon tells which pages are free is moved with fewer pages, and every byte is right."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmferry.testing.hosts import QEMUS, Guests, MakePair

pytestmark = pytest.mark.real

HINTING = "[balloon]\n"
SILENT = "[balloon]\nfree_page_hint = false\n"
CRAWL = "256K"
LOOKS = 8
"""So often the agent looks at a migration that crawls, every half second: the guest tells meanwhile what is free."""


def full_pages(make_pair: MakePair, version: str, spec: str) -> int:
    """Moves a Linux guest, has it check all of its memory and disk there, and says how many pages were sent whole."""
    pair = make_pair(version)
    pair.a.ok("run", spec)
    with pair.a.console("web1") as console:
        console.wait_ready(timeout_s=60)
        console.wait_walks(1, timeout_s=60)
    here = pair.a.vm_directory("web1")
    with pair.a.follow() as news:
        pair.a.ok("migrate", "web1", "host-b", "--mode", "precopy", "--detach", "--set", f"max-bandwidth={CRAWL}")
        for _ in range(LOOKS):
            news.heard.clear()
            news.until(lambda e: e.name == "JOB_PROGRESS")
        pair.a.ok("set", "web1", "max-bandwidth=1G")
        wire = news.end()
    with pair.b.console("web1") as console:
        console.wait_walks(2, timeout_s=60)
        console.wait_walks(2, timeout_s=60, region="disk")
    report = pair.judge(here, pair.b.vm_directory("web1"))
    assert report.complaints() == []
    pair.b.ok("stop", "web1", "--force")
    return int(wire["normal_pages"])


@pytest.mark.parametrize("version", QEMUS)
@pytest.mark.proves("S111")
def test_free_pages_are_not_sent_and_the_memory_is_right(version: str, make_pair: MakePair, tmp_path: Path) -> None:
    pages = {}
    for name, balloon in (("silent", SILENT), ("hinting", HINTING)):
        (tmp_path / name).mkdir()
        # The same pages in use after each boot, so that the two numbers may be compared.
        spec = Guests(tmp_path / name).linux(more=balloon, fixed_layout=True)
        pages[name] = full_pages(make_pair, version, spec)
    # What the kernel used at its start and gave back since: seen 18,400 instead of 21,100 pages;
    # two boots differ by 1 %.
    assert pages["hinting"] < 0.95 * pages["silent"], pages
