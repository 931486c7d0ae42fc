"""Turn a GGUF file into a folder that d2l loads: config, safetensors, tokenizer and a chat template with generation tags."""

import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from d2l.errors import ModelError
from d2l.io.atomic import write_new_folder

TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def convert(gguf: Path, folder: Path) -> None:
    """Write the base's folder in bfloat16, unless it is there already.

    Raises:
        ModelError: the package `gguf` is missing, or the file is no whole GGUF file.
    """
    if folder.exists():
        return
    if find_spec("gguf") is None:
        raise ModelError("reading GGUF needs the package gguf: pip install 'd2l-preflight[real]'")
    tokenizer, model = _read(gguf)
    with write_new_folder(folder, "base") as partial:
        model.save_pretrained(partial)
        tokenizer.chat_template = TEMPLATE.read_text(encoding="utf-8")
        tokenizer.save_pretrained(partial)


def _read(gguf: Path) -> tuple[Any, Any]:
    """Read tokenizer and model; the weights go into a plain model, which can be saved."""
    place: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    _require_magic(gguf)
    try:
        tokenizer = AutoTokenizer.from_pretrained(**place)
        dequantized = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.bfloat16)
    except (ValueError, OSError, KeyError, IndexError, RuntimeError, struct.error) as error:  # of gguf and transformers
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{gguf} ({gguf.stat().st_size:,} bytes): cannot be read as GGUF: {reason}; it may be cut short: remove it, "
            "and it is fetched again"
        ) from error
    config = AutoConfig.for_model(dequantized.config.model_type, **_plain_values(dequantized.config))
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(dequantized.state_dict())
    return tokenizer, plain


def _plain_values(config: Any) -> dict[str, Any]:
    """Return a config's values without what belongs to the GGUF file."""
    left_out = {"quantization_config", "_name_or_path", "_model_name_or_path", "model_type"}
    return {key: value for key, value in config.to_dict().items() if key not in left_out}


def _require_magic(gguf: Path) -> None:
    with gguf.open("rb") as file:
        found = file.read(4)
    if found != b"GGUF":
        raise ModelError(
            f"{gguf}: expected a file that begins with GGUF, found {found!r}; remove it, it is fetched again"
        )
