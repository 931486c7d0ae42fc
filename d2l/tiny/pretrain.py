"""Training of a tiny GPT-OSS that answers needle questions about a document in its prompt.

Three tasks share every step. Random sequences that are repeated three times train induction heads (Olsson et al. 2022,
"In-context Learning and Induction Heads"): finding what followed the last occurrence of a token. Pairs that are restated
in other orders train the same for a key and its digits; documents with their questions, for the chat format.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedTokenizerFast

from d2l.build import Components
from d2l.config.schema import CurriculumStage, RunConfig
from d2l.data.chat.format import ChatFormat, chat_format
from d2l.data.needles import PAIR_FILLER, PAIR_KEYS, Split, needle_records
from d2l.errors import ModelError
from d2l.io.atomic import write_new_folder
from d2l.io.resources import resource

TEMPLATE = "chat_templates/needle.jinja"
CONTROL_TOKENS = (
    *("<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>", "<|start|>", "<|end|>"),
    *("<|message|>", "<|call|>"),
)
WORDS = ("user", "assistant", "final", *"0123456789", *PAIR_KEYS, *PAIR_FILLER)

LEARNING_RATE, BETAS, WEIGHT_DECAY, WARMUP_STEPS = 1.2e-3, (0.9, 0.98), 0.01, 30
INITIALIZER_RANGE = 0.06
# A step's batches: sequences, their lengths [low, high), copies of each; documents, tokens of restated pairs, filler words.
SEQUENCES, SEQUENCE_LENGTHS, COPIES = 32, (8, 17), 3
DOCUMENTS, RESTATED_TOKENS, FILLER = 16, 36, 15
EVALUATE_STEPS, HELDOUT, TARGET_ACCURACY = 25, 512, 0.985
DECAY_ACCURACY, DECAY_FACTOR = 0.8, 0.8  # from this accuracy on, each evaluation multiplies the learning rate


@dataclass(frozen=True)
class Progress:
    """Progress at a step: the sum of the tasks' losses in nats, and the exact match on held-out documents."""

    step: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class _Batch:
    """Token ids, int64 [n, T], and whether each is supervised, bool [n, T]."""

    ids: Tensor
    supervised: Tensor


def tiny_base_config() -> GptOssConfig:
    """Make a config of about 1M parameters with all parts of GPT-OSS: sinks, sliding and full attention, routed experts."""
    return GptOssConfig(
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=16,
        hidden_size=128,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=len(CONTROL_TOKENS) + len(WORDS),
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=INITIALIZER_RANGE,
        tie_word_embeddings=False,
        bos_token_id=CONTROL_TOKENS.index("<|startoftext|>"),
        eos_token_id=CONTROL_TOKENS.index("<|return|>"),
        pad_token_id=CONTROL_TOKENS.index("<|endoftext|>"),
        use_cache=False,
    )


