"""A new configuration file: every key with its sentence, grouped; keys at their default commented out."""

import textwrap
from pathlib import Path
from typing import Any

from d2l.config.descriptions import GROUPS
from d2l.config.keys import STAGES, in_yaml
from d2l.config.load import BASE_MODEL, load_config
from d2l.config.schema import RunConfig

PRESETS: dict[str, str] = {  # name → the shipped config that its values are read from
    "tiny": "configs/tiny_gpt_oss.yaml",
    "gpt-oss-20b": "configs/gpt_oss_20b.yaml",
    "gpt-oss-20b-recommended": "configs/gpt_oss_20b_recommended.yaml",
    "needle": "configs/needle_tiny.yaml",
}
_WIDTH = 118
_HEADER = """\
# A run of d2l, with the values of {config}.
# Lines that begin with # and a key show its default: remove the # to change it. `d2l config KEY` says more of one key.
#   d2l preflight {file}{data}     checks the run before it costs money
#   d2l train {file}{data}         trains, if the checks find nothing against it
# For editors: `d2l config --schema > d2l.schema.json`, and as the first line of this file
#   # yaml-language-server: $schema=d2l.schema.json
"""


def render_template(preset: str, file: str, *, model: str | None = None, data: str | None = None) -> str:
    """Return the text of a new configuration file that `load_config` reads to the preset's values.

    Args:
        preset: a key of `PRESETS`.
        file: the name of the new file, for the commands in its header.
        model, data: take the place of the preset's base model and data.

    Raises:
        ConfigError: the preset does not go together with this model or data.
    """
    loaded = load_config(Path(PRESETS[preset]), model=model, data=data)
    config = loaded.resolved() | {STAGES: [stage.model_dump(exclude_defaults=True) for stage in loaded.curriculum]}
    defaults = RunConfig.model_validate({}).resolved()
    option = "" if config["train_ds_names"] else " --data FILE"
    lines = [_HEADER.format(config=PRESETS[preset], file=file, data=option)]
    for group, members in GROUPS.items():
        lines += [f"# ---- {group} ----", ""]
        for name, described in members.items():
            lines += textwrap.wrap(f"{described.text}.", _WIDTH, initial_indent="# ", subsequent_indent="# ")
            is_default = config[name] == defaults[name] and name != BASE_MODEL  # a run names its base
            lines += [f"{'#' if is_default else ''}{_entry(name, config[name])}", ""]
    return "\n".join(lines)


def _entry(name: str, value: Any) -> str:
    """Write a key with its value: a list of mappings with a line for each, everything else on one line."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "\n".join([f"{name}:", *(f"  - {in_yaml(item)}" for item in value)])
    return f"{name}: {in_yaml(value)}"
