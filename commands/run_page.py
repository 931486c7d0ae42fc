"""One HTML page about a run, without any outer resource; everything that comes from files is escaped by the template."""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape
from io import BytesIO
from pathlib import Path
from shlex import quote
from typing import Any

from jinja2 import Environment

from commands.progress import clock
from d2l.config.keys import in_yaml
from d2l.config.load import load_config
from d2l.errors import D2LError
from d2l.evaluation.curves import PANELS, Panel, draw_curves
from d2l.evaluation.sample import Sample, sample_row
from d2l.io.run_folder import CONFIG, EVALUATIONS, PREFLIGHT
from d2l.train.history import RunHistory, heldout_losses, loss_keys, peak_keys, series, speeds

TEMPLATE = Path(__file__).with_name("run_page.html")
FINDINGS = ("fail", "crash", "warn")
DETAILS = ("expected", "actual", "remedy")
INK = "#010203"  # stands for the page's own colour of text while matplotlib draws
FIRST_STEP = {
    **dict.fromkeys(loss_keys(), "loss"),
    "grad_norm": "gradient norm",
    "context_tokens": "document tokens",
    "seconds": "seconds",
    "cuda_peak_gib": "peak on the GPU in GiB",
    "resident_peak_gib": "peak on the host in GiB",
}
SCORES = {"exact": "exact match", "f1": "F1", "rouge_l": "ROUGE-L", "perplexity": "perplexity"}


def render_page(history: RunHistory, now: float) -> str:
    """Return the page.

    Args:
        now: seconds since 1970, which ages are counted to.
    """
    sample, no_sample = _sample(history)
    outcomes = _outcomes(history.preflight)
    page = Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    return page.render(
        name=history.folder.resolve().name,
        summary=_summary(history, now),
        outcomes=outcomes,
        findings=[outcome for outcome in outcomes if outcome["kind"] in FINDINGS],
        counts=_counts(outcomes),
        curves=[curve for curve in (_curve(history, panel) for panel in PANELS) if curve],
        sample=sample,
        no_sample=no_sample,
        evaluations=[*_heldout(history), *_evaluations(history.folder)],
        evaluate=f"d2l eval {quote(str(history.folder))} --data FILE -o {quote(str(history.folder / 'evaluation.json'))}",
        memory=_memory(history, outcomes),
        checkpoints=[
            (entry.folder.name, f"{entry.size / 2**20:,.1f} MiB, {_time(entry.written)}")
            for entry in history.checkpoints
        ],
        events=[(_time(event.time), event.text) for event in history.events],
        versions=_versions(history.preflight),
        config=[(str(key), in_yaml(value)) for key, value in history.config.items()],
    )


def _summary(history: RunHistory, now: float) -> list[tuple[str, str]]:
    """Return how the run stands, in a few rows; what is unknown is left out."""
    rows = [("folder", str(history.folder.resolve())), ("state", history.state(now))]
    most = "" if history.max_steps is None else f" of {history.max_steps:,}"
    rows.append(("step", f"{history.step:,}{most}"))
    lines = {
        "loss": series(history.records, loss_keys()),
        "held-out loss": heldout_losses(history),
        "tokens a second": speeds(history.records),
    }
    for label, values in lines.items():
        if values:
            rows.append((label, f"{values[-1][1]:,.4g} (first {values[0][1]:,.4g})"))
    if history.first_step:
        rows.append(("first step", _first_step(history.first_step)))
    seconds = [value for _, value in series(history.records, ["seconds"])]
    if seconds:
        rows.append(("time in steps", clock(sum(seconds))))
    if history.eta and history.state(now).startswith("running"):
        rows.append(("remaining", clock(history.eta)))
    if history.written is not None:
        rows.append(("last written", _time(history.written)))
    if history.damaged:
        rows.append(("lines of metrics that cannot be read", str(history.damaged)))
    return rows


def _first_step(figures: Mapping[str, Mapping[str, float]]) -> str:
    """Write what was measured of the first step, each with what was predicted."""
    measured, predicted = (figures.get(name, {}) for name in ("measured", "predicted"))
    return "; ".join(
        f"{label} {_number(measured.get(key))}"
        + (f" (predicted {_number(predicted[key])})" if key in predicted else "")
        for key, label in FIRST_STEP.items()
        if key in measured or key in predicted
    )


