"""An exported adapter, loaded by PEFT, answers as the model that it was exported from.

What it does
------------
Reads two packed documents of two chunks into LoRAs on the tiny twin, exports that of the second, loads the folder with
`PeftModel` onto a fresh twin, and compares the logits of its question.

Why it matters
--------------
PEFT scales a delta by `lora_alpha / r`, Doc-to-LoRA by `lora_alpha`: an adapter that is written as it was trained is r
times too weak, here 24 times for two chunks at rank 8. An exporter that misses the bias or a chunk, or a server that
drops keys, gives fluent answers of the wrong model.

How it is detected
------------------
The logits of PEFT's model must equal those under the bound LoRA to 1e-4; LOR202 has shown that those are not the base's.
Skipped with `mlp` among the targets, for which PEFT has no adapter format.

How to fix
----------
Export with `d2l internalize`: rank R = r · (chunks + 1), bias included, the scale in B and `lora_alpha = R`; or, with B as
generated, `lora_alpha = scale · R`.
"""

import json
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from checks.faults import override
from checks.implementation import Implementation
from checks.probes import TOLERANCE, difference, probe_rows
from checks.result import Fail, Inapplicable, Pass, Result
from checks.rule import Fault, Rule
from d2l.data.packing import collate
from d2l.errors import D2LError
from d2l.hypernet.targets import MLP_BLOCK
from d2l.inference.adapter import NO_FORMAT

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from checks.subject import Subject

CHUNKS = 2
# Two documents in one row, of which the second is exported: an adapter of the first would show.
DOCUMENTS: dict[str, tuple[int, ...]] = {"documents": (5, 7), "questions": (6, 12), "chunks": (CHUNKS, CHUNKS)}
REMEDY = "export every chunk and the bias along one rank R, with lora_alpha = R and the scale in B"


@torch.no_grad()
def check(subject: "Subject") -> Result:
    """Compare the logits under the bound LoRA with those under PEFT."""
    if MLP_BLOCK in subject.config.target_modules:
        return Inapplicable(NO_FORMAT)
    model = subject.twin()
    rows = probe_rows(subject, **DOCUMENTS)  # type: ignore[arg-type]
    lora, batch = model.lora(collate(rows))[1], collate(rows[1:])
    own = slice(len(rows[0].queries[0].input_ids), None)
    expected = model.logits(collate(rows), model.lora(collate(rows)))[own]
    base = model.logits(batch, None)
    with tempfile.TemporaryDirectory(prefix="d2l-") as folder:
        path = Path(folder) / "adapter"
        try:
            subject.implementation.export(lora, model.base, path)
        except D2LError as error:
            return Fail(
                message="the LoRA cannot be exported",
                expected="an adapter folder of PEFT",
                actual=str(error),
                remedy=REMEDY,
            )
        served = subject.twin()
        _load_with_peft(served.base, path)
    actual = served.logits(batch, None)
    evidence = {"logits": difference(actual, expected), "effect": difference(expected, base), "rank": lora.rank}
    if evidence["logits"] > TOLERANCE:
        return Fail(
            message="the exported adapter is another model than the trained one",
            expected=f"PEFT's logits within {TOLERANCE:g} of those under the bound LoRA",
            actual=f"{evidence['logits']:.2g} off; the LoRA itself moves them by {evidence['effect']:.2g}",
            remedy=REMEDY,
            evidence=evidence,
        )
    return Pass(
        f"PEFT's logits are within {evidence['logits']:.1g}; the LoRA moves them by {evidence['effect']:.2g}", evidence
    )


def _load_with_peft(base: "PreTrainedModel", adapter: Path) -> None:
    """Put the adapter's layers into the base, in place."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT calls what newer releases of transformers rename
        PeftModel.from_pretrained(base, str(adapter))


def _divided_by_rank(healthy: Implementation, lora: Any, base: Any, folder: Path) -> None:
    """Write the factor of the deltas into `lora_alpha` as it is, as the reference does: PEFT divides it by r."""
    healthy.export(lora, base, folder)
    config = folder / "adapter_config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**values, "lora_alpha": values["lora_alpha"] / values["r"]}), encoding="utf-8")


def _without_bias(healthy: Implementation, lora: Any, base: Any, folder: Path) -> None:
    """Leave out the learned bias, whose rows are the last."""
    last = lora.rank // (CHUNKS + 1)
    A, B = ({name: x[:, :, :-last] for name, x in side.items()} for side in (lora.A, lora.B))
    healthy.export(replace(lora, A=A, B=B), base, folder)


def _shuffled(healthy: Implementation, lora: Any, base: Any, folder: Path) -> None:
    """Shuffle the rows of A against those of B."""
    healthy.export(replace(lora, A={name: x.roll(1, dims=2) for name, x in lora.A.items()}), base, folder)


RULE = Rule(
    code="EXP201",
    name="exported-adapter-differs",
    stage="twin",
    severity="error",
    sources=("failure mode 15", "failure mode 22", "vllm-project/vllm#41384", "vllm-project/vllm#52198"),
    requires=("LOR202", "ATT201"),
    check=check,
    faults=(
        Fault("alpha-over-r", "lora_alpha is the scale, which PEFT divides by r", override(export=_divided_by_rank)),
        Fault(
            "bias-dropped",
            "the learned bias is not exported",
            override(export=_without_bias, unless=lambda subject: "" if subject.config.use_bias else "use_bias is off"),
        ),
        Fault("rows-shuffled", "rows of A and B do not match", override(export=_shuffled)),
    ),
)
