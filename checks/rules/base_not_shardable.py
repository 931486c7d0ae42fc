"""A base that is to be sharded over the processes can be.

What it does
------------
Where the configuration says `base_sharding: full`, reads from the loading plan how the base's weights would be held.

Why it matters
--------------
FSDP2 shards parameters. Packed experts are buffers of bytes: each process would hold all of them, as without sharding, and
they are nine tenths of gpt-oss-20b. The run stops when the base is loaded, after its data was tokenized.

How it is detected
------------------
The plan's experts must be `dequantize` or `dense`, its quantization none or that of MXFP4. How many processes there will be
is not known before they are started; with one, the run is refused when it loads the base.

How to fix
----------
Set `base_sharding: none`: in MXFP4 the whole base takes 13 GB. To shard it in bfloat16, set `expert_weights: dequantize`.
"""

from typing import TYPE_CHECKING

from checks.faults import configure
from checks.result import Fail, NotApplicable, Pass, Result
from checks.rule import Fault, Rule

if TYPE_CHECKING:
    from checks.subject import Subject


def check(subject: "Subject") -> Result:
    """Look at how the plan holds the weights that are to be sharded."""
    if subject.config.base_sharding == "none":
        return Pass("base_sharding: none: each process holds the whole base")
    from d2l.base.sharding import sharding_obstacle

    experts, quantization = subject.plan.experts, subject.plan.quantization
    evidence = {"experts": experts.value, "quantization": quantization.value}
    if obstacle := sharding_obstacle(subject.plan):
        return Fail(
            message="the base cannot be sharded",
            expected="weights that are parameters: experts dense or dequantize, no quantization but MXFP4",
            actual=obstacle,
            remedy="set base_sharding: none, or for experts in MXFP4 expert_weights: dequantize",
            evidence=evidence,
            settings={"base_sharding": "none"},
        )
    return Pass(f"each process holds a share of every weight; experts: {experts.value} ({experts.reason})", evidence)


def _of_bytes(subject: "Subject") -> "Subject":
    """Ask for a sharded base whose experts are packed."""
    if subject.plan.experts.value in ("dense", "dequantize"):
        raise NotApplicable("the experts are not packed")
    return configure(base_sharding="full")(subject)


RULE = Rule(
    code="BAS101",
    name="base-not-shardable",
    stage="static",
    severity="error",
    sources=("https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html",),
    requires=("QNT101", "QNT102"),
    check=check,
    faults=(Fault("packed-experts", "base_sharding: full with packed experts", _of_bytes),),
)
