"""The tokenizer of a run, of a local folder, a shipped one or the hub."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from d2l.errors import ModelError
from d2l.io.hub import from_cache_or_hub
from d2l.io.remote_code import refuse_tokenizer_code
from d2l.io.resources import local_or_shipped


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a local folder, of a shipped one (`configs/models/tiny_gpt_oss`), or of the hub.

    Raises:
        ModelError: the tokenizer cannot be loaded, or brings code of its own; the message gives the reason.
    """
    source = local_or_shipped(name_or_path)
    if source is not None and not source.is_dir():
        found = "a file" if source.is_file() else "nothing"
        raise ModelError(
            f"cannot load a tokenizer from {name_or_path}: expected a folder with tokenizer.json, found {found} there\n"
            "point at the folder: --tokenizer FOLDER"
        )
    try:
        if source is not None:
            return _read_tokenizer(source)
        return from_cache_or_hub(lambda local: _read_tokenizer(name_or_path, local_files_only=local), name_or_path)
    except ModelError:
        raise
    except Exception as error:  # a malformed tokenizer.json is a plain Exception
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"cannot load a tokenizer from {name_or_path}: {reason}\n"
            "expected a folder with tokenizer.json, or a model on the hub that is reachable or already in the cache\n"
            "offline, download it first (`hf download MODEL`) or point at a folder: --set tokenizer_name_or_path=FOLDER"
        ) from error


def _read_tokenizer(name_or_path: str | Path, local_files_only: bool = False) -> PreTrainedTokenizerBase:
    """Read a tokenizer by transformers, after a look for code that it would need.

    Raises:
        ValueError: of a folder without tokenizer.json transformers made one that knows its special tokens only.
    """
    refuse_tokenizer_code(name_or_path, local_files_only)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        name_or_path, local_files_only=local_files_only, trust_remote_code=False
    )
    if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):
        raise ValueError("no vocabulary is there")
    return tokenizer
