"""The targets can carry a document: at least one of them was seen to, with the budget that the others had.

What it does
------------
Compares `target_modules` with what was measured for each module on a tiny GPT-OSS, and warns where none of them got
half-way from naming a value of the document to naming the one that belongs to the key.

Why it matters
--------------
A LoRA on q_proj or k_proj only moves where a layer attends. Without the document in the prompt there is nothing to
attend to, so a fact has to come in as a value: through v_proj, o_proj, or beside the MLP block. A run on q_proj alone
is not broken, and no other check turns red: its loss falls, gradients arrive, and for a long time the answers hold
values of the document without their keys. The documented runs on gpt-oss-20b chose q_proj.

How it is detected
------------------
A table of one study (experiments/targets.md: the same steps, documents and hypernetwork for every module, three seeds,
exact match on unseen documents of two keys; chance is .10, a value without its key .55). It shows what a tiny base
learns in a small budget, not what a larger one can learn in days: hence a warning. Modules that were not measured are
not judged. On SmolLM2-135M (experiments/smollm2.md) v_proj carries words of documents too, and so does down_proj, which
GPT-OSS has in its experts alone; by down_proj a document's questions all got one answer. Not tried there: several facts by v_proj
in a hypernetwork that reads words, and q_proj.

How to fix
----------
`target_modules: [v_proj]`, as in configs/gpt_oss_20b_recommended.yaml, or ignore the warning with your reason.
"""

from typing import TYPE_CHECKING

from checks.faults import configure
from checks.result import Fail, Pass, Result
from checks.rule import Fault, Rule

if TYPE_CHECKING:
    from checks.subject import Subject

# Mean exact match of three seeds, from experiments/targets.json (a test compares them).
MEASURED = {"k_proj": 0.62, "mlp": 0.96, "o_proj": 0.96, "q_proj": 0.66, "v_proj": 0.96}
GUESSED = 0.55  # a value of the document: one of two, or both alike by chance
HALF_WAY = (1 + GUESSED) / 2


def check(subject: "Subject") -> Result:
    """Look for the best of the targets that were measured."""
    names = subject.config.target_modules
    known = {name: MEASURED[name] for name in names if name in MEASURED}
    scores = ", ".join(f"{name} {known[name]:.2f}" if name in known else f"{name} not measured" for name in names)
    evidence = {"exact match in the study": MEASURED, "a value without its key": GUESSED, "chance": 0.1}
    if len(known) < len(names) or max(known.values()) >= HALF_WAY:
        return Pass(f"exact match in the study: {scores}", evidence)
    linear = {name: value for name, value in MEASURED.items() if name != "mlp"}  # PEFT has no format for the block
    best = max(linear, key=lambda name: (linear[name], name))
    return Fail(
        message=f"{', '.join(names)} learnt little more than values without their keys, where {best} learnt both",
        expected=f"a target with an exact match of {HALF_WAY:.2f} or more in the study",
        actual=scores,
        remedy=f"set target_modules: [{best}]",
        evidence=evidence,
    )


RULE = Rule(
    code="TGT102",
    name="targets-carry-little",
    stage="static",
    severity="warning",
    sources=("fix 9", "experiments/targets.md", "experiments/smollm2.md"),
    check=check,
    requires=("TGT101",),
    faults=(
        Fault("queries-only", "a LoRA on q_proj alone, as documented", configure(target_modules=("q_proj",))),
        Fault("keys-only", "a LoRA on k_proj alone", configure(target_modules=("k_proj",))),
    ),
)
