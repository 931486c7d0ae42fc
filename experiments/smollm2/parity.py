"""The exported adapter in PEFT: whether a plain transformers model with it gives the answers that d2l gives."""

import warnings
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import PeftModel

from d2l.data.records import Record
from d2l.inference.adapter import export_adapter
from d2l.inference.generate import decode_answer, encode_prompt, find_stop_ids, internalize, truncate_at_stop
from d2l.inference.load import TrainedModel
from experiments.smollm2.recipe import ANSWER_TOKENS


def peft_answers(trained: TrainedModel, asked: Sequence[tuple[Record, str]]) -> list[str]:
    """Export each document's adapter, load it by PEFT, and answer the question by greedy decoding."""
    answers = []
    for record, question in asked:
        with TemporaryDirectory() as folder:
            adapter = Path(folder) / "adapter"
            export_adapter(internalize(trained, record.context), trained.model.base, adapter)
            answers.append(_answer(trained, adapter, question))
    return answers


@torch.no_grad()
def _answer(trained: TrainedModel, adapter: Path, question: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT calls what newer releases of transformers rename
        model = PeftModel.from_pretrained(deepcopy(trained.model.base), str(adapter)).eval()
    prompt = torch.tensor([encode_prompt(trained.chat, question)]).to(trained.model.base.device)
    stop = find_stop_ids(trained.chat, trained.model.base.generation_config.eos_token_id)
    tokens = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=ANSWER_TOKENS,
        eos_token_id=stop,
        pad_token_id=stop[0],
    )
    return decode_answer(trained.chat, truncate_at_stop(tokens[0, prompt.shape[1] :].tolist(), stop))
