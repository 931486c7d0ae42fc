"""What a JSON report is sealed with: a digest of its contents, and the fingerprint of the code that wrote it."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

_PACKAGES = ("d2l", "checks")


def digest(document: Mapping[str, Any]) -> str:
    """Return the sha256 of a JSON report without its own digest: an edited report has another one."""
    contents = {key: value for key, value in document.items() if key != "digest"}
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


@cache
def code_fingerprint() -> str:
    """Return a sha256 over the source files of d2l and its checks."""
    root = Path(__file__).resolve().parents[1]
    return hash_sources([path for package in _PACKAGES for path in sorted((root / package).rglob("*.py"))], root)


def hash_sources(files: Iterable[Path], root: Path) -> str:
    """Return a sha256 over files and their paths relative to a folder."""
    total = hashlib.sha256()
    for path in files:
        total.update(f"{os.path.relpath(path, root)}\n".encode() + path.read_bytes())
    return total.hexdigest()
