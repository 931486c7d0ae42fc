"""The tiny base: its training tasks, its chat format, and saving and loading."""

from pathlib import Path

import pytest
import torch
from click.testing import Result
from support.families import BASES
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

import cli
from d2l.build import Components
from d2l.config.schema import CurriculumStage, RunConfig
from d2l.data.needles import PAIR_KEYS, Split, needle_records, split_of
from d2l.tiny.pretrain import (
    TEMPLATE,
    Tasks,
    load_tiny_base,
    pretrain,
    save_tiny_base,
    tiny_base_chat,
    tiny_base_config,
    tiny_base_tokenizer,
)

KEYS = set(PAIR_KEYS)
GOAL = CurriculumStage(pairs=4, digits=2)
CONFIG, SHIPPED = "configs/needle_tiny.yaml", "configs/models/needle_tiny"


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SEQUENCES", "DOCUMENTS", "HELDOUT"):
        monkeypatch.setattr(f"d2l.tiny.pretrain.{name}", 4)


@pytest.fixture(scope="module")
def tasks() -> Tasks:
    return Tasks(tiny_base_chat(), seed=3)


def words(ids: torch.Tensor) -> list[str]:
    return [str(token) for token in tiny_base_chat().tokenizer.convert_ids_to_tokens(ids.tolist())]


def stated_pairs(text: list[str], digits: int) -> list[tuple[str, str]]:
    return [(key, "".join(text[place + 1 : place + 1 + digits])) for place, key in enumerate(text) if key in KEYS]


@pytest.mark.parametrize(("pairs", "digits", "split"), [(1, 1, "train"), (4, 2, "train"), (4, 2, "heldout")])
def test_documents_have_questions_on_their_pairs_in_the_chat_format(
    tasks: Tasks, pairs: int, digits: int, split: Split
) -> None:
    batch = tasks.draw_documents(5, pairs, digits, split=split)
    chat = tiny_base_chat()
    for ids, supervised in zip(batch.ids, batch.supervised, strict=True):
        document = words(ids)[3 : 3 + pairs * (1 + digits)]
        stated = dict(stated_pairs(document, digits))
        assert len(stated) == pairs
        assert {split_of(f"{key} {value}") for key, value in stated.items()} == {split}
        texts = words(ids)
        keys = [texts[place - 3] for place, token in enumerate(texts) if token == "assistant"]
        assert sorted(keys) == sorted(stated)
        turns = []
        for number, key in enumerate(keys):
            question = f"{' '.join(document)}\n\n{key}" if number == 0 else key
            answer = " ".join((key, *stated[key]))
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        encoded = chat.encode(turns)
        assert encoded.input_ids == ids.tolist()
        ends = [
            token == "<|end|>" for token in words(ids)
        ]  # of earlier turns: that another turn follows cannot be predicted
        assert [mark and not end for mark, end in zip(encoded.supervised, ends, strict=True)] == supervised.tolist()


def test_restated_pairs_are_the_same_in_other_orders(tasks: Tasks) -> None:
    batch = tasks.draw_restated(8, 4, 2)
    orders = set()
    for ids, supervised in zip(batch.ids, batch.supervised, strict=True):
        restated = stated_pairs(words(ids), 2)
        blocks = [restated[start : start + 4] for start in range(0, len(restated), 4)]
        assert len(blocks) == 3
        assert all(sorted(block) == sorted(blocks[0]) for block in blocks)
        orders |= {tuple(block.index(pair) for pair in blocks[0]) for block in blocks[1:]}
        expected = [place >= 12 and word not in KEYS for place, word in enumerate(words(ids))]
        assert supervised.tolist() == expected
    assert len(orders) > 1


def test_repeated_sequences_are_supervised_where_they_can_be_predicted(tasks: Tasks) -> None:
    batch = tasks.draw_repeated(4)
    length = batch.ids.shape[1] // 3
    assert torch.equal(batch.ids[:, :length], batch.ids[:, length : 2 * length])
    assert all(len(set(row.tolist())) == length for row in batch.ids[:, :length])
    assert batch.supervised.sum(1).tolist() == [2 * length - 1] * 4  # not the token at which the repeat begins


