"""A document that a saved run internalizes becomes the LoRA that its training would have made of it.

What it does
------------
Saves a light twin, and lets `d2l internalize` read a document of several chunks with that checkpoint, over an adapter in
bfloat16; then the same document with another end into the same folder, chunk by chunk and in packs; then both into one
adapter, one in a smaller rank, and one again with another checkpoint. What the files add to the base is compared with the LoRA
that the twin makes of the rows of training; so is the LoRA of both that `d2l ask` puts together.

Why it matters
--------------
What is served is not what was trained: weights are loaded again, the text is cut again, chunks of an older adapter are used
again. A parameter that is not loaded, a chunk in a wrong place, a bias that counts once for each of two documents give
answers that are worse than those of the evaluation, and no error.

How it is detected
------------------
Each module's `lora_alpha / r · B A`, as PEFT applies it, must equal the twin's update to a thousandth of the largest value;
one of a smaller rank may be no farther from it than the twin's own singular values say. Skipped with `mlp` among the targets,
for which PEFT has no adapter format.

How to fix
----------
Load every parameter, cut documents by the limits of the training, write each chunk's ranks once and the bias once, with its
scale; reuse only chunks whose tokens are the same.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checks.data.expected import conversation_format
from checks.faults import override
from checks.implementation import Implementation
from checks.result import Fail, Inapplicable, NotOffered, Pass, Result, Skip
from checks.rule import Fault, Rule
from checks.training.saved_twin import first_records, other_weights, reading_config, reading_twin, row_of, saved
from d2l.data.packing import collate
from d2l.errors import D2LError
from d2l.hypernet.targets import MLP_BLOCK
from d2l.inference.adapter import CONFIG, NO_FORMAT, WEIGHTS

if TYPE_CHECKING:
    from checks.implementation import Model
    from checks.subject import Subject
    from d2l.config.schema import RunConfig
    from d2l.data.records import Record
    from d2l.hypernet.lora import Lora

TOLERANCE = 1e-3  # of float32 twins that read chunks together and alone; a chunk or the bias is a tenth and more
LETTERS, TOKENS, CHUNKS = 200, 24, 4  # of a text of the run, repeated to at least so many tokens, in so many chunks
SMALLER = 2  # rank of an adapter that is the nearest of its rank, of chunks whose ranks are as many each
ENDS = ("7 miles.", "8 miles.")  # of the document before and after it is changed: all chunks but the last stay the same
PREFIX = "base_model.model."  # of a module's name in PEFT's files
# What is internalized: its name, the folder, which states of the document, and the form; in a folder one after another.
CASES: tuple[tuple[str, str, tuple[int, ...], dict[str, Any]], ...] = (
    ("a document, in bfloat16 before", "one", (0,), {}),
    ("the document with another end", "one", (1,), {}),
    ("a document in packs", "packed", (0,), {"packed": True}),
    ("the document in packs with another end", "packed", (1,), {"packed": True}),
    ("both as one", "merged", (1, 0), {}),
)


@torch.no_grad()
def check(subject: "Subject") -> Result:
    """Compare the updates of adapters with those of the twin."""
    if MLP_BLOCK in subject.config.target_modules:
        return Inapplicable(NO_FORMAT)
    if subject.tokenizer is None or subject.records is None:
        return Skip(subject.tokenizer_absent or subject.records_absent)
    evidence: dict[str, Any] = {}
    try:
        for name, error in _errors(subject):
            evidence[name] = error
            if not error <= TOLERANCE:
                message = "a document becomes another LoRA when it is internalized than in training"
                expected = f"{name}: the update of every module within {TOLERANCE:g} of the largest value"
                return _finding(message, expected, f"{error:.2g} off", evidence)
    except D2LError as refusal:
        return _finding("a saved run internalizes no document", "an adapter", str(refusal).splitlines()[0], evidence)
    return Pass(f"a document, changed and merged, becomes the trained LoRA to {max(evidence.values()):.1g}", evidence)


def _finding(message: str, expected: str, actual: str, evidence: dict[str, Any]) -> Fail:
    remedy = "load, cut and merge as training does: see `d2l explain EXP203`"
    return Fail(message=message, expected=expected, actual=actual, remedy=remedy, evidence=evidence)


def _errors(subject: "Subject") -> Iterator[tuple[str, float]]:
    """Yield what is internalized, and how far its update is from that of training."""
    states = _documents(subject)
    config, model = _config(subject, states[-1]), reading_twin(subject)
    rows = [row_of(subject, config, state) for state in states]
    trained = cache(lambda documents: _updates(subject, _lora(model, [rows[it] for it in documents])))

    def internalize(checkpoint: Path, folder: Path, documents: Sequence[int], **form: Any) -> dict[str, Tensor]:
        texts = [states[it].context for it in documents]
        subject.implementation.internalize(model.base, subject.chat, checkpoint, texts, folder, **form)
        return _written(folder)

    with saved(subject, config, rows[:1]) as checkpoint:
        internalize(checkpoint, checkpoint.parent / "one", (0,), dtype="bfloat16")  # what is rounded may not stay
        for name, folder, documents, form in CASES:
            written = internalize(checkpoint, checkpoint.parent / folder, documents, **form)
            yield name, _error(written, trained(documents))
        written = internalize(checkpoint, checkpoint.parent / "smaller", (0,), rank=SMALLER)
        yield f"the document in rank {SMALLER}", _distance_from_nearest(written, trained((0,)))
        with other_weights(model.hypernet), saved(subject, config, rows[:1]) as other, suppress(D2LError):
            # an adapter of another checkpoint may be refused as well as replaced
            written = internalize(other, checkpoint.parent / "one", (1,))
            yield "by another checkpoint", _error(written, _updates(subject, _lora(model, rows[1:])))
    with suppress(NotOffered):
        both = subject.implementation.merge([_lora(model, [row]) for row in rows])
        yield "LoRAs of two as one", _error(_updates(subject, both), trained((1, 0)))


def _documents(subject: "Subject") -> list["Record"]:
    """Return a document of the run with one question, long enough to be cut, with both of its ends."""
    (record,) = first_records(subject)
    record = replace(record, prompts=record.prompts[:1], responses=record.responses[:1])
    form, text = conversation_format(subject), record.context.strip()[:LETTERS]
    long = " ".join([text] * math.ceil(TOKENS / max(len(form.encode_contents(text)), 1)))
    return [replace(record, context=f"{long} {end}") for end in ENDS]


def _config(subject: "Subject", document: "Record") -> "RunConfig":
    """Return a light configuration that cuts the document into chunks, as the run cuts its own."""
    form = conversation_format(subject)
    affixes = max(len(prefix) + len(suffix) for prefix, suffix in form.affixes)
    room = math.ceil(len(form.encode_contents(document.context)) / CHUNKS)
    cuts = {"chunking": subject.config.chunking, "chunk_overlap": min(subject.config.chunk_overlap, room // 2)}
    return reading_config(subject, max_ctx_chunk_len=room + affixes, **cuts)


def _lora(model: "Model", rows: Sequence[Any]) -> "Lora":
    """Return the LoRA of the chunks of several documents as one."""
    return model.lora(collate([replace(rows[0], chunks=tuple(chunk for row in rows for chunk in row.chunks))]))


def _updates(subject: "Subject", lora: "Lora") -> dict[str, Tensor]:
    """Return scale · Bᵀ A of each adapted module, [d_out, d_in], by its path."""
    base = reading_twin(subject).base
    paths = {module: path for path, module in base.named_modules()}
    return {
        paths[module]: lora.scale * lora.B[name][0, layer].mT @ lora.A[name][0, layer]
        for name, modules in subject.implementation.targets(base, list(lora.A)).items()
        for layer, module in enumerate(modules)
    }


def _written(folder: Path) -> dict[str, Tensor]:
    """Return what the files of an adapter add to each module, [d_out, d_in], by its path, as PEFT applies them."""
    config, tensors = json.loads((folder / CONFIG).read_text(encoding="utf-8")), load_file(folder / WEIGHTS)
    factor, ending = config["lora_alpha"] / config["r"], ".lora_A.weight"
    names = [key.removeprefix(PREFIX).removesuffix(ending) for key in tensors if key.endswith(ending)]
    sides = {name: [tensors[f"{PREFIX}{name}.lora_{side}.weight"].float() for side in "BA"] for name in names}
    return {name: factor * b @ a for name, (b, a) in sides.items()}


def _error(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the largest difference over the largest expected value; infinite where modules or shapes differ."""
    shapes = [{name: x.shape for name, x in side.items()} for side in (found, expected)]
    if shapes[0] != shapes[1] or not all(x.isfinite().all() for x in found.values()):
        return math.inf
    largest = max(float(x.abs().max()) for x in expected.values())
    return max(float((found[name] - x).abs().max()) for name, x in expected.items()) / largest


