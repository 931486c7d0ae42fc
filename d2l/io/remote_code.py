"""Refusal of models and tokenizers that bring Python code of their own: nothing of it is ever imported or run.

Where transformers has the kind itself, its own class is used and the folder's code is left alone.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.tokenization_auto import get_tokenizer_config, tokenizer_class_from_name

from d2l.errors import ModelError


def refuse_model_code(name_or_path: str | Path, local_files_only: bool) -> None:
    """Refuse a model whose config.json names code for a model type that transformers does not have.

    Raises:
        ModelError: the code would have to be run.
        OSError: there is no config.
    """
    settings, _ = PreTrainedConfig.get_config_dict(name_or_path, local_files_only=local_files_only)
    kind = settings.get("model_type")
    if kind not in CONFIG_MAPPING:
        _refuse_auto_map(name_or_path, "config.json", f"model_type {kind!r}", settings)


def refuse_tokenizer_code(name_or_path: str | Path, local_files_only: bool) -> None:
    """Refuse a tokenizer whose tokenizer_config.json names code for a class that transformers does not have.

    Raises:
        ModelError: the code would have to be run.
    """
    settings = get_tokenizer_config(name_or_path, local_files_only=local_files_only)
    kind = settings.get("tokenizer_class")
    if not isinstance(kind, str) or tokenizer_class_from_name(kind) is None:
        _refuse_auto_map(name_or_path, "tokenizer_config.json", f"tokenizer_class {kind!r}", settings)


def _refuse_auto_map(name_or_path: str | Path, file: str, kind: str, settings: Mapping[str, Any]) -> None:
    if settings.get("auto_map"):
        raise ModelError(
            f"{name_or_path}: {file} has an auto_map, which names Python code to run, and d2l runs none\n"
            f"expected: a kind that transformers has itself; found {kind} with auto_map {settings['auto_map']!s:.200}\n"
            "port the code to transformers, or use a checkpoint of a supported family"
        )
