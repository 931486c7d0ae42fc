"""Different documents give different LoRAs, and different answers.

What it does
------------
Gives the tiny twin the same questions with other documents and compares the generated LoRAs and the logits.

Why it matters
--------------
A hypernetwork that does not see its document still trains: the learned bias LoRA alone lowers the loss on the format of
the answers. The curve looks right for hours, and every document gets the same adapter.

How it is detected
------------------
With another document, LoRA and logits must move by more than 1e-4 of their largest value.

How to fix
----------
Trace the path from the document's ids to the features, the latents and the LoRA; look for a constant or a detached
value, and for features of padding.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from checks.faults import override
from checks.implementation import Implementation, Model
from checks.probes import TOLERANCE, difference, probe_batch
from checks.result import Fail, Pass, Result
from checks.rule import Fault, Rule

if TYPE_CHECKING:
    from checks.subject import Subject


@torch.no_grad()
def check(subject: "Subject") -> Result:
    """Compare LoRAs and logits for two sets of documents."""
    model = subject.twin()
    batch = probe_batch(subject)
    other = replace(batch, ctx_ids=(batch.ctx_ids + 1) % subject.twin_base_config.vocab_size)
    lora, other_lora = model.lora(batch), model.lora(other)
    evidence = {
        "lora": min(difference(other_lora.B[name], lora.B[name]) for name in lora.B),
        "logits": difference(model.logits(batch, other_lora), model.logits(batch, lora)),
    }
    if not min(evidence.values()) > TOLERANCE:
        return Fail(
            message="the generated LoRA does not depend on the document",
            expected=f"LoRA and logits that move by more than {TOLERANCE:g} of their largest value with another document",
            actual=f"LoRA {evidence['lora']:.2g}, logits {evidence['logits']:.2g}",
            remedy="look for a constant between the document's ids and the generated LoRA",
            evidence=evidence,
        )
    return Pass(
        f"another document moves the LoRA by {evidence['lora']:.2g}, logits by {evidence['logits']:.2g}", evidence
    )


def _constant_features(healthy: Implementation, base: Any, config: Any) -> Model:
    """Let the encoder read the same token everywhere."""
    model: Any = healthy.build(base, config)
    encoder = model.encoder
    model.encoder = lambda ids, position_ids, mask: encoder(torch.zeros_like(ids), position_ids, mask)
    return model


RULE = Rule(
    code="LOR203",
    name="document-ignored",
    stage="twin",
    severity="error",
    sources=("sanity run", "failure mode 35", "failure mode C15"),
    requires=("HYP201", "LOR202"),
    check=check,
    faults=(Fault("constant-features", "the encoder reads a constant", override(build=_constant_features)),),
)
