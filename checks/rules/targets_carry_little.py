"""The targets can carry a document: at least one of them was seen to, with the budget that the others had.

What it does
------------
Compares `target_modules` with what was measured for each module on a tiny GPT-OSS, and warns where none of them learnt
which value belongs to which key.

Why it matters
--------------
A LoRA on q_proj or k_proj only moves where a layer attends. Without the document in the prompt there is nothing to
attend to, so a fact has to come in as a value: through v_proj, o_proj, or beside the MLP block. A run on q_proj alone
is not broken, and no other check turns red: its loss falls, gradients arrive, and the answers hold values of the
document, without their keys, for a long time. The documented runs on gpt-oss-20b chose q_proj.

How it is detected
------------------
A table of one study (`benchmarks/targets.md`: the same steps, documents and hypernetwork for every module, three seeds,
exact match on unseen documents; chance .10, values without keys .50). It says what such a base learns in such a
budget, not what a larger one can learn in days: hence a warning. Modules that were not measured are not judged.

How to fix
----------
`target_modules: [v_proj]`, as in configs/gpt_oss_20b_recommended.yaml, or ignore the warning with your reason.

Source
------
benchmarks/targets.md; failure mode: the published GPT-OSS run on q_proj, F1 .098 on SQuAD without a control.
"""

from typing import TYPE_CHECKING

from checks.faults import configure
from checks.result import Fail, Pass, Result
from checks.rule import Fault, Rule

if TYPE_CHECKING:
    from checks.subject import Subject

# Mean exact match of three seeds, from benchmarks/targets.json (a test compares them).
MEASURED = {"k_proj": 0.0, "mlp": 0.0, "o_proj": 0.0, "q_proj": 0.0, "v_proj": 0.0}
WITHOUT_KEYS = 0.5  # the share that the values of a document reach by themselves, of two pairs


def run(subject: "Subject") -> Result:
    """The best of the targets that were measured."""
    names = subject.config.target_modules
    known = {name: MEASURED[name] for name in names if name in MEASURED}
    evidence = {"exact match of the study": MEASURED, "chance": 0.1, "values without keys": WITHOUT_KEYS}
    if len(known) < len(names) or max(known.values()) > WITHOUT_KEYS:
        told = ", ".join(f"{name} {known[name]:.2f}" if name in known else f"{name} not measured" for name in names)
        return Pass(f"{told} exact match in the study", evidence)
    best = max(MEASURED, key=lambda name: (name != "mlp", MEASURED[name]))
    return Fail(
        f"{', '.join(names)} learnt no more than values without their keys where {best} learnt both",
        f"a target above {WITHOUT_KEYS:.2f} in the study: "
        + ", ".join(f"{name} {value:.2f}" for name, value in MEASURED.items() if value > WITHOUT_KEYS),
        ", ".join(f"{name} {value:.2f}" for name, value in known.items()),
        f"set target_modules: [{best}]",
        evidence,
    )


RULE = Rule(
    code="TGT102",
    name="targets-carry-little",
    stage="static",
    severity="warning",
    source="benchmarks/targets.md",
    run=run,
    requires=("TGT101",),
    faults=(
        Fault("queries-only", "a LoRA on q_proj alone, as documented", configure(target_modules=("q_proj",))),
        Fault("keys-only", "a LoRA on k_proj alone", configure(target_modules=("k_proj",))),
    ),
)