def tiny_base_tokenizer() -> PreTrainedTokenizerFast:
    """Make the tokenizer, with a token for every word, digit and control token."""
    tokens = [*CONTROL_TOKENS, *WORDS]
    core = Tokenizer(models.WordLevel({token: place for place, token in enumerate(tokens)}, unk_token="<|endoftext|>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(list(CONTROL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|startoftext|>",
        eos_token="<|return|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


class Tasks:
    """Sampler of batches of the three tasks.

    Args:
        chat: chat format of questions and answers; its tokenizer is `tiny_base_tokenizer()`.
        seed: seed of all draws; the same seed gives the same batches.
    """

    def __init__(self, chat: ChatFormat, seed: int) -> None:
        self._chat, self._generator = chat, torch.Generator().manual_seed(seed)
        turn = chat.encode([{"role": "user", "content": PAIR_KEYS[0]}, {"role": "assistant", "content": PAIR_KEYS[1]}])
        question, answer = (turn.input_ids.index(key) for key in chat.encode_text(" ".join(PAIR_KEYS[:2])))
        self._before, self._between, self._after = (
            torch.tensor(part)
            for part in (turn.input_ids[:question], turn.input_ids[question + 1 : answer], turn.input_ids[answer + 1 :])
        )
        self._end = self._between[:1]  # end token of a question, and of every answer but the last

    def draw_repeated(self, count: int) -> _Batch:
        """Draw sequences of distinct random tokens, repeated; the copies are supervised from their second token on."""
        length = self._draw(*SEQUENCE_LENGTHS)
        ids = self._draw_permutations(count, len(self._chat.tokenizer))[:, :length].repeat(1, COPIES)
        supervised = torch.ones_like(ids, dtype=torch.bool)
        supervised[:, : length + 1] = False
        return _Batch(ids, supervised)

    def draw_restated(self, count: int, pairs: int, digits: int) -> _Batch:
        """Draw pairs, followed by the same pairs in other orders, whose digits are supervised."""
        _, stated = self._draw_needles(count, pairs, digits, 0, "train")
        times = max(2, RESTATED_TOKENS // (pairs * (1 + digits)))
        ids = torch.cat([self._reorder(stated).flatten(1) for _ in range(times)], dim=1)
        supervised = (torch.arange(ids.shape[1]) % (1 + digits) > 0) & (
            torch.arange(ids.shape[1]) >= pairs * (1 + digits)
        )
        return _Batch(ids, supervised.expand_as(ids))

    def draw_documents(
        self, count: int, pairs: int, digits: int, filler: int = 0, split: Split = "train", turns: int | None = None
    ) -> _Batch:
        """Draw documents with questions, one turn for each (default: every pair), whose answers are supervised.

        The end token of an answer is supervised in the last turn only: it differs there, and which turn is the last
        cannot be predicted.
        """
        contexts, stated = self._draw_needles(count, pairs, digits, filler, split)
        answers = self._reorder(stated)[:, :turns].unbind(1)
        last = len(answers) - 1
        parts = [(self._repeat_rows(self._before, count), False), (contexts, False)]
        for turn, pair in enumerate(answers):
            parts += [(self._repeat_rows(self._before, count), False)] if turn else []
            parts += [(pair[:, :1], False), (self._repeat_rows(self._between, count), False), (pair, True)]
            parts += [(self._repeat_rows(self._after if turn == last else self._end, count), turn == last)]
        supervised = torch.cat([torch.full(part.shape, mark) for part, mark in parts], dim=1)
        return _Batch(torch.cat([part for part, _ in parts], dim=1), supervised)

    def _draw_needles(self, count: int, pairs: int, digits: int, filler: int, split: Split) -> tuple[Tensor, Tensor]:
        """Draw documents as token ids [count, T], and their pairs [count, pairs, 1 + digits]: each word is one token."""
        seed = self._draw(0, 2**31)
        records = needle_records(count, pairs, digits, filler, seed, split, "pairs")
        contexts = [self._chat.encode_text(record.context) for record in records]
        stated = [[self._chat.encode_text(response) for response in record.responses] for record in records]
        return torch.tensor(contexts), torch.tensor(stated)

    def _reorder(self, stated: Tensor) -> Tensor:
        """Shuffle the pairs [count, pairs, 1 + digits] of each document."""
        order = self._draw_permutations(*stated.shape[:2])
        return stated.gather(1, order[..., None].expand_as(stated))

    def _draw_permutations(self, count: int, size: int) -> Tensor:
        """Draw permutations of `size` numbers, [count, size]."""
        return torch.rand(count, size, generator=self._generator).argsort(dim=1)

    def _draw(self, low: int, high: int) -> int:
        """Draw a number of [low, high)."""
        return int(torch.randint(low, high, (), generator=self._generator))

    @staticmethod
    def _repeat_rows(ids: Tensor, count: int) -> Tensor:
        """Repeat ids [T] as rows [count, T]."""
        return ids.expand(count, -1)


def pretrain(
    seed: int,
    max_steps: int,
    goal: CurriculumStage,
    model: GptOssForCausalLM | None = None,
    learning_rate: float = LEARNING_RATE,
) -> Iterator[tuple[GptOssForCausalLM, Progress]]:
    """Train until held-out questions are answered, and yield the model with its progress at every evaluation.

    Args:
        seed: seed of the data, and of the weights.
        max_steps: upper bound on the steps.
        goal: sizes of the evaluated documents, which are also the largest in training.
        model: model to continue training, changed in place; default: random weights.
        learning_rate: learning rate after warm-up, until accuracy reaches `DECAY_ACCURACY`.
    """
    chat = tiny_base_chat()
    tasks, heldout = (
        Tasks(chat, seed),
        Tasks(chat, seed + 1).draw_documents(HELDOUT, goal.pairs, goal.digits, goal.filler_words, "heldout", turns=1),
    )
    model = model or _make_random_base(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY)
    decays = 0  # evaluations since accuracy first reached DECAY_ACCURACY
    for step in range(1, max_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, step / WARMUP_STEPS) * DECAY_FACTOR**decays
        loss = sum((_compute_loss(model, batch) for batch in _draw_batches(tasks, step, goal)), start=torch.zeros(()))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % EVALUATE_STEPS == 0 or step == max_steps:
            accuracy = _measure_accuracy(model, heldout)
            decays += accuracy >= DECAY_ACCURACY or decays > 0
            yield model, Progress(step, loss.item(), accuracy)
            if accuracy >= TARGET_ACCURACY:
                return


def load_tiny_base(folder: Path) -> GptOssForCausalLM:
    """Load a model that `save_tiny_base` wrote, in training mode.

    Raises:
        ModelError: there is no such model, or its files are incomplete.
    """
    values = {"model_name_or_path": str(folder), "attn_implementation": "eager", "dtype": "float32"}
    config = RunConfig.model_validate(values)
    components = Components(config)
    tokenizer, model = components.tokenizer, components.base
    if not isinstance(model, GptOssForCausalLM) or tokenizer.get_vocab() != tiny_base_tokenizer().get_vocab():
        found = f"{model.config.model_type} with {len(tokenizer):,} tokens"
        raise ModelError(
            f"{folder}: expected a model that `d2l pretrain-tiny` made, found {found}. Give another --start."
        )
    return model.requires_grad_(True).train()


def tiny_base_chat() -> ChatFormat:
    """Make the chat format of the tiny base: harmony without a system message."""
    return chat_format(tiny_base_tokenizer(), template=resource(TEMPLATE).read_text(encoding="utf-8"))


def save_tiny_base(model: GptOssForCausalLM, folder: Path) -> None:
    """Write weights, config and tokenizer in the layout of `save_pretrained`.

    Raises:
        CheckpointError: the folder exists or cannot be written.
    """
    with write_new_folder(folder, "model") as partial:
        model.save_pretrained(partial)
        tokenizer = tiny_base_tokenizer()
        tokenizer.chat_template = resource(TEMPLATE).read_text(encoding="utf-8")
        tokenizer.save_pretrained(partial)


def _make_random_base(seed: int) -> GptOssForCausalLM:
    """Make a tiny base with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GptOssForCausalLM._from_config(tiny_base_config(), attn_implementation="eager")
    model.set_experts_implementation("eager")
    return model


def _draw_batches(tasks: Tasks, step: int, goal: CurriculumStage) -> tuple[_Batch, ...]:
    """Draw one batch of every task, with documents of all sizes up to the goal."""
    digits = 1 + (step // 4) % goal.digits
    pairs = (2, goal.pairs, 1, goal.pairs)[step % 4]
    filler = (0, max(FILLER, goal.filler_words), 0, FILLER // 4)[step % 4]
    return (
        tasks.draw_repeated(SEQUENCES),
        tasks.draw_restated(DOCUMENTS, 2 * (1 + step % 4), digits),
        tasks.draw_documents(DOCUMENTS, pairs, digits, filler),
    )


def _compute_loss(model: GptOssForCausalLM, batch: _Batch) -> Tensor:
    """Compute the mean cross-entropy of the supervised tokens, in nats."""
    supervised = batch.supervised[:, 1:]
    logits = model(input_ids=batch.ids[:, :-1]).logits[supervised]
    return functional.cross_entropy(logits, batch.ids[:, 1:][supervised])


@torch.no_grad()
def _measure_accuracy(model: GptOssForCausalLM, batch: _Batch) -> float:
    """Return the share of rows whose supervised tokens all have the highest logit."""
    correct = model(input_ids=batch.ids[:, :-1]).logits.argmax(-1) == batch.ids[:, 1:]
    return float((correct | ~batch.supervised[:, 1:]).all(dim=1).float().mean())
