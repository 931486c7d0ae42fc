"""Attention one document at a time, and by first visible places, is the model's own, in value and in gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.families import BASES
from support.sizes import VOCABULARY
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from d2l.base import attention
from d2l.base.attention import PER_DOCUMENT
from d2l.base.flex import PACKED_FLEX
from d2l.base.masks import packed_masks
from d2l.base.segments import Segments


def gpt_oss(implementation: str) -> PreTrainedModel:
    config = BASES["gpt_oss"].tiny()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                torch.nn.init.normal_(parameter)
    return model.eval()


def positions(lengths: list[int]) -> Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


def logits(model: PreTrainedModel, ids: Tensor, lengths: list[int]) -> Tensor:
    where = positions(lengths)
    return model(input_ids=ids, position_ids=where, attention_mask=packed_masks(model, where), use_cache=False).logits


EAGER, DOCUMENTS, BY_PLACES = gpt_oss("eager"), gpt_oss(PER_DOCUMENT), gpt_oss(PACKED_FLEX)


@settings(derandomize=True, deadline=None, max_examples=12)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_it_is_eager_attention_in_value_and_gradient(lengths: list[int]) -> None:
    ids = torch.randint(VOCABULARY, (1, sum(lengths)), generator=torch.Generator().manual_seed(len(lengths)))
    results = []
    for model in (EAGER, DOCUMENTS, BY_PLACES):
        model.zero_grad()
        found = logits(model, ids, lengths)
        found.pow(2).mean().backward()
        results.append([found, *(parameter.grad for parameter in model.parameters())])
    for eager, *others in zip(*results, strict=True):
        for other in others:
            torch.testing.assert_close(other, eager, atol=1e-5, rtol=1e-4)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=8))
def test_a_short_document_never_pays_for_a_long_one(lengths: list[int]) -> None:
    groups = attention._of_similar_length(Segments(tuple(lengths)).grid(torch.device("cpu")))
    assert sum(len(group) for group in groups) == len(lengths)
    assert sum(group.numel() * group.shape[1] for group in groups) <= 4 * sum(length**2 for length in lengths)


@pytest.mark.parametrize("model", [EAGER, DOCUMENTS, BY_PLACES])
def test_a_row_without_a_grid_is_one_document(model: PreTrainedModel) -> None:
    """Generation and evaluation call the model without masks, in batches of several rows too."""
    ids = torch.randint(VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, EAGER(input_ids=ids).logits)