def _outcomes(preflight: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the outcomes of the checks as text; those of another shape are left out."""
    found = preflight.get("outcomes")
    outcomes = [it for it in found if isinstance(it, dict)] if isinstance(found, list) else []
    return [
        {
            "kind": str(it.get("outcome", "?")),
            **{key: str(it.get(key, "")) for key in ("code", "name", "message")},
            "details": [(key, str(it[key])) for key in DETAILS if it.get(key)],
        }
        for it in outcomes
    ]


def _counts(outcomes: Sequence[Mapping[str, Any]]) -> str:
    kinds = [outcome["kind"] for outcome in outcomes]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))


def _curve(history: RunHistory, panel: Panel) -> str:
    """Return a curve as an SVG element whose text has the page's colour; empty where there are no values."""
    drawn, settings = BytesIO(), {"svg.fonttype": "none", "svg.hashsalt": panel.title}  # the salt of ids in the page
    try:
        draw_curves([history], drawn, ".svg", panels=[panel], colour=INK, **settings)
    except D2LError:
        return ""
    text = drawn.getvalue().decode("utf-8")
    element = text[text.index("<svg") :].replace(INK, "currentColor")
    element = re.sub(r'(?<=<g) id="[^"]*"', "", element)  # such as figure_1, in every curve
    element = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", element, flags=re.DOTALL)
    return element.replace("<svg ", f'<svg role="img" aria-label="{escape(panel.title)} over steps" ', 1)


def _sample(history: RunHistory) -> tuple[Sample | None, str]:
    """Return a packed row of the run's data as it is now, or why there is none."""
    try:
        return sample_row(load_config(history.folder / CONFIG)), ""
    except (D2LError, OSError) as error:
        return None, f"The run's data cannot be shown: {error}"


def _heldout(history: RunHistory) -> list[dict[str, Any]]:
    """Return a table of the newest evaluation that the run made of its held-out documents."""
    from d2l.evaluation.scores import LABELS

    found = history.evaluations[-1] if history.evaluations else {}
    keys = [key for key in (*loss_keys(), "exact_match") if f"document_{key}" in found]
    rows = [
        (label, [_number(found.get(f"{control}_{key}")) for key in keys])
        for control, label in LABELS.items()
        if f"{control}_exact_match" in found
    ]
    title = f"step {found.get('step')}; distance of two LoRAs: {_number(found.get('lora_distance'))}"
    return [{"name": EVALUATIONS, "title": title, "header": keys, "rows": rows}] if rows else []


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-"


def _evaluations(folder: Path) -> list[dict[str, Any]]:
    """Return the tables of the evaluations in the run's folder, which `d2l eval -o` wrote."""
    from d2l.evaluation.scores import LABELS

    found = []
    for path in sorted(folder.glob("*.json")):
        scores = _scores(path) if path.name != PREFLIGHT else {}
        rows = [
            (label, [_estimate(scores[condition].get(score)) for score in SCORES])
            for condition, label in LABELS.items()
            if isinstance(scores.get(condition), dict)
        ]
        if rows:
            found.append({"name": path.name, "title": "", "header": list(SCORES.values()), "rows": rows})
    return found


def _scores(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    scores = values.get("scores") if isinstance(values, dict) else None
    return scores if isinstance(scores, dict) else {}


def _estimate(value: Any) -> str:
    """Write an estimate with its interval."""
    try:
        return f"{value['value']:.3g} [{value['low']:.3g}, {value['high']:.3g}]"
    except (KeyError, TypeError, ValueError):
        return "-"


def _memory(history: RunHistory, outcomes: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return the measured peak, and what the preflight reckoned."""
    kinds = {"cuda": "peak of torch's allocator on the GPU", "resident": "peak of the process's memory on the host"}
    rows = []
    for key in peak_keys():
        if values := series(history.records, [key]):
            rows.append((kinds[key.partition("_")[0]], f"{max(value for _, value in values):.2f} GiB"))
    return rows + [
        (f"{it['code']} {it['name']}", it["message"])
        for it in outcomes
        if it["code"].startswith("MEM") and it["message"]
    ]


def _versions(preflight: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what the preflight judged, versions among it."""
    judged = preflight.get("judged")
    rows = [("d2l", preflight["version"])] if "version" in preflight else []
    return rows + [(str(key), str(value)) for key, value in (judged.items() if isinstance(judged, dict) else ())]


def _time(seconds: float | None) -> str:
    """Write a time with its zone; empty where it is unknown."""
    return "" if seconds is None else datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "seconds")
