"""Folders of models and tokenizers that bring Python code: refused in plain words, and nothing of it runs."""

import ast
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import d2l
from d2l.base.config import read_base_config
from d2l.data.chat.tokenizer import load_tokenizer
from d2l.errors import ModelError
from d2l.io.resources import resource

TINY = "configs/models/tiny_gpt_oss"


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The shipped tiny model as one of an unknown kind, with code that leaves a file behind when it is imported."""
    made = tmp_path / "model"
    shutil.copytree(resource(TINY), made)
    (made / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'it-ran')!r}).touch()\nclass Config: ...\nclass Tokenizer: ...\n"
    )
    edit(made / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Config"})
    edit(
        made / "tokenizer_config.json",
        tokenizer_class="EvilTokenizer",
        auto_map={"AutoTokenizer": [None, "evil.Tokenizer"]},
    )
    return made


@pytest.mark.parametrize("answer", ["", "y\n" * 9])
@pytest.mark.parametrize("load", [read_base_config, load_tokenizer])
def test_code_of_a_folder_is_refused_without_a_question(
    load: Any, answer: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = io.StringIO(answer)
    monkeypatch.setattr("sys.stdin", questions)
    with pytest.raises(ModelError, match=r"auto_map") as caught:
        load(str(folder))
    assert "port the code to transformers, or use a checkpoint of a supported family" in str(caught.value)
    assert "evil" in str(caught.value)
    assert questions.tell() == 0
    assert capsys.readouterr().out == ""
    assert not (folder.parent / "it-ran").exists()


def test_what_transformers_has_itself_is_used_and_the_folders_code_is_not(folder: Path) -> None:
    edit(folder / "config.json", model_type="gpt_oss")
    edit(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    assert type(read_base_config(str(folder))).__name__ == "GptOssConfig"
    assert len(load_tokenizer(str(folder))) == 1024
    assert not (folder.parent / "it-ran").exists()


def test_every_call_of_transformers_says_that_no_code_is_trusted() -> None:
    calls = [
        (path.name, call)
        for path in Path(d2l.__file__).parent.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and re.match("Auto[A-Z]", ast.unparse(call.func))
    ]
    assert {name for name, _ in calls} == {"config.py", "load.py", "tokenizer.py"}
    for name, call in calls:
        trusted = [ast.unparse(it.value) for it in call.keywords if it.arg == "trust_remote_code"]
        assert trusted == ["False"], f"{name}:{call.lineno}"
