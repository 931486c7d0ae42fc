"""Everything about one name that a configuration may hold: own keys, those of the reference, and old names."""

from collections.abc import Iterable
from typing import Any

from d2l.config.huggingface import TRANSLATED
from d2l.config.keys import STAGES, Key, all_keys, in_yaml
from d2l.config.reference_keys import HAS_NO_EFFECT, UNSUPPORTED
from d2l.config.renamed import OLD_NAMES, OLD_STAGE_NAMES, NewName


def facts(name: str) -> dict[str, Any] | None:
    """Return what is known of a name as JSON values; None where there is no such name.

    `status` is `key`, `unsupported`, `without effect`, `translated` or `renamed`.
    """
    if key := _own(name):
        return {"status": "key"} | key.to_json() | {"old_names": old_names(key)}
    if name in UNSUPPORTED:
        accepted, reason = UNSUPPORTED[name]
        return {"status": "unsupported", "name": name, "accepted": list(accepted), "reason": reason}
    if name in HAS_NO_EFFECT:
        return {"status": "without effect", "name": name, "reason": HAS_NO_EFFECT[name]}
    if name in TRANSLATED:
        return {"status": "translated", "name": name, "text": TRANSLATED[name]}
    if found := _renamed(name):
        now, new = found
        values = {in_yaml(old): value for old, value in new.becomes.items()}
        return {"status": "renamed", "name": name, "now": now, "values": values, "origin": new.origin}
    return None


def explain(name: str) -> str | None:
    """Return what is known of a name as text; None where there is no such name."""
    if key := _own(name):
        return _everything(key)
    if name in UNSUPPORTED:
        values, reason = UNSUPPORTED[name]
        accepted = " or ".join(dict.fromkeys(map(in_yaml, values)))
        return f"{name}\nA key of the reference that d2l does not have.\n\naccepted   {accepted}\notherwise  refused: {reason}"
    if name in HAS_NO_EFFECT:
        return f"{name}\nA key of the reference without an effect here: {HAS_NO_EFFECT[name]}.\n\naccepted   any value"
    if name in TRANSLATED:
        return f"{name}\nA key of the reference that is translated: {TRANSLATED[name]}."
    if found := _renamed(name):
        now, new = found
        return f"{name}\nAn old name ({new.origin}), read with a note; now {described(new)}.\n\n{explain(now)}"
    return None


def as_lines(keys: Iterable[Key]) -> str:
    """Return one line for each key: name, type, default and meaning, in columns."""
    rows = [(key.name, key.kind, key.default, key.text) for key in keys]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join("  ".join([*(f"{row[i]:<{widths[i]}}" for i in range(3)), row[3]]) for row in rows)


def described(new: NewName, *, mark: str = "") -> str:
    """Return a new name, and what each value has become; `mark` stands around the name."""
    values = ", ".join(f"{in_yaml(old)} → {value}" for old, value in new.becomes.items())
    return f"{mark}{new.name}{mark}{f' ({values})' if values else ''}"


def old_names(key: Key) -> list[str]:
    """Return the names that a key had."""
    table = OLD_STAGE_NAMES if key.name.startswith(f"{STAGES}.") else OLD_NAMES
    return [old for old, new in table.items() if new.name == key.field]


def _own(name: str) -> Key | None:
    keys = all_keys()
    return keys.get(name) or keys.get(f"{STAGES}.{name}")


def _renamed(name: str) -> tuple[str, NewName] | None:
    """Return the key that a name is called now, and how it has changed."""
    if new := OLD_NAMES.get(name):
        return new.name, new
    new = OLD_STAGE_NAMES.get(name.removeprefix(f"{STAGES}."))
    return None if new is None else (f"{STAGES}.{new.name}", new)


def _everything(key: Key) -> str:
    facts = {
        "group": key.group,
        "type": key.type,
        "default": key.default,
        "range": key.range or "any",
        "effect": key.effect,
        "reference": key.reference,
        "old name": ", ".join(old_names(key)),
    }
    lines = [f"{label:<9}  {text.replace('`', '')}" for label, text in facts.items() if text]
    if key.name == STAGES:
        entry = [it for it in all_keys().values() if it.name.startswith(f"{STAGES}.")]
        lines += ["", "Keys of an entry:", as_lines(entry)]
    return "\n".join([key.name, f"{key.text}.", "", *lines])
