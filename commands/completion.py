"""What a shell offers behind an option: codes of checks and their stages."""

from collections.abc import Iterator

from checks.result import STAGES


def complete_checks(incomplete: str) -> Iterator[tuple[str, str]]:
    """Offer the codes of checks and their names, behind the last comma of what is typed."""
    from checks.plugins import full_catalogue

    before, comma, last = incomplete.rpartition(",")
    for check in sorted(full_catalogue(), key=lambda check: check.code):
        if check.code.startswith(last):
            yield f"{before}{comma}{check.code}", check.name


def complete_stages(incomplete: str) -> list[str]:
    """Offer the stages of a preflight."""
    return [stage for stage in STAGES if stage.startswith(incomplete)]