def _distance_from_nearest(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return how much farther updates are from the expected ones than the nearest of the smaller rank, over their length.

    By Eckart and Young the nearest leaves the singular values beyond its rank. Infinite where modules, shapes or ranks differ.
    """
    if not math.isfinite(_error(found, expected)):
        return math.inf
    excess = [0.0]
    for name, x in expected.items():
        values, own = (torch.linalg.svdvals(it.double()) for it in (x, found[name]))
        if own[SMALLER:].norm() > TOLERANCE * own[0]:
            return math.inf
        excess.append(float((found[name] - x).double().norm() - values[SMALLER:].norm()) / float(values.norm()))
    return max(excess)


def _internalizing(change: Callable[[Sequence[str], dict[str, Any]], tuple[Sequence[str], dict[str, Any]]]) -> Any:
    """Make a fault that internalizes other documents, or in another form."""

    def internalize(
        healthy: Implementation, base: Any, chat: Any, checkpoint: Path, texts: Any, folder: Path, **form: Any
    ) -> None:
        documents, other = change(texts, form)
        healthy.internalize(base, chat, checkpoint, documents, folder, **other)

    return override(internalize=internalize)


def _end_lost(texts: Sequence[str], form: dict[str, Any]) -> tuple[Sequence[str], dict[str, Any]]:
    """Leave out the last quarter of every document."""
    return [text[: 3 * len(text) // 4] for text in texts], form


def _last_alone(texts: Sequence[str], form: dict[str, Any]) -> tuple[Sequence[str], dict[str, Any]]:
    """Write only the last of several documents."""
    return texts[-1:], form


def _last_ranks_lost(texts: Sequence[str], form: dict[str, Any]) -> tuple[Sequence[str], dict[str, Any]]:
    """Keep one rank less than asked for."""
    return texts, {**form, "rank": form["rank"] - 1} if "rank" in form else form


def _form_kept(texts: Sequence[str], form: dict[str, Any]) -> tuple[Sequence[str], dict[str, Any]]:
    """Write every adapter in bfloat16."""
    return texts, {**form, "dtype": "bfloat16"}


def _old_kept(healthy: Implementation, *arguments: Any, **form: Any) -> None:
    """Keep what lies in the folder, whatever document it is of."""
    if not arguments[-1].exists():
        healthy.internalize(*arguments, **form)


def _bias_in_each(healthy: Implementation, loras: Any) -> Any:
    """Put LoRAs side by side, each with its bias."""
    A, B = ({name: torch.cat([getattr(it, side)[name] for it in loras], dim=2) for name in loras[0].A} for side in "AB")
    return replace(loras[0], A=A, B=B)


def _bias_again(healthy: Implementation, *arguments: Any, **form: Any) -> None:
    """Count the bias, which has the last ranks, once for each document."""
    healthy.internalize(*arguments, **form)
    _, _, checkpoint, documents, folder = arguments
    _, values = healthy.read(checkpoint)
    rank = next(value.shape[-2] for name, value in values.items() if name.startswith("bias_A."))
    tensors = load_file(folder / WEIGHTS)
    for name, tensor in tensors.items():
        if name.endswith("lora_B.weight"):
            tensor[:, -rank:] *= len(documents)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


RULE = Rule(
    code="EXP203",
    name="internalized-otherwise",
    stage="data",
    severity="error",
    sources=("failure mode 15", "failure mode 22"),
    requires=("TGT101", "DAT303", "DAT309", "EXP201", "SAV201"),
    check=check,
    faults=(
        Fault("end-lost", "the last quarter of a document is not read", _internalizing(_end_lost)),
        Fault("old-kept", "an adapter that is there stays when its document changes", override(internalize=_old_kept)),
        Fault("form-kept", "an adapter keeps the number format of the one before", _internalizing(_form_kept)),
        Fault(
            "bias-in-each",
            "LoRAs are put together with the bias of each",
            override(merge=_bias_in_each, unless=lambda subject: "" if subject.config.use_bias else "use_bias is off"),
        ),
        Fault("rank-lost", "the nearest LoRA of a rank less is written", _internalizing(_last_ranks_lost)),
        Fault("last-alone", "of several documents the last one is written", _internalizing(_last_alone)),
        Fault(
            "bias-again",
            "the bias counts once for each of several documents",
            override(
                internalize=_bias_again, unless=lambda subject: "" if subject.config.use_bias else "use_bias is off"
            ),
        ),
    ),
)
