"""A refusal to start where the package `d2l` is not ours alone, or of two versions at once.

PyPI's project d2l (Dive into Deep Learning) installs a package of the same name: pip writes both into one folder.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

OTHER_PROJECT = ("jax.py", "mxnet.py", "tensorflow.py", "torch.py")  # modules of its d2l
# Modules of version 0.1.0 that are gone: where they lie beside today's, two versions were unpacked into one folder.
OLD_MODULES = (
    *("adapter.py", "answer.py", "config.py", "config_file.py", "evaluate.py", "figures.py", "folders.py", "hub.py"),
    *("inert_pickle.py", "paths.py", "prepare.py", "pretrain.py", "reference_import.py", "reference_keys.py"),
    *("scores.py", "teach.py", "trained.py"),
)
OLD_COMMANDS = ("cli_data.py", "cli_learn.py", "cli_tables.py", "cli_use.py")


def require_one_installation() -> None:
    """Exit with 2 and one message on stderr where the package `d2l` that Python finds is mixed with another one."""
    spec = find_spec("d2l")
    places = list(spec.submodule_search_locations or ()) if spec else []
    if places and (problem := installation_problem(Path(places[0]))):
        sys.stderr.write(f"Error: {problem}\n")
        raise SystemExit(2)


def installation_problem(package: Path) -> str:
    """Describe what is mixed into a folder of the package `d2l`, and what to do; empty where nothing is.

    Args:
        package: the folder that `import d2l` reads.
    """
    top = package.parent
    foreign = [*sorted(top.glob("d2l-*.dist-info")), *_existing(package, OTHER_PROJECT)]
    if foreign:
        return (
            f"two projects called d2l are installed in {top}\n"
            f"  expected: d2l-preflight alone\n"
            f"  found: {_names(foreign, top)}, of PyPI's d2l (Dive into Deep Learning)\n"
            f"  fix: pip uninstall d2l, which takes files of d2l-preflight along; so install that again: "
            f"pip install --force-reinstall --no-deps d2l-preflight (in a checkout: -e .)"
        )
    in_checkout = (top / "pyproject.toml").exists()
    old = [*_existing(package, OLD_MODULES), *(_existing(top, OLD_COMMANDS) if in_checkout else ())]
    if old:
        return (
            f"two versions of d2l lie in {top}\n"
            f"  expected: the files of one version\n"
            f"  found: {_names(old, top)}, of version 0.1.0, beside those of a later one\n"
            f"  fix: delete these files, or unpack the version that you want into an empty folder"
        )
    return ""


def _existing(folder: Path, names: tuple[str, ...]) -> list[Path]:
    return [folder / name for name in names if (folder / name).exists()]


def _names(paths: list[Path], top: Path) -> str:
    return ", ".join(path.relative_to(top).as_posix() for path in paths)
