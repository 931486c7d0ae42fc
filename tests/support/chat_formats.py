"""Two small chat formats that are not harmony and a tokenizer for them, shared by the chat tests."""

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from d2l.data.chat.tokenizer import load_tokenizer
from d2l.io.resources import resource

TINY = "configs/models/tiny_gpt_oss"
QUESTION = {"role": "user", "content": "Which colour?"}
ANSWER = {"role": "assistant", "content": "Blue."}

CHATML = (
    "{% for message in messages %}{{ '<|start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|end|>{% endif %}{{ '\n' }}{% endfor %}"
)
UNTAGGED = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
PLAIN = (
    "{% for message in messages %}{% if message.role == 'user' %}{{ 'User: ' + message.content + '\n' }}"
    "{% else %}Bot: {% generation %}{{ message.content + '<|return|>' }}{% endgeneration %}{% endif %}{% endfor %}"
)

tiny = load_tokenizer(TINY)


def without_harmony() -> PreTrainedTokenizerBase:
    """The tiny tokenizer with one control token renamed, so that it does not speak harmony."""
    text = (resource(TINY) / "tokenizer.json").read_text(encoding="utf-8").replace("<|constrain|>", "<|other|>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text))


generic = without_harmony()
