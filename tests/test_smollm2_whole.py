"""The experiment on a language model, whole and small: on a tiny Llama whose random weights learn nothing."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.families import BASES
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.smollm2 import __main__ as experiment
from experiments.smollm2 import material, recipe, training
from experiments.smollm2.documents import Passage
from experiments.smollm2.facts import Words
from experiments.smollm2.folder import Folder
from experiments.smollm2.training import progress_of, saved_config

TINY = Path("configs/models/tiny_gpt_oss")
PASSAGES = [
    Passage(tuple(f"The {word} number {n} of this module is {verb} first." for verb in ("read", "kept", "sent")), split)
    for word in ("name", "size", "date")
    for n in range(12)
    for split in ("train", "heldout")
]


def small(stage: recipe.Stage, documents: int) -> recipe.Stage:
    tokens = (min(stage.shape.tokens[0], 20), min(stage.shape.tokens[1], 40))
    return replace(
        stage,
        documents=documents,
        shape=replace(stage.shape, tokens=tokens, facts=(1, 2)),
        taught=4 if stage.taught else 0,
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    folder = Folder(tmp_path / "work")
    folder.place.mkdir()
    folder.gguf.touch()
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.save_pretrained(folder.base)
    base = BASES["llama"].tiny(vocab_size=len(tokenizer), max_position_embeddings=4096)
    AutoModelForCausalLM.from_config(base).save_pretrained(folder.base)
    lengths = {"max_packed_inp_len": 1200, "max_packed_ctx_len": 1600, "max_ctx_chunk_len": 400, "eval_documents": 2}
    sizes = {"latent_size": 16, "n_latent_queries": 4, "num_blocks": 1, "eval_steps": 1000, "save_steps": 1000}
    monkeypatch.setattr(recipe, "TRAINING", recipe.TRAINING | lengths | sizes)
    monkeypatch.setattr(recipe, "STAGES", tuple(small(stage, 40) for stage in recipe.STAGES))
    monkeypatch.setattr(recipe, "HELDOUT", tuple(small(stage, 2) for stage in recipe.HELDOUT))
    monkeypatch.setattr(recipe, "WATCHED", small(recipe.WATCHED, 2))
    for name, value in (("REAL_DOCUMENTS", 2), ("HARM_DOCUMENTS", 2), ("SHOWN", 2)):
        monkeypatch.setattr(recipe, name, value)
    monkeypatch.setattr(material, "PASSAGE_TOKENS", (10, 400))
    monkeypatch.setattr(material, "TEACHER_PASSAGES", 4)
    monkeypatch.setattr(material, "TOGETHER", 1)
    monkeypatch.setattr(training, "START_MINUTES", 0.02)
    monkeypatch.setattr(training, "TOLERANCE", 0.001)
    monkeypatch.setattr(experiment, "find_passages", lambda: PASSAGES)
    monkeypatch.setattr(
        experiment,
        "single_words",
        lambda passages, chat: Words(*([f"{kind}{n}" for n in range(99)] for kind in ("word", "other"))),
    )
    return folder


@pytest.mark.slow
def test_the_whole_experiment_goes_through_its_stages_and_is_resumed(folder: Folder, tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    lines = [
        {"context": f"The sea is {it}.", "prompts": ["How is the sea?"], "responses": [it]} for it in ("wet", "old")
    ]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    said: list[str] = []
    options = argparse.Namespace(minutes=0.25, questions=questions, threads=1, page=tmp_path / "page.md")
    experiment.run_experiment(folder, options, said.append)
    page = options.page.read_text(encoding="utf-8")
    for part in ("## Training", "## Facts", "## Real questions", "## Harm", "## 2 questions", "the document's LoRA"):
        assert part in page
    assert "2 documents, 2 questions" in page
    run = json.loads((folder.run / "run.json").read_text(encoding="utf-8"))
    changed = {change["field"] for change in run["changes"]}
    assert {"data", "train_ds_names", "loss", "decay_steps"} <= changed
    taken, _ = progress_of(folder.run)
    last = saved_config(folder.run)
    assert last["decay_steps"] >= 1
    assert last["max_steps"] <= taken + last["decay_steps"]
    before = len(said)
    experiment.run_experiment(folder, options, said.append)  # what the last stage still lacks
    assert progress_of(folder.run)[0] >= taken
    assert not [text for text in said[before:] if text.startswith("stage word:")]
    assert options.page.read_text(encoding="utf-8").startswith("# On a real language model")


def test_the_loss_is_the_teachers_from_the_first_stage_that_has_one() -> None:
    losses = [training.next_stage(Path("run"), stage, 0, 0.0, 1.0).get("loss") for stage in recipe.STAGES[:-1]]
    assert losses == [None, None, None, "kl"]


def test_a_folder_of_another_recipe_is_refused(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment.require_same_recipe(folder)
    experiment.require_same_recipe(folder)
    monkeypatch.setattr(recipe, "SEED", 2)
    with pytest.raises(SystemExit, match="made by another recipe"):
        experiment.require_same_recipe(folder)
