"""Doc-to-LoRA: from a configuration to a trained hypernetwork, and from a document to an adapter.

The names below are the public interface; each is imported when it is first used, so that `import d2l` takes no time.
`checks.preflight` diagnoses a configuration.

The layers of this package, from the ground up. A folder or module here imports from the layers below its own only;
`make layers` prints what is imported, and a test holds it against this list.

    errors
    io
    config
    base
    data
    hypernet
    checkpoint  fingerprint
    build
    train  inference  reference
    evaluation  plan
    tiny
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d2l.build import Components
    from d2l.config.load import load_config
    from d2l.config.schema import RunConfig
    from d2l.data.records import Record, read_records
    from d2l.errors import CheckpointError, ConfigError, D2LError, DataError, ModelError, NonFiniteError
    from d2l.evaluation.run import Evaluation, evaluate
    from d2l.hypernet.lora import Lora
    from d2l.inference.adapter import export_adapter
    from d2l.inference.generate import ask, internalize
    from d2l.inference.load import TrainedModel, load_model
    from d2l.inference.merge import merge_documents

_HOMES = {
    "d2l.build": ("Components",),
    "d2l.config.load": ("load_config",),
    "d2l.config.schema": ("RunConfig",),
    "d2l.data.records": ("Record", "read_records"),
    "d2l.errors": ("CheckpointError", "ConfigError", "D2LError", "DataError", "ModelError", "NonFiniteError"),
    "d2l.evaluation.run": ("Evaluation", "evaluate"),
    "d2l.hypernet.lora": ("Lora",),
    "d2l.inference.adapter": ("export_adapter",),
    "d2l.inference.generate": ("ask", "internalize"),
    "d2l.inference.load": ("TrainedModel", "load_model"),
    "d2l.inference.merge": ("merge_documents",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "CheckpointError",
    "Components",
    "ConfigError",
    "D2LError",
    "DataError",
    "Evaluation",
    "Lora",
    "ModelError",
    "NonFiniteError",
    "Record",
    "RunConfig",
    "TrainedModel",
    "ask",
    "evaluate",
    "export_adapter",
    "internalize",
    "load_config",
    "load_model",
    "merge_documents",
    "read_records",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module; `__version__` is that of the installed distribution."""
    if name == "__version__":
        return import_module("importlib.metadata").version("d2l-preflight")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return list(__all__)
