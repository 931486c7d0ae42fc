"""Log-probabilities that PEFT gives a text, on the base alone and with an adapter; in a file for machines without the base.

The file holds one line of numbers for each compared token, and a hash of the adapter that it belongs to.
"""

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from d2l.base.config import read_base_config
from d2l.base.files import is_config_only
from d2l.build import build_base
from d2l.config.load import load_config
from d2l.data.chat.tokenizer import load_tokenizer
from d2l.errors import CheckpointError, DataError, ModelError
from d2l.inference.served import NEXT_TOKENS, Key, Values, beginnings
from d2l.io.atomic import require_new_file, write_new_file

MAX_TOKENS = 512  # of a text: their logits over 200,000 ids take 0.4 GB

# Plain English of no document: adapters change what the base expects everywhere, and most in their own document.
TEXT = (
    "The harbour office keeps a list of every ship that enters the bay. On the first page stands the name of the ship, the "
    "hour of its arrival and the number of its crew. The clerk writes in the evening, when the last boats have returned, and "
    "reads the list aloud the next morning. Nobody knows why the custom began, but visitors like to hear it. When asked, the "
    "clerk answers that the answer is in the list itself: what is written down is remembered, and what is read aloud is shared."
)


class Expected(BaseModel):
    """What PEFT computes, in the order of positions.

    Attributes:
        adapter: `adapter_hash` of the adapter's folder.
        base: name of the base that computed it.
        ids: tokens of `text` by the base's own tokenizer.
        values: position, token id, log-probability by the base, log-probability with the adapter.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format: Literal["d2l-expected-1"] = "d2l-expected-1"
    adapter: str
    base: str
    text: str
    ids: tuple[int, ...]
    values: tuple[tuple[int, int, float, float], ...]

    def of_base(self) -> Values:
        """Return the log-probabilities by the base alone."""
        return {(position, token): value for position, token, value, _ in self.values}

    def of_adapter(self) -> Values:
        """Return the log-probabilities with the adapter."""
        return {(position, token): value for position, token, _, value in self.values}


def adapter_base(folder: Path) -> str:
    """Return the base that an adapter's folder names.

    Raises:
        CheckpointError: it is no folder of a LoRA in PEFT's format.
    """
    file = folder / "adapter_config.json"
    try:
        config: Any = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise CheckpointError(f"{file}: {reason}; pass a folder that d2l internalize wrote") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise CheckpointError(f"{file}: expected the config of a LoRA; pass a folder that d2l internalize wrote")
    return str(config.get("base_model_name_or_path") or "")


def adapter_hash(folder: Path) -> str:
    """Return the SHA-256 of an adapter's config and tensors.

    Raises:
        CheckpointError: one of them cannot be read.
    """
    digest = hashlib.sha256()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        try:
            with (folder / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise CheckpointError(
                f"{folder / name}: {error.strerror}; pass a folder that d2l internalize wrote"
            ) from None
    return digest.hexdigest()


@torch.no_grad()
def compute_expected(folder: Path, model: str | None = None, text: str = TEXT) -> Expected:
    """Compute the log-probabilities of a text by PEFT, on the base and with an adapter on it.

    Args:
        folder: the adapter's.
        model: hub id or folder of the base; by default the one that the adapter names.

    Raises:
        CheckpointError: the adapter cannot be used on this base.
        DataError: the text is too short or too long.
        ModelError: the base is not at hand.
    """
    name, digest = model or adapter_base(folder), adapter_hash(folder)
    if not name or is_config_only(name):
        raise ModelError(f"{name or folder}: no weights to compute with; name the base that is served: --model MODEL")
    ids = tuple(load_tokenizer(name)(text).input_ids)
    if not 2 <= len(ids) <= MAX_TOKENS:
        raise DataError(f"the text has {len(ids)} tokens; pass one of 2 to {MAX_TOKENS}: --text FILE")
    base = build_base(load_config(model=name), read_base_config(name))
    adapted = _load(base, folder, name)
    tokens = torch.tensor([ids], device=base.device)
    with adapted.disable_adapter():
        alone = adapted(tokens).logits[0].float().log_softmax(-1)
    changed = adapted(tokens).logits[0].float().log_softmax(-1)
    if torch.equal(alone, changed):
        raise CheckpointError(f"{folder} changes nothing on {name}: no server could be told to serve it or not")
    values = tuple(
        (*key, float(alone[key[0] - 1, key[1]]), float(changed[key[0] - 1, key[1]]))
        for key in _keys(ids, alone, changed)
    )
    return Expected(adapter=digest, base=name, text=text, ids=ids, values=values)


def _load(base: PreTrainedModel, folder: Path, name: str) -> Any:
    from peft import PeftModel  # imported late: it takes seconds

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT calls what newer releases of transformers rename
            return PeftModel.from_pretrained(base, str(folder)).eval()
    except Exception as error:  # PEFT raises what its parts raise
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise CheckpointError(
            f"{folder}: PEFT cannot put it on {name}: {reason[0]}\npass its own base: --model MODEL"
        ) from error


def _keys(ids: tuple[int, ...], *logprobs: Tensor) -> list[Key]:
    """Return the text's own tokens, and the likeliest next ones where a server may be asked for those."""
    count = min(NEXT_TOKENS, logprobs[0].shape[-1])
    keys = {(position, token) for position, token in enumerate(ids) if position > 0}
    for length in beginnings(len(ids)):
        keys |= {(length, token) for side in logprobs for token in side[length - 1].topk(count).indices.tolist()}
    return sorted(keys)


def write_expected(expected: Expected, file: Path) -> None:
    """Write to a new file.

    Raises:
        DataError: the file exists or cannot be written.
    """
    require_new_file(file)
    with write_new_file(file) as partial:
        partial.write_text(expected.model_dump_json() + "\n", encoding="utf-8")


def read_expected(file: Path, folder: Path) -> Expected:
    """Read what `write_expected` wrote for the adapter in `folder`.

    Raises:
        DataError: it is no such file, or of another adapter.
    """
    try:
        expected = Expected.model_validate_json(file.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise DataError(f"{file}: expected what `d2l expect` writes. {where}: {first['msg']}") from None
    if expected.adapter != adapter_hash(folder):
        raise DataError(f"{file} belongs to another adapter than {folder}: write it again (d2l expect)")
    return expected