def test_the_tiny_base_has_about_a_million_parameters_and_all_of_gpt_oss() -> None:
    model, _ = next(pretrain(seed=0, max_steps=1, goal=GOAL))
    assert 0.9e6 < sum(parameter.numel() for parameter in model.parameters()) < 1.1e6
    assert set(tiny_base_config().layer_types) == {"sliding_attention", "full_attention"}
    assert any(name.endswith("sinks") for name, _ in model.named_parameters())


def test_a_step_is_the_same_for_the_same_seed_and_changes_every_weight() -> None:
    (first, one), (second, other) = (next(pretrain(seed=1, max_steps=1, goal=GOAL)) for _ in range(2))
    assert one == other
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert next(pretrain(seed=2, max_steps=1, goal=GOAL))[1] != one


def test_training_continues_from_a_start(tmp_path: Path) -> None:
    first, _ = next(pretrain(seed=1, max_steps=1, goal=GOAL))
    save_tiny_base(first, tmp_path / "first")
    start = load_tiny_base(tmp_path / "first")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), start.parameters(), strict=True))
    wider = CurriculumStage(pairs=8, digits=4)
    (continued, one), (whole, other) = (next(pretrain(2, 1, wider, model)) for model in (start, first))
    assert one == other
    assert all(torch.equal(a, b) for a, b in zip(continued.parameters(), whole.parameters(), strict=True))
    assert next(pretrain(2, 1, wider))[1] != one


def test_a_step_is_proportional_to_the_learning_rate() -> None:
    def moved(learning_rate: float) -> torch.Tensor:
        model = load_tiny_base(Path(SHIPPED))
        before = model.lm_head.weight.detach().clone()
        next(pretrain(0, 1, GOAL, model, learning_rate))
        return model.lm_head.weight.detach() - before

    torch.testing.assert_close(moved(2e-3), 2 * moved(1e-3), rtol=1e-3, atol=1e-6)


def test_the_command_continues_from_a_tiny_base_and_from_nothing_else(tmp_path: Path) -> None:
    def pretrain_from(start: Path | str, output: str) -> Result:
        options = ["-o", str(tmp_path / output), "--start", str(start), "--max-steps", "1", "--learning-rate", "1e-3"]
        return CliRunner().invoke(cli.app, ["pretrain-tiny", CONFIG, *options], prog_name="d2l")

    def refused(start: Path) -> str:
        result = pretrain_from(start, "refused")
        assert result.exit_code == 2
        assert not (tmp_path / "refused").exists()
        return result.stderr

    assert pretrain_from(SHIPPED, "wide").exit_code == 0  # its accuracy is above the target already
    trained, _ = next(pretrain(0, 1, GOAL, load_tiny_base(Path(SHIPPED)), 1e-3))
    written = load_tiny_base(tmp_path / "wide")
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), written.parameters(), strict=True))

    absent = tmp_path / "absent"
    assert str(absent) in refused(absent)
    assert "found gpt_oss with 1,024 tokens" in refused(Path("configs/models/tiny_gpt_oss"))
    other = tmp_path / "other"
    LlamaForCausalLM(BASES["llama"].tiny(vocab_size=len(tiny_base_tokenizer()))).save_pretrained(other)
    tiny_base_tokenizer().save_pretrained(other)
    assert "expected a model that `d2l pretrain-tiny` made, found llama" in refused(other)


def test_the_command_writes_a_base_that_the_run_loads(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    result = CliRunner().invoke(
        cli.app, ["pretrain-tiny", CONFIG, "-o", str(folder), "--max-steps", "1"], prog_name="d2l"
    )
    assert result.exit_code == 1  # one step is not enough
    assert "stayed below" in result.stderr
    config = RunConfig(model_name_or_path=str(folder), chat_template=TEMPLATE, target_modules=("v_proj",))
    components = Components(config)
    trained, _ = next(pretrain(seed=0, max_steps=1, goal=GOAL))
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in components.base.state_dict().items())
    chat = components.chat
    assert chat.fingerprint == tiny_base_chat().fingerprint
    record = needle_records(1, 2, 2, 0, seed=0, style="pairs")[0]
    ids = chat.encode_text(record.context)
    assert len(ids) == 2 * 3
    assert chat.decode(ids) == record.context
    again = CliRunner().invoke(cli.app, ["pretrain-tiny", CONFIG, "-o", str(folder)], prog_name="d2l")
    assert again.exit_code == 2
    assert "never written over" in again.stderr
