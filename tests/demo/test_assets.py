"""Fetching, with the real pip on a folder of packages instead of the index."""

import errno
import hashlib
import os
import shutil
import tarfile
import zipfile

import pytest

from curlora.cache import cache_directory
from curlora.demo import assets
from curlora.demo.assets import AssetError, Package, fetch

FILE = "tiny_asset/data.txt"


@pytest.fixture
def wheelhouse(tmp_path, monkeypatch):
    """A folder with one wheel, which pip uses as its only index."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tiny_asset-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(FILE, "hello")
        archive.writestr("tiny_asset/unwanted.txt", "no")
        archive.writestr("tiny_asset-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-asset\nVersion: 1.0\n")
        tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr("tiny_asset-1.0.dist-info/WHEEL", tags)
        archive.writestr("tiny_asset-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def package(wheelhouse):
    digest = hashlib.sha256((wheelhouse / "tiny_asset-1.0-py3-none-any.whl").read_bytes()).hexdigest()
    return Package("tiny-asset", "1.0", digest, (FILE,), megabytes=1)


def test_downloads_keeps_what_is_wanted_and_uses_it_again(package, wheelhouse, tmp_path):
    cache = tmp_path / "cache"
    folder = fetch(package, cache)
    assert (folder / FILE).read_text() == "hello"
    assert [p.name for p in cache.iterdir()] == ["tiny-asset-1.0"]
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == [FILE]
    shutil.rmtree(wheelhouse)  # a second download would fail
    assert fetch(package, cache) == folder


def test_a_corrupt_download_is_refused_and_not_kept(package, tmp_path):
    wrong = Package(package.name, package.version, "0" * 64, package.files, 1)
    with pytest.raises(AssetError, match=f"corrupt.*SHA-256 is {package.sha256}, expected 000.*not kept; try again"):
        fetch(wrong, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_source_archive_runs_nothing_before_its_hash_is_checked(wheelhouse, tmp_path):
    marker = tmp_path / "ran"
    setup = f"open({str(marker)!r}, 'w')\nfrom setuptools import setup\nsetup(name='tiny-source', version='1.0')\n"
    (tmp_path / "setup.py").write_text(setup)
    with tarfile.open(wheelhouse / "tiny-source-1.0.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "setup.py", "tiny-source-1.0/setup.py")
    other = Package("tiny-source", "1.0", "0" * 64, (FILE,), 1, source=True)
    with pytest.raises(AssetError, match="corrupt"):
        fetch(other, tmp_path / "cache")
    assert not marker.exists()


def test_a_failed_download_says_what_pip_said(wheelhouse, tmp_path):
    missing = Package("tiny-asset", "2.0", "0" * 64, (FILE,), 1)
    with pytest.raises(
        AssetError, match=r"tiny-asset==2\.0 could not be downloaded.*No matching distribution"
    ) as error:
        fetch(missing, tmp_path / "cache")
    assert "pip install --no-deps tiny-asset==2.0" in str(error.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_files_of_a_source_archive_are_taken_out(tmp_path):
    content = tmp_path / "content"
    content.write_text("hello")
    with tarfile.open(tmp_path / "tiny-1.0.tar.gz", "w:gz") as archive:
        archive.add(content, "tiny-1.0/data/hello.txt")
        archive.add(content, "tiny-1.0/other.txt")
    package = Package("tiny", "1.0", "", ("tiny-1.0/data/hello.txt",), 1, source=True)
    assets._extract(package, tmp_path / "tiny-1.0.tar.gz", tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").rglob("*") if p.is_file()] == ["hello.txt"]
    assert (tmp_path / "out/tiny-1.0/data/hello.txt").read_text() == "hello"


def test_too_little_space_is_seen_before_downloading(package, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 500_000))
    with pytest.raises(AssetError, match="needs about 1 MB in .*cache, but only 0 MB are free.*CURLORA_CACHE_DIR"):
        fetch(package, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing(package, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(assets, "_extract", full)
    with pytest.raises(AssetError, match="the disk is full.*CURLORA_CACHE_DIR"):
        fetch(package, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_ctrl_c_leaves_nothing(package, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(assets, "_extract", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch(package, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_is_a_file_is_named(package, tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(OSError, match="cache"):
        fetch(package, tmp_path / "cache")


def test_an_installed_package_is_used_as_it_is(package, tmp_path, monkeypatch):
    site = tmp_path / "site"
    with zipfile.ZipFile(tmp_path / "wheels" / "tiny_asset-1.0-py3-none-any.whl") as archive:
        archive.extractall(site)
    monkeypatch.syspath_prepend(str(site))
    cache = tmp_path / "cache"
    assert (fetch(package, cache) / FILE).read_text() == "hello"
    assert not cache.exists()


def test_another_installed_version_is_not_used(package, tmp_path, monkeypatch):
    site = tmp_path / "site"
    (site / "tiny_asset-0.9.dist-info").mkdir(parents=True)
    (site / "tiny_asset-0.9.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: tiny-asset\nVersion: 0.9\n"
    )
    monkeypatch.syspath_prepend(str(site))
    assert fetch(package, tmp_path / "cache") == tmp_path / "cache" / "tiny-asset-1.0"


def test_the_cache_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("CURLORA_CACHE_DIR", str(tmp_path))
    assert cache_directory() == tmp_path
    monkeypatch.delenv("CURLORA_CACHE_DIR")
    assert cache_directory().name == "curlora"
