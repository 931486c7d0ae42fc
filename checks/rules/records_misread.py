"""Records are what the files of the data hold, and generated documents state the answers to their questions.

What it does
------------
Reads the files that `train_ds_names` names once more, with plain json and pyarrow, and compares every record. Counts the
generated needles by the configuration, and looks each one up in its document. Then lets the run read two small files and
needles at once, and a file with a broken line.

Why it matters
--------------
Records that are lost or exchanged in reading make the run shorter and other than believed, and nothing downstream can
tell. A question whose answer is not in its document teaches to guess.

How it is detected
------------------
Documents, questions and answers must be those of the files, in their order; every needle's sentence must be in its
document; the broken file must be refused.

How to fix
----------
Read every file that is named, record by record, and stop at a record that cannot be read.
"""

import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checks.faults import override
from checks.implementation import Implementation
from checks.oracles.record_files import Content, read_file
from checks.result import Fail, NotApplicable, NotOffered, Pass, Result, Skip
from checks.rule import Fault, Rule
from checks.subject import changed
from d2l.errors import D2LError

if TYPE_CHECKING:
    from checks.subject import Subject
    from d2l.config.schema import RunConfig
    from d2l.data.records import Record

NEEDLE = "needle"  # the name of generated data
SENTENCES = re.compile(r"What is the value of (.+)\?")
NEEDLES = {"needle_documents": 3, "needle_pairs": 2, "needle_filler_words": 8, "needle_digits": 2}
PROBE: tuple[Content, ...] = (
    ("The bridge is red.\nIt was built in 1912.", ("Which colour is the bridge?", "When?"), ("Red.", "In 1912.")),
    ("A tower stands in Łódź.", ("Where does the tower stand?",), ("In Łódź.",)),
)
BROKEN = '{"context": "A document without an answer.", "prompts": ["What?"]}'
PARTS = ("another document", "other questions", "other answers")
REMEDY = "read every file that train_ds_names names, record by record, and stop at one that cannot be read"


def check(subject: "Subject") -> Result:
    """Compare the run's records with its files, then what it reads of a probe."""
    if subject.records is None:
        return Skip(subject.records_absent)
    problems = [*_problems(subject.config, subject.records)]
    not_read = [
        name for name in subject.config.train_ds_names if name != NEEDLE and _content(subject.config, name) is None
    ]
    if not problems:
        problems = [*_probe_problems(subject)]
    evidence = {"records": len(subject.records), "not_compared": not_read, "faults": problems[:8]}
    if problems:
        return Fail(
            message="records are not what the data holds",
            expected="every record of every file, in order and unchanged, and needles that their documents state",
            actual=problems[0],
            remedy=REMEDY,
            evidence=evidence,
        )
    source = "" if not not_read else f" (not compared: {', '.join(not_read)})"
    return Pass(f"{len(subject.records):,} records are what the data holds{source}", evidence)


def _content(config: "RunConfig", name: str) -> Sequence[Content] | None:
    """Return what a file holds, read independently; None for what cannot be."""
    return read_file(name, config.max_train_samples_per_ds)


def _problems(config: "RunConfig", records: "Sequence[Record]") -> Iterator[str]:
    """Yield the first difference between the data and the records that were read, for each name."""
    start = 0
    for name in config.train_ds_names:
        if name == NEEDLE:
            expected = _needle_counts(config)
            needles = records[start : start + len(expected)]
            yield from _needle_problems(needles, expected)
            start += len(expected)
            continue
        content = _content(config, name)
        if content is None:
            return  # how many there are is not known, so what follows cannot be placed
        read = records[start : start + len(content)]
        for number, (record, wanted) in enumerate(zip(read, content, strict=False)):
            if (record.context, record.prompts, record.responses) != wanted:
                parts = zip(PARTS, (record.context, record.prompts, record.responses), wanted, strict=True)
                what = next(part for part, found, held in parts if found != held)
                yield f"record {number} of {name} is read with {what} than the file holds ({record.source})"
                break
        if len(read) != len(content):
            yield f"records are lost in reading: {len(read):,} of the {len(content):,} in {name}"
        start += len(content)
    if config.train_ds_names and start != len(records):
        yield f"records are not in the files: {len(records):,} were read, {start:,} are there"


