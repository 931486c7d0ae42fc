"""The public interface: its names, what importing it costs, and README's Python section, executed."""

import ast
import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from support.tiny_run import make_run

import d2l
from checks import preflight
from d2l.data.needles import needle_records
from d2l.data.records import write_records

ROOT = Path(__file__).resolve().parents[1]


def test_every_public_name_is_there_and_documented() -> None:
    assert sorted(d2l.__all__) == d2l.__all__
    for name in d2l.__all__:
        assert name in dir(d2l)
        assert getattr(d2l, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'internalise'"):
        _ = d2l.internalise


def test_a_text_in_place_of_a_list_is_refused() -> None:
    with pytest.raises(d2l.DataError, match="expected a list of paths"):
        d2l.read_records("heldout.jsonl")
    with pytest.raises(d2l.D2LError, match="lists of names"):
        preflight(d2l.RunConfig(), select="TGT101")


def test_the_version_is_that_of_the_distribution() -> None:
    assert d2l.__version__ == version("d2l-preflight")
    assert dir(d2l) == d2l.__all__


def test_type_checkers_see_the_same_names() -> None:
    (block,) = [node for node in ast.parse(Path(d2l.__file__).read_text()).body if isinstance(node, ast.If)]
    seen = {(node.module, alias.name) for node in block.body for alias in node.names}
    assert seen == {(module, name) for module, names in d2l._HOMES.items() for name in names}
    assert {name for _, name in seen} == set(d2l.__all__)
    assert (ROOT / "d2l" / "py.typed").is_file()
    assert (ROOT / "checks" / "py.typed").is_file()


@pytest.mark.parametrize("package", ["d2l", "checks"])
def test_importing_a_package_loads_nothing_else(package: str) -> None:
    probe = f"import sys; before = set(sys.modules); import {package}; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-S", "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert loaded - set(sys.stdlib_module_names) == {package}


def test_a_preflight_from_python_is_that_of_the_command() -> None:
    report = preflight("configs/gpt_oss_20b.yaml", select=["ATT101", "targets-unmatched"])
    assert report.ok
    assert len(report) == 2
    assert [outcome.code for outcome in report] == ["ATT101", "TGT101"]
    config = d2l.load_config("configs/gpt_oss_20b.yaml", {"attn_implementation": "flash_attention_2"})
    red = preflight(config, select=["ATT101"])
    assert not red.ok
    assert [outcome.code for outcome in red.failures] == ["ATT101"]
    assert preflight(config, select=["ATT101"], ignore={"ATT101": "tried on purpose"}).ok
    assert json.dumps(red.to_json())


def test_the_python_section_of_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## From Python")[2].partition("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs" / "first")
    write_records(tmp_path / "heldout.jsonl", needle_records(2, 1, 1, 0, seed=0))
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
