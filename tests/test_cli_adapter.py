"""Commands for trained checkpoints: internalize, ask, import-reference, on a run of one step."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.families import BASES
from typer.testing import CliRunner, Result

import cli
from checks.reference_file import reference_state, write_reference_file
from commands.console import LOADING
from d2l.checkpoint import load_checkpoint
from d2l.config.schema import RunConfig
from d2l.hypernet.hypernetwork import Hypernetwork
from d2l.hypernet.shape import HypernetShape
from d2l.io.run_folder import MANIFEST, step_folder

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = "The ferry to Brennick leaves at nine."


@pytest.fixture
def document(tmp_path: Path) -> Path:
    (tmp_path / "ferry.md").write_text(DOCUMENT, encoding="utf-8")
    return tmp_path / "ferry.md"


def d2l(*arguments: object, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(cli.app, [str(item) for item in arguments], prog_name="d2l", input=stdin)


def test_internalize_writes_an_adapter_and_prints_its_use(run_folder: Path, document: Path, tmp_path: Path) -> None:
    result = d2l("internalize", run_folder, document, "-o", tmp_path / "adapter")
    assert (result.exit_code, result.stderr) == (0, f"{LOADING}\ncheckpoint {step_folder(run_folder, 1)}\n")
    assert f"adapter  {tmp_path / 'adapter'}\nrank     8, on v_proj of every layer\n" in result.stdout
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 8)
    assert config["base_model_name_or_path"] == "configs/models/tiny_gpt_oss"
    again = d2l("internalize", step_folder(run_folder, 1), "-", "-o", tmp_path / "stdin", stdin=DOCUMENT.encode())
    assert again.exit_code == 0
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("adapter", "stdin")]
    assert files[0] == files[1]


def test_a_damaged_checkpoint_that_is_passed_over_is_said(run_folder: Path, document: Path, tmp_path: Path) -> None:
    shutil.copytree(run_folder, tmp_path / "run")
    damaged = step_folder(tmp_path / "run", 1) / "hypernet.safetensors"
    damaged.write_bytes(b"damaged")
    result = d2l("ask", tmp_path / "run", document, "When?", "--max-new-tokens", 1)
    note, used = result.stderr.splitlines()[-2:]
    assert note.startswith(f"Note: passed over a newer checkpoint: {damaged}: expected ")
    assert used == f"checkpoint {step_folder(tmp_path / 'run', 0)}"


def test_import_reference_makes_a_checkpoint(tmp_path: Path) -> None:
    config = RunConfig(lora_r=2, latent_size=4, n_latent_queries=2, num_blocks=1, model_name_or_path="some/base")
    sizes = {"q_proj": (16, 32)}
    hypernet = Hypernetwork(HypernetShape(config=config, modules=sizes, n_layers=3, feature_size=16))
    base = BASES["llama"].tiny(hidden_size=16, num_hidden_layers=3)
    state = reference_state(hypernet.state_dict(), config, base, sizes)
    write_reference_file(tmp_path / "pytorch_model.bin", state)
    result = d2l("import-reference", tmp_path / "pytorch_model.bin", "-o", tmp_path / "imported")
    assert result.exit_code == 0
    assert result.stdout == f"checkpoint  {tmp_path / 'imported'}\nbase        some/base\n"
    imported = load_checkpoint(tmp_path / "imported").hypernet
    assert all(torch.equal(imported[name], value) for name, value in hypernet.state_dict().items())

    resumed = d2l("train", "configs/tiny_gpt_oss.yaml", "--resume", tmp_path / "imported")
    assert resumed.exit_code == 2
    assert "no run to continue" in resumed.stderr


# What is refused: one message, exit code 2, nothing on stdout, nothing written


def refused(result: Result, words: str) -> None:
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.output


def test_documents_that_cannot_be_read(run_folder: Path, tmp_path: Path) -> None:
    files = {"picture.png": b"\x89PNG\r\n", "zeros.txt": b"a\0b", "empty.txt": b"  \n"}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    cases = {
        tmp_path / "picture.png": "expected text in UTF-8, found byte 0x89 at 0",
        tmp_path / "zeros.txt": "zero byte at 1; is it a binary file?",
        tmp_path / "empty.txt": "the document is empty",
        tmp_path / "absent.txt": "No such file or directory; pass ",
        tmp_path: "Is a directory",
    }
    for document, words in cases.items():
        refused(d2l("ask", run_folder, document, "When?"), words)
        if document != tmp_path:  # a folder is one of documents
            refused(d2l("internalize", run_folder, document, "-o", tmp_path / "adapter"), words)
    refused(d2l("ask", run_folder, "-", "When?", stdin=b""), "stdin: the document is empty")
    refused(d2l("ask", run_folder, tmp_path / "empty.txt", " "), "the question is empty")
    assert not (tmp_path / "adapter").exists()


def test_a_document_that_is_too_long(run_folder: Path) -> None:
    long = " ".join(f"On day {day} the ferry leaves." for day in range(80)).encode()
    refused(d2l("ask", run_folder, "-", "When?", stdin=long), "max_packed_ctx_len 600")


def test_folders_without_a_checkpoint(run_folder: Path, document: Path, tmp_path: Path) -> None:
    refused(d2l("ask", tmp_path / "absent", document, "When?"), "expected a run's folder or a step-NNNNNN folder")
    refused(d2l("ask", tmp_path, document, "When?"), "found no checkpoint in it")
    half = tmp_path / "step-000001"
    half.mkdir()
    for file in step_folder(run_folder, 1).iterdir():
        if file.name != MANIFEST:
            (half / file.name).write_bytes(file.read_bytes())
    refused(d2l("ask", half, document, "When?"), "is no checkpoint: expected manifest.json")
    absent = d2l("ask", run_folder, document, "When?", "--model", "no/such/model")
    refused(absent, "needs its base model: cannot load a tokenizer from no/such/model")
    assert absent.stderr.splitlines()[-1] == "pass where it lies now: --model MODEL"
    assert "--set" not in absent.stderr  # no option of this command


def test_another_base(run_folder: Path, document: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    tiny = ROOT / "configs" / "models" / "tiny_gpt_oss"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny / name).read_bytes())
    config = json.loads((tiny / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 128}))
    result = d2l("internalize", run_folder, document, "-o", tmp_path / "adapter", "--model", folder)
    refused(result, "hidden_size: expected 64, found 128")
    assert "pass the base of its training: --model MODEL" in result.stderr
    assert not (tmp_path / "adapter").exists()


def test_nothing_is_written_over(run_folder: Path, document: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to("absent")
    for place in ("mine", "file", "link"):
        refused(d2l("internalize", run_folder, document, "-o", tmp_path / place), "never written over")
        refused(d2l("import-reference", tmp_path / "file", "-o", tmp_path / place), "never written over")
    assert (tmp_path / "file").read_text() == "precious"
    assert not list((tmp_path / "mine").iterdir())
    assert not (tmp_path / "absent").exists()


def test_files_that_are_not_checkpoints_of_the_reference(document: Path, tmp_path: Path) -> None:
    output = tmp_path / "imported"
    refused(d2l("import-reference", document, "-o", output), "expected an archive of torch.save")
    refused(d2l("import-reference", tmp_path, "-o", output), "is a folder: pass the pytorch_model.bin in it")
    refused(d2l("import-reference", tmp_path / "absent.bin", "-o", output), "No such file")
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["internalize", "run", "document"], "-o"),
        (["ask"], "CHECKPOINT"),
        (["ask", "run", "document", "When?", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["import-reference"], "FILE"),
    ],
)
def test_usage(arguments: list[str], words: str) -> None:
    refused(d2l(*arguments), words)


def test_mistakes_are_reported_before_heavy_imports(document: Path, tmp_path: Path) -> None:
    probe = """
import atexit, sys, cli
atexit.register(lambda: print("HEAVY", [name for name in ("torch", "transformers", "peft") if name in sys.modules]))
sys.argv = ["d2l", *sys.argv[1:]]
cli.main()
"""
    for arguments in (
        ["ask", "run", "absent.txt", "When?"],
        ["internalize", "run", str(document), "-o", str(tmp_path)],
        ["-h"],
    ):
        command = [sys.executable, "-c", probe, *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.stdout.splitlines()[-1] == "HEAVY []", arguments