def _needle_counts(config: "RunConfig") -> list[int]:
    """Return the questions of each document that the configuration requests."""
    counts: list[int] = []
    for stage in config.stages:
        counts += ([stage.pairs] * config.documents_of(stage))[: config.max_train_samples_per_ds]
    return counts


def _needle_problems(needles: "Sequence[Record]", expected: list[int]) -> Iterator[str]:
    """Yield what is wrong with generated documents: their number, their questions, or answers that they do not state."""
    actual = [len(record.prompts) for record in needles]
    if actual != expected:
        yield (
            f"needles are lost: {sum(actual):,} questions of {len(actual):,} documents are generated, the "
            f"configuration requests {sum(expected):,} of {len(expected):,}"
        )
    for record in needles:
        for prompt, response in zip(record.prompts, record.responses, strict=True):
            asked = SENTENCES.fullmatch(prompt)
            stated = f"The value of {asked[1]} is {response}." if asked else response
            if stated not in record.context or not (asked or response.startswith(f"{prompt} ")):
                yield f"{record.source} does not state the answer {response!r} to {prompt!r}"
                return


def _probe_problems(subject: "Subject") -> Iterator[str]:
    """Yield what is wrong with the reading of small files."""
    try:
        read = subject.implementation.records
    except NotOffered:
        return
    with tempfile.TemporaryDirectory(prefix="d2l-") as folder:
        names = [str(Path(folder) / f"{number}.jsonl") for number in range(len(PROBE))]
        for name, (context, prompts, responses) in zip(names, PROBE, strict=True):
            line = json.dumps({"context": context, "prompts": prompts, "responses": responses}, ensure_ascii=False)
            Path(name).write_text(f"{line}\n", encoding="utf-8")
        limits: dict[str, Any] = {"max_train_samples_per_ds": None, "curriculum": (), **NEEDLES}
        config = changed(subject.config, train_ds_names=[*names, NEEDLE], **limits)
        yield from (f"a probe of two files and needles: {problem}" for problem in _problems(config, read(config)))
        broken = Path(names[0])
        broken.write_text(f"{broken.read_text(encoding='utf-8')}{BROKEN}\n", encoding="utf-8")
        try:
            count = len(read(changed(config, train_ds_names=names[:1])))
        except D2LError:
            return
        yield f"a file whose second record has no answers is not refused: {count} records are read of it"


def _plant_lost_record(subject: "Subject") -> "Subject":
    """Read all but the last record."""
    if subject.records is None or len(subject.records) < 2:
        raise NotApplicable(subject.records_absent or "there is one record only")
    return replace(subject, records=subject.records[:-1])


def _plant_exchanged_answers(subject: "Subject") -> "Subject":
    """Give every record the answers of the one before it with as many."""
    if subject.records is None:
        raise NotApplicable(subject.records_absent)
    records = [*subject.records]
    if all(record.responses == records[0].responses for record in records):
        raise NotApplicable("all records have the same answers")
    if any(len(record.responses) != len(records[0].responses) for record in records):
        raise NotApplicable("records have answers of different numbers")
    moved = [replace(record, responses=records[index - 1].responses) for index, record in enumerate(records)]
    return replace(subject, records=tuple(moved))


def _last_file_alone(healthy: Implementation, config: Any) -> Any:
    return healthy.records(changed(config, train_ds_names=config.train_ds_names[-1:]))


def _broken_passed_over(healthy: Implementation, config: Any) -> Any:
    """Read a file without the lines that cannot be read."""
    try:
        return healthy.records(config)
    except D2LError:
        path = Path(config.train_ds_names[0])
        path.write_text(path.read_text(encoding="utf-8").splitlines()[0], encoding="utf-8")
        return healthy.records(config)


RULE = Rule(
    code="DAT307",
    name="records-misread",
    stage="data",
    severity="error",
    sources=("failure mode 6", "https://jsonlines.org/"),
    check=check,
    faults=(
        Fault("record-not-read", "the last record of the data is not read", _plant_lost_record),
        Fault("answers-exchanged", "every record has another one's answers", _plant_exchanged_answers),
        Fault("last-file-alone", "of several files the last one alone is read", override(records=_last_file_alone)),
        Fault(
            "broken-passed-over",
            "a record that cannot be read is left out without a word",
            override(records=_broken_passed_over),
        ),
    ),
)
