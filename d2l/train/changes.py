"""What differs between a checkpoint's run and the run that would go on from it, and what of it its user allows."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from d2l.config.schema import REMARKS, RunConfig
from d2l.config.suggest import hint
from d2l.errors import CheckpointError
from d2l.fingerprint import Fingerprint
from d2l.train.folder import Change
from d2l.train.optimizer import learning_rates

# Settings that may change when a run is resumed: how often it saves and reports, paths, what its memory may be,
# and which findings are accepted.
CHANGEABLE = {
    "save_steps",
    "save_total_limit",
    "grace_seconds",
    "output_dir",
    "cache",
    "cache_dir",
    "device_memory",
    "expert_transient_gib",
    "base_sharding",
    "logging_steps",
    "report_to",
    "select_checks",
    "ignore_checks",
}
# Settings that decide how many weights the hypernetwork has, and of what shapes: no checkpoint of others can be loaded.
SHAPES = {
    *("lora_r", "target_modules", "ctx_encoder_type", "latent_size", "n_latent_queries", "num_blocks"),
    *("num_self_attn_per_block", "perceiver_heads", "perceiver_head_dim", "per_rank_gen", "per_layer_processing"),
    *("num_pre_head_layers", "use_bias"),
}
PARTS = ("data", "base_config", "tokenizer", "chat")  # of the fingerprint, whatever the configuration calls them
_STEPS, _ACCUMULATION = "max_steps", "gradient_accumulation_steps"


@dataclass(frozen=True)
class Difference:
    """One thing that differs.

    Attributes:
        field: what `--allow-change` calls it.
        was, now: JSON values, in the checkpoint and in the run that would go on.
        text: both in words.
        advice: what else could be done, if anything.
    """

    field: str
    was: Any
    now: Any
    text: str
    advice: str = ""


def require_known(fields: Collection[str]) -> None:
    """Refuse names that nothing has.

    Raises:
        CheckpointError: it is neither a configuration key nor a part of the fingerprint.
    """
    for name in fields:
        if name == REMARKS or (name not in RunConfig.model_fields and name not in PARTS):
            raise CheckpointError(
                f"--allow-change {name}: expected a configuration key or one of {', '.join(PARTS)}; {hint(name)}"
            )


def allow(
    differences: Sequence[Difference], reasons: Mapping[str, str], earlier: Sequence[Change], step: int, heading: str
) -> list[Change]:
    """Return the differences that are allowed here, as changes; those that were allowed to this run before are none.

    Args:
        reasons: field → reason, of `--allow-change`.
        earlier: changes that the run records.
        step: of the checkpoint.
        heading: first line of the message.

    Raises:
        CheckpointError: some are not allowed; the message has a line for each.
    """
    known = [(change.field, change.now) for change in earlier]
    new = [it for it in differences if (it.field, it.now) not in known]
    if shapes := [it for it in new if it.field in SHAPES]:
        advice = "the checkpoint's weights have other shapes: leave these as they were, or start a new run"
        raise CheckpointError("\n".join([heading, *_lines(shapes), advice]))
    refused = [it for it in new if it.field not in reasons]
    if refused:
        fields = " ".join(f"--allow-change {it.field}=REASON" for it in refused)
        raise CheckpointError("\n".join([heading, *_lines(refused), f"to go on all the same: {fields}"]))
    return [Change(step, it.field, it.was, it.now, reasons[it.field]) for it in new]


def _lines(differences: Sequence[Difference]) -> list[str]:
    return [f"  {line}" for it in differences for line in (f"{it.field}: {it.text}", it.advice) if line]


def compare_configs(then: RunConfig, now: RunConfig, state: Mapping[str, Any], processes: int) -> Iterator[Difference]:
    """Yield what differs between the configuration of a checkpoint and the one to go on with.

    Args:
        state: of the checkpoint.
        processes: those that share each step now.
    """
    ours, theirs = now.resolved(), then.resolved()
    for key in ours:
        if key == _ACCUMULATION and "processes" in state:
            yield from _compare_batches(then, now, state["processes"], processes)
        elif key == _STEPS:
            yield from _compare_schedules(then, now, state["step"])
        elif key not in CHANGEABLE and ours[key] != theirs[key]:
            text = f"{theirs[key]!r} in the checkpoint, {ours[key]!r} now"
            yield Difference(key, theirs[key], ours[key], text)


def _compare_batches(then: RunConfig, now: RunConfig, before: int, processes: int) -> Iterator[Difference]:
    """Compare the micro-batches of a step: accumulated ones times processes."""
    was, found = then.gradient_accumulation_steps * before, now.gradient_accumulation_steps * processes
    if was == found:
        return
    advice = f"for the same: --set {_ACCUMULATION}={was // processes}"
    if was % processes:
        counts = [str(count) for count in range(1, was + 1) if was % count == 0]
        advice = (
            f"{processes} processes cannot share {was} micro-batches; for the same, resume on {' or '.join(counts)}"
        )
    yield Difference(
        _ACCUMULATION,
        [then.gradient_accumulation_steps, before],
        [now.gradient_accumulation_steps, processes],
        f"{then.gradient_accumulation_steps} on {_count(before)} = {was} micro-batches a step in the checkpoint, "
        f"{now.gradient_accumulation_steps} on {_count(processes)} = {found} now",
        advice,
    )


def _compare_schedules(then: RunConfig, now: RunConfig, taken: int) -> Iterator[Difference]:
    """Compare the learning rates of the steps taken with those of a run of another length.

    Where they agree, as before a decay or without one, the run goes on as if it had always had that length.
    """
    other = then.model_copy(update={_STEPS: now.max_steps})
    if now.max_steps == then.max_steps or learning_rates(then, range(taken)) == learning_rates(other, range(taken)):
        return
    (last,), (following,) = learning_rates(then, [taken - 1]), learning_rates(other, [taken])
    yield Difference(
        _STEPS,
        then.max_steps,
        now.max_steps,
        f"{then.max_steps} in the checkpoint, {now.max_steps} now, and the {taken} steps taken had other learning rates "
        f"than in a run of {now.max_steps} (lr_scheduler_type: {then.lr_scheduler_type})",
        f"leave it at {then.max_steps}, or start anew with {now.max_steps}; if it is allowed, the learning rate goes on as "
        f"in a run of {now.max_steps}: from {last:.3g} in step {taken} to {following:.3g} in step {taken + 1}. A run whose "
        "length is open has constant_with_warmup, or warmup_stable_decay and is made longer before its decay",
    )


def compare_inputs(then: Mapping[str, Any], now: Fingerprint) -> Iterator[Difference]:
    """Yield what differs between the data and base of a checkpoint and those to go on with.

    Args:
        then: a fingerprint's JSON values.
    """
    was = Fingerprint(**then)
    for part in PARTS:
        if was.parts[part] != now.parts[part]:
            text = f"{was.parts[part][:12]} in the checkpoint, {now.parts[part][:12]} now (sha256)"
            if part == "data":
                text = f"{text}; {was.records:,} records then, {now.records:,} now"
            if part == "base_config":
                text = "; ".join(_name_values(was.base_config, now.base_config))
            yield Difference(part, was.parts[part], now.parts[part], text)


def other_versions(then: Mapping[str, Any], now: Fingerprint) -> list[str]:
    """List the libraries that have another version now; that is nothing that has to be allowed."""
    was = Fingerprint(**then).parts
    return [
        f"{name} is {now.parts[name]}, and was {was[name]} when the checkpoint was made"
        for name in now.parts
        if name not in (*PARTS, "config") and name in was and was[name] != now.parts[name]
    ]


def _name_values(was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Name the values that differ, each with both of its values."""
    for key in sorted(was.keys() | now.keys()):
        if was.get(key) != now.get(key):
            yield f"{key} {was.get(key)!r} in the checkpoint, {now.get(key)!r} now"


def _count(processes: int) -> str:
    return f"{processes} process" if processes == 1 else f"{processes} processes"
