"""The site is built, strictly, and nothing on it leads nowhere or to another host for what it needs."""

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("mkdocs", reason="the site is built by mkdocs: pip install 'curlora[docs]'")
pytest.importorskip("material", reason="the site's theme is mkdocs-material: pip install 'curlora[docs]'")
pytest.importorskip("mkdocstrings", reason="its reference is mkdocstrings': pip install 'curlora[docs]'")

ROOT = Path(__file__).parent.parent


class Page(HTMLParser):
    """A page's anchors, what it links to and what it loads."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loads = set(), [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        elif tag == "link" and given.get("href") and given.get("rel") != "canonical":
            self.loads.append(given["href"])
        elif tag in ("img", "script", "iframe") and given.get("src"):
            self.loads.append(given["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    # No proxy answers there: what asks the network fails.
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT, env={**os.environ, **nowhere}, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in site.rglob("*.html")}


def test_every_page_of_the_documentation_is_there(site, pages):
    for page in (ROOT / "docs").rglob("*.md"):
        assert site / page.relative_to(ROOT / "docs").with_suffix(".html") in pages


def test_links_lead_somewhere(pages):
    checked = 0
    for path, page in pages.items():
        if path.name == "404.html":  # served at any depth, so that its links begin at the root of a host
            continue
        for link in (*page.links, *page.loads):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.is_file(), (path.name, link)
            if parts.fragment and not parts.fragment.startswith("__"):  # the theme's own
                assert unquote(parts.fragment) in pages[target].ids, (path.name, link)
            checked += 1
    assert checked > 1000


def test_nothing_is_loaded_from_another_host(pages):
    for path, page in pages.items():
        for address in page.loads:
            assert not urlsplit(address).netloc, (path.name, address)


def test_every_public_name_is_in_the_reference(pages):
    import curlora
    import curlora.budget
    import curlora.callbacks
    import curlora.continual
    import curlora.guard
    import curlora.train

    ids = set().union(*(page.ids for page in pages.values()))
    for package in (curlora, curlora.budget, curlora.callbacks, curlora.continual, curlora.guard, curlora.train):
        for name in package.__all__:
            thing = getattr(package, name)
            if name != "__version__":
                where = {f"{package.__name__}.{name}", f"curlora.{name}", f"{thing.__module__}.{name}"}
                assert where & ids, (package.__name__, name)


def test_roles_of_docstrings_became_links(pages):
    for path in pages:
        if path.parent.name == "reference":
            assert ":class:`" not in path.read_text(encoding="utf-8"), path.name
            assert ":func:`" not in path.read_text(encoding="utf-8"), path.name
