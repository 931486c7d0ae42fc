"""Other values in a YAML file: its comments and other lines stay, and what is read is what was meant."""

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from d2l.config.edit import with_values
from d2l.config.keys import in_yaml

FILE = """\
# a run
rank: 8   # of the LoRA
target_modules:   # which
  - q_proj  # first
  - v_proj

# the optimizer
kwargs: {use_reentrant: true} # as it was
remark: |
  two
  lines

empty:
last: 'x: y' # the end
"""


@pytest.mark.parametrize(
    ("values", "changes"),
    [
        ({}, {}),
        ({"rank": 16}, {1: "rank: 16   # of the LoRA"}),
        ({"kwargs": {"use_reentrant": False}}, {7: "kwargs: {use_reentrant: false} # as it was"}),
        ({"last": None}, {13: "last: null # the end"}),
        ({"empty": [1]}, {12: "empty: [1]"}),
        ({"seed": 3, "dtype": "a: b"}, {14: "seed: 3", 15: "dtype: 'a: b'"}),
    ],
)
def test_one_line_changes(values: dict[str, Any], changes: dict[int, str]) -> None:
    lines = dict(enumerate(FILE.splitlines())) | changes
    assert with_values(FILE, values).splitlines() == [lines[number] for number in sorted(lines)]


def test_a_value_of_several_lines_becomes_one() -> None:
    edited = with_values(FILE, {"target_modules": ["o_proj"], "remark": "short"})
    assert edited == FILE.replace("   # which\n  - q_proj  # first\n  - v_proj\n", " [o_proj]\n").replace(
        "|\n  two\n  lines\n", "short\n"
    )


@pytest.mark.parametrize("mark", ["|", ">", ">-", "|+"])
def test_what_stands_behind_a_block_of_text_stays(mark: str) -> None:
    text = f"remark: {mark}\n  two\n  lines\n\n# of the seed\nseed: 3\n"
    assert with_values(text, {"remark": "short"}) == "remark: short\n\n# of the seed\nseed: 3\n"


def test_lines_end_as_those_of_the_file() -> None:
    windows = FILE.replace("\n", "\r\n")
    values = {"target_modules": ["o_proj"], "warmup_steps": 7, "a_new_key": 1}
    assert with_values(windows, values) == with_values(FILE, values).replace("\n", "\r\n")
    assert with_values("rank: 8\r\nseed: 1", {"dtype": "float32"}) == "rank: 8\r\nseed: 1\r\ndtype: float32\r\n"


@pytest.mark.parametrize(
    "text", ["", "# nothing", "{}", "{rank: 8, seed: 1}", "rank: 8", "rank: 8 # eight", "---\nrank: 8\n"]
)
def test_a_file_of_any_form_takes_a_value(text: str) -> None:
    edited = with_values(text, {"rank": 16, "dtype": "float32"})
    assert yaml.safe_load(edited) == (yaml.safe_load(text) or {}) | {"rank": 16, "dtype": "float32"}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text("ab:#' \n-", max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", min_size=1, max_size=2), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = st.sampled_from(["rank", "seed", "loss", "dtype"])


@given(before=st.dictionaries(KEYS, VALUES), new=st.dictionaries(KEYS, VALUES), flow=st.booleans())
def test_what_is_read_is_what_was_meant(before: dict[str, Any], new: dict[str, Any], flow: bool) -> None:
    written = [
        f"{key}: {in_yaml(value)} " if flow else yaml.safe_dump({key: value}, default_flow_style=False)
        for key, value in before.items()
    ]
    text = "".join(f"{entry}# of it\n\n" for entry in written)
    assert yaml.safe_load(text) == (before or None)
    assert yaml.safe_load(with_values(text, new)) == (before | new or None)
