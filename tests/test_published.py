"""Published models are diagnosed without a false alarm, from their config.json alone: stages static and twin, no data."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from checks import preflight
from checks.report import plain_text
from d2l.base.config import read_base_config, skeleton
from d2l.base.twin import twin_config
from d2l.config.load import load_config

FOLDER = Path(__file__).parent / "published"
# Parameters in thousands, tied embeddings once (README.md of the folder): a wrong width, depth or vocabulary shows.
PARAMETERS = {
    "Llama-3.1-8B": 8_030_261,
    "Llama-3.2-1B": 1_235_814,
    "Llama-3.2-3B": 3_212_749,
    "Mistral-7B-v0.3": 7_248_023,
    "Mistral-Nemo-Base-2407": 12_247_782,
    "Qwen2.5-0.5B": 494_032,
    "Qwen2.5-1.5B": 1_543_714,
    "Qwen2.5-3B": 3_085_938,
    "Qwen2.5-7B": 7_615_616,
    "Qwen3-0.6B": 596_049,
    "Qwen3-1.7B": 1_720_574,
    "Qwen3-4B": 4_022_468,
    "Qwen3-8B": 8_190_735,
    "Qwen3-14B": 14_768_307,
    "gemma-2-2b": 2_614_341,
    "gemma-2-9b": 9_241_705,
    "gemma-2-27b": 27_227_128,
    "gemma-3-270m": 268_098,
    "gemma-3-1b": 999_885,
    "gemma-3-4b": 3_880_263,
    "gemma-3-12b": 11_766_034,
    "gemma-3-27b": 27_009_346,
    "gpt-oss-20b": 20_914_757,
    "gpt-oss-120b": 116_829_156,
    "Mixtral-8x7B-v0.1": 46_702_792,
    "Qwen3-30B-A3B": 30_532_122,
}


def each_model(*quick: str) -> pytest.MarkDecorator:
    """Parametrize a test by all models; `make fuzz` runs those that are not quick."""
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in PARAMETERS]
    )


# A scaling of rope and a head count that is no power of two; kinds of layers beyond the shipped config's
SCALED, OF_TWO_KINDS = "Llama-3.2-3B", "gemma-3-1b"


def config_file(name: str) -> str:
    return str(FOLDER / f"{name}.json")


def test_every_file_is_in_the_table() -> None:
    assert {file.stem for file in FOLDER.glob("*.json")} == PARAMETERS.keys()


@each_model(SCALED, OF_TWO_KINDS)
def test_the_sizes_are_the_published_ones(name: str) -> None:
    parameters = dict(skeleton(read_base_config(config_file(name))).named_parameters())
    assert sum(parameter.numel() for parameter in parameters.values()) // 1000 == PARAMETERS[name]


# Stage static, and of stage twin the checks of what is the base's own: its targets, attention, experts and files
OF_A_BASE = ("TGT", "QNT", "HYP", "LOR", "ATT", "ENC", "BAS", "EXP")


@pytest.mark.parametrize(
    ("name", "select"),
    [
        (OF_TWO_KINDS, OF_A_BASE),
        (SCALED, OF_A_BASE),
        *(pytest.param(name, (), id=name, marks=pytest.mark.slow) for name in PARAMETERS),
    ],
)
def test_nothing_is_found_in_a_published_model(name: str, select: Sequence[str]) -> None:
    config = load_config(None, {"model_name_or_path": config_file(name)})
    report = preflight(config, stages=["static", "twin"], select=select)
    allowed = {"pass", "skip", "inapplicable"}
    unexpected = [o.code for o in report if o.outcome not in allowed | ({"warn"} if o.code == "TGT102" else set())]
    assert not unexpected, plain_text(report)


@each_model(SCALED, OF_TWO_KINDS)
def test_the_twin_has_the_ratio_of_heads(name: str) -> None:
    real = read_base_config(config_file(name))
    twin = twin_config(real)
    ratio, real_ratio = (config.num_attention_heads // config.num_key_value_heads for config in (twin, real))
    assert ratio == real_ratio
