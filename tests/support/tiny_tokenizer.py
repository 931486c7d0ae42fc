"""Builds the tokenizer in `configs/models/tiny_gpt_oss`: 1,024 ids that split text as GPT-OSS's o200k does.

    python -m tests.tiny_tokenizer        writes the files again; `test_chat.py` compares them byte for byte

Ids: 256 bytes, then merges learned from common English words, then whole words (`ignore_merges` makes them one token
without the merges in between), then the sixteen control tokens in the order of the real tokenizer (real id minus 198,990).
Digits are never merged, so a number has as many tokens as digits; only the two dates of the system message are whole.
"""

import json
from collections import Counter
from itertools import pairwise

from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Split

from d2l.data.chat.format import DEFAULT_DATE
from d2l.io.resources import resource

VOCABULARY_SIZE = 1024
CONTROL_TOKENS = [
    *("<|startoftext|>", "<|endoftext|>", "<|reserved_1010|>", "<|reserved_1011|>", "<|return|>", "<|constrain|>"),
    *("<|reserved_1014|>", "<|channel|>", "<|start|>", "<|end|>", "<|message|>", "<|reserved_1019|>"),
    *("<|reserved_1020|>", "<|reserved_1021|>", "<|call|>", "<|reserved_1023|>"),
]

_CASED = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K = "|".join(
    [
        rf"[^\r\n\p{{L}}\p{{N}}]?{_CASED}*{_LOWER}+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_CASED}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
DATES = ["2024-06", DEFAULT_DATE]
PATTERN = "|".join([r"\d{4}-\d{2}(?:-\d{2})?", O200K])

# What the harmony template writes around every conversation.
PREAMBLE = (
    "You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\nCurrent date: "
    f"{DEFAULT_DATE}\n\nReasoning: low medium high\n\n# Valid channels: analysis, commentary, final. Channel must be "
    "included for every message. system developer user assistant analysis commentary final # Instructions\n\n# Tools"
)
# Whole tokens at the start of a message.
STARTS = ["system", "developer", "user", "assistant", "analysis", "commentary", "final", "The", "What"]

# Whole tokens, with a space before them: words of synthetic documents, of questions, and the commonest of English.
WORDS = """
amber azure beige black blue bronze brown copper coral crimson cyan golden green grey indigo ivory jade lilac maroon
olive orange pearl pink plum purple red ruby scarlet silver tan teal turquoise violet white yellow badger bear beaver
bison camel cat cobra crane crow deer dingo dog dolphin eagle falcon ferret fox frog gecko goat goose hare hawk heron
horse ibis jackal koala lemur leopard lion lizard llama lynx mole moose mouse newt otter owl panda parrot pelican
pigeon puma rabbit raven robin salmon seal shark sheep snail spider stork swan tiger toad turtle walrus whale wolf
wombat zebra busy calm careful cheerful clever curious gentle happy honest lonely lucky patient polite proud shy actor
artist baker barber carpenter clerk cook dancer doctor driver farmer guard judge lawyer miner nurse painter pilot poet
sailor singer soldier student tailor teacher waiter writer danced dreamed laughed paused read rested sang sat slept
smiled stood talked waited walked worked behind beside beyond near outside ancient broken crowded dusty empty famous
hidden large narrow new old quiet small tall wide barn bridge castle church factory farm forest garden harbour hill
hotel house lake library market meadow mill museum palace park river road school shop square station street theatre
tower village The What value number what is the of magic special
"""

# From the commonest down; a word's weight in learning merges falls with its place.
ENGLISH = """
the of and to in a is was that for it as with his he be on by at I had are not but from have they which or one you
were all her she there would their we him been has when who will no more if out so up said what its about than into
them can only other time new some could these two may first then do any like my now over such our man me even most
made after also did many off before must well back through years much where your way down should because long each
just state those people too mister how little world very good year still own see men work between life being under
three never day same another know while last us might great old come since against go came right used take house use
place during without again home around small however found thought went say part once general high upon school every
don't does got united left number course war until always away something fact water though less public put think
almost hand enough far took head yet government system set better told nothing night end why called didn't eyes find
going look asked later knew point next city business case group give days young present let room president social
given several order possible rather second face interest among form important often things looked early white case
large big need within children document question answer context language model information document section example
history century between region national university developed including became known population following according
research theory process production
"""


def build_tiny_tokenizer() -> dict[str, str]:
    """The shipped files, as name → text."""
    preamble = [_bytes(piece) for piece, _ in Split(Regex(PATTERN), behavior="isolated").pre_tokenize_str(PREAMBLE)]
    spaced, english = [_bytes(f" {word}") for word in WORDS.split()], [_bytes(f" {word}") for word in ENGLISH.split()]
    whole = [word for word in dict.fromkeys([*preamble, *STARTS, *spaced]) if word in DATES or not _has_digit(word)]
    words = Counter({word: len(english) // (place + 1) + 1 for place, word in enumerate(english)})
    words.update([*preamble, *spaced, *WORDS.split()])

    alphabet = sorted(ByteLevel.alphabet())
    room = VOCABULARY_SIZE - len(CONTROL_TOKENS)
    merges = _learn_merges(words, alphabet, whole, room)
    tokens = [*dict.fromkeys([*alphabet, *("".join(merge) for merge in merges), *whole])]
    assert len(tokens) == room
    return {
        "tokenizer.json": _json(_tokenizer(tokens, merges)),
        "tokenizer_config.json": _json(
            {
                "bos_token": "<|startoftext|>",
                "clean_up_tokenization_spaces": False,
                "eos_token": "<|return|>",
                "model_input_names": ["input_ids", "attention_mask"],
                "pad_token": "<|endoftext|>",
                "tokenizer_class": "PreTrainedTokenizerFast",
            }
        ),
    }


def _learn_merges(words: Counter[str], alphabet: list[str], whole: list[str], room: int) -> list[tuple[str, str]]:
    """Byte-pair merges until bytes, merges and whole words fill `room`; the commonest pair, then the first in order."""
    spelled = {word: list(word) for word in words if not _has_digit(word)}
    vocabulary, merges = {*alphabet, *whole}, []
    while len(vocabulary) < room:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, symbols in spelled.items():
            for pair in pairwise(symbols):
                pairs[pair] += words[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        vocabulary.add("".join(best))
        spelled = {word: _merge(symbols, best) for word, symbols in spelled.items()}
    return merges


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    position = 0
    while position < len(symbols):
        width = 2 if tuple(symbols[position : position + 2]) == pair else 1
        merged.append("".join(symbols[position : position + width]))
        position += width
    return merged


def _bytes(text: str) -> str:
    """Text in the letters that stand for its UTF-8 bytes."""
    return "".join(piece for piece, _ in ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text))


def _has_digit(word: str) -> bool:
    return any(letter.isdigit() for letter in word)


def _tokenizer(tokens: list[str], merges: list[tuple[str, str]]) -> dict:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": len(tokens) + i, "content": token, **flags} for i, token in enumerate(CONTROL_TOKENS)],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False},
                byte_level,
            ],
        },
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [" ".join(merge) for merge in merges],
        },
    }


def _json(value: dict) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"


if __name__ == "__main__":
    for name, text in build_tiny_tokenizer().items():
        (resource("configs/models/tiny_gpt_oss") / name).write_text(text, encoding="utf-8")
