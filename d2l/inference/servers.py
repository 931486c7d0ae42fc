"""What servers take of adapters: ranks, modules that come together, and the commands that serve and ask. Without torch.

Read off the sources: vLLM's `LoRAConfig` (`max_lora_rank`), `is_in_target_modules` and `FilesystemResolver`, and
SGLang's `LoRAAdapter`, which stacks q, k and v, and gate and up, and takes the first of each for granted.
"""

import json
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Server = Literal["peft", "vllm", "sglang"]
AdapterDtype = Literal["float32", "bfloat16"]

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values of --max-lora-rank
STACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
MAX_ERROR = 0.01  # of a delta, relative; rounding it to bfloat16 costs about 0.003

_ADAPTERS_AT_ONCE = 8  # in the printed command: each takes memory for the largest rank
_QUESTION = "What does the document say?"


@dataclass(frozen=True)
class AdapterForm:
    """Form in which adapters are written.

    Attributes:
        server: who serves them; vLLM gets a rank of its list, SGLang zeros for modules that it stacks.
        rank: exactly this rank; None: as generated, up to what the server allows.
        dtype: of the tensors.
        max_error: largest relative error of a delta that a smaller rank may cost.

    Raises:
        ValueError: vLLM has no setting for the rank.
    """

    server: Server = "peft"
    rank: int | None = None
    dtype: AdapterDtype = "float32"
    max_error: float = MAX_ERROR

    def __post_init__(self) -> None:
        if self.server == "vllm" and self.rank is not None and self.rank not in VLLM_RANKS:
            raise ValueError(f"vLLM has settings for the ranks {', '.join(map(str, VLLM_RANKS))}, not for {self.rank}")

    def rank_for(self, generated: int) -> int:
        """Return the rank of an adapter whose LoRA was generated with another one."""
        if self.rank is not None:
            return self.rank
        return vllm_rank(generated) or VLLM_RANKS[-1] if self.server == "vllm" else generated

    def settings(self) -> dict[str, Any]:
        """Return what shapes the file, as JSON values."""
        return {"for": self.server, "rank": self.rank, "dtype": self.dtype, "max_error": self.max_error}


def vllm_rank(rank: int) -> int | None:
    """Return the smallest `--max-lora-rank` that takes adapters of this rank; None where none does."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def missing_modules(names: Collection[str]) -> list[str]:
    """Return the modules that SGLang stacks with one of these, and that are not among them."""
    groups = [group for group in STACKED.values() if any(name in names for name in group)]
    return [name for group in groups for name in group if name not in names]


def serve_command(
    server: Server, base: str, folder: Path, ids: Sequence[str], rank: int, modules: Collection[str]
) -> str | None:
    """Return the command that serves adapters beside their base; None where the rank is too large for the server.

    Args:
        server: "peft" is answered with vLLM's command.
        base: as the adapters name it: vLLM's resolver compares the two texts.
        folder: holds a folder for each id.
        rank: the largest of the adapters.
        modules: those that the adapters change.
    """
    if server == "sglang":
        paths = [f"{name}={folder / name}" for name in ids[:_ADAPTERS_AT_ONCE]]
        options = ["--enable-lora", "--max-lora-rank", str(rank), "--lora-target-modules"]
        options += sorted({*modules, *missing_modules(modules)})
        return shlex.join(
            ["python", "-m", "sglang.launch_server", "--model-path", base, *options, "--lora-paths", *paths]
        )
    allowed = vllm_rank(rank)
    if allowed is None:
        return None
    # vLLM's modules are stacked; releases differ in whether the filter knows the stacked or the single names
    names = {*modules, *(stack for stack, group in STACKED.items() if any(name in modules for name in group))}
    environment = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=true VLLM_PLUGINS=lora_filesystem_resolver"
    resolver = f"VLLM_LORA_RESOLVER_CACHE_DIR={shlex.quote(str(folder.resolve()))}"
    at_once = min(_ADAPTERS_AT_ONCE, max(1, len(ids)))
    options = ["--enable-lora", "--max-lora-rank", str(allowed), "--max-loras", str(at_once)]
    return f"{environment} {resolver} " + shlex.join(
        ["vllm", "serve", base, *options, "--lora-target-modules", *sorted(names)]
    )


def request_command(server: Server, base: str, name: str) -> str:
    """Return the request that asks a served adapter a question."""
    model = f"{base}:{name}" if server == "sglang" else name
    port = 30000 if server == "sglang" else 8000
    body = {"model": model, "messages": [{"role": "user", "content": _QUESTION}], "temperature": 0}
    url = f"http://localhost:{port}/v1/chat/completions"
    return shlex.join(["curl", url, "-H", "Content-Type: application/json", "-d", json.dumps(body)])
