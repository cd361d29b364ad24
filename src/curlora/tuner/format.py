"""The format of a saved adapter: names of its entries, its version, and digests that reveal damage.

A weights file has three entries for each adapted layer: ``<layer>.curlora_U.weight``, ``.indices`` and
``.fingerprint``. Its metadata holds the version and a SHA-256 digest of all tensors in the file. The configuration
holds a digest of the options that determine what the tensors mean. Files of version 1 have the entries
``<layer>.curlora_U``, ``.curlora_indices`` and ``.curlora_fingerprint``, and no digests.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from curlora.tuner.fingerprint import LENGTH

__all__ = [
    "ENTRIES",
    "check_file",
    "digest_of_options",
    "is_adapter",
    "present_name",
    "saved_U",
    "saved_indices",
    "seal",
]

VERSION = 2
ENTRIES = ("weight", "indices", "fingerprint")

_VERSION_1 = {
    ".curlora_U": ".curlora_U.weight",
    ".curlora_indices": ".curlora_U.indices",
    ".curlora_fingerprint": ".curlora_U.fingerprint",
}
_PREFIX = "base_model.model."  # prefix of every name that PEFT saves
_COPIED_AT_ONCE = 1 << 20


def present_name(key: str) -> str:
    """Return an entry's name in the current version of the format, from its name in either version."""
    return next((key.removesuffix(old) + new for old, new in _VERSION_1.items() if key.endswith(old)), key)


def is_adapter(path: Path) -> bool:
    """Return whether a file holds the weights of a CURLoRA adapter, of any version."""
    try:
        with safe_open(path, framework="pt") as file:
            return any(".curlora_U." in present_name(key) for key in file.keys())  # noqa: SIM118  not a mapping
    except (OSError, SafetensorError):
        return False


def seal(path: Path) -> None:
    """Write the version and the tensors' digest into a safetensors file. The file is replaced atomically."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        metadata = header.get("__metadata__", {})
        header["__metadata__"] = {**metadata, "curlora_format": str(VERSION), "curlora_digest": _digest(path)}
        written = json.dumps(header, separators=(",", ":")).encode()
        written += b" " * (-len(written) % 8)  # tensors begin at multiples of 8
        temporary = path.with_name(path.name + ".part")
        with open(temporary, "wb") as target:
            target.write(len(written).to_bytes(8, "little") + written)
            shutil.copyfileobj(file, target, _COPIED_AT_ONCE)
    os.replace(temporary, path)


def check_file(path: Path) -> bool:
    """Check a weights file and return whether it has a digest. If it has one, its configuration must have one too.

    Raises:
        ValueError: if the file cannot be read, has a newer format, or does not match its digest.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        version, expected = metadata.get("curlora_format", "1"), metadata.get("curlora_digest")
        if not version.isdigit() or int(version) > VERSION:
            raise ValueError(
                f"The adapter file {path} has format {version!r}, and this curlora reads up to {VERSION}: update "
                "curlora to load it."
            )
        found = _digest(path) if expected is not None else None
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"The adapter file {path} cannot be read ({error}). It is incomplete or damaged: copy or "
            "download it again, or save the adapter anew."
        ) from error
    if expected != found:
        raise ValueError(
            f"The adapter file {path} is damaged: its tensors are not those that were saved (their digest differs). "
            "Copy or download it again, or save the adapter anew."
        )
    return expected is not None


def saved_indices(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return ``(indices, fingerprint)`` of each layer in a weights file, by the layer's name in the base model."""
    return {
        layer: (entries["indices"], fingerprint)
        for layer, entries in _saved(path, "indices", "fingerprint").items()
        if (fingerprint := entries["fingerprint"]).shape == (LENGTH,) and fingerprint.dtype == torch.int32
    }


def saved_U(path: Path) -> dict[str, Tensor]:
    """Return ``U`` of each layer in a weights file, by the layer's name in the base model."""
    return {layer: entries["weight"] for layer, entries in _saved(path, "weight").items()}


def _saved(path: Path, *wanted: str) -> dict[str, dict[str, Tensor]]:
    """Return these entries of each layer that has all of them; nothing if the file was removed or replaced."""
    found: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  not a mapping
                layer, _, entry = present_name(key).partition(".curlora_U.")
                if entry in wanted:
                    found.setdefault(layer.removeprefix(_PREFIX), {})[entry] = file.get_tensor(key)
    except (OSError, SafetensorError):
        return {}
    return {layer: entries for layer, entries in found.items() if len(entries) == len(wanted)}


def digest_of_options(options: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the options that determine what an adapter's tensors mean.

    The digest is the same before saving and after loading. JSON turns sets and tuples into lists, so all three are
    sorted; values that JSON cannot hold are hashed as strings.

    Args:
        options: options of the configuration, by name.
    """
    plain = {key: sorted(value) if isinstance(value, (set, list, tuple)) else value for key, value in options.items()}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()


def _digest(path: Path) -> str:
    """Return the SHA-256 of the names, dtypes, shapes and bytes of a safetensors file's tensors, sorted by name."""
    digest = hashlib.sha256()
    with safe_open(path, framework="pt") as file:
        for key in sorted(file.keys()):
            tensor = file.get_tensor(key).contiguous()
            digest.update(json.dumps([key, str(tensor.dtype), list(tensor.shape)]).encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
