"""The forms in which a report is handed over: text and JSON, and those of test runners, code scanners, GitHub and browsers."""

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Literal

from checks.result import FailLevel, Report, UsageError

if TYPE_CHECKING:
    from checks.selftest import Selftest

ReportFormat = Literal["text", "json", "junit", "sarif", "github", "html"]
OF_A_SELFTEST = ("text", "json", "junit")
_WRITERS: dict[ReportFormat, str] = {  # format -> module and function: each is imported where it is asked for
    "text": "checks.report:plain_text",
    "json": "checks.report:json_text",
    "junit": "checks.formats.junit:junit_text",
    "sarif": "checks.formats.sarif:sarif_text",
    "github": "checks.formats.github:github_text",
    "html": "checks.formats.page:page_text",
}


def write_report(report: "Report | Selftest", form: ReportFormat, fail_level: FailLevel = "error") -> str:
    """Return the report in this format; a selftest has some of them only, see `require_format`."""
    module, _, name = _WRITERS[form].partition(":")
    writer: Callable[[Report | Selftest, FailLevel], str] = getattr(import_module(module), name)
    return writer(report, fail_level)


def require_format(form: ReportFormat, *, selftest: bool) -> None:
    """Require a format that the report can have.

    Raises:
        UsageError: it describes findings of a configuration, of which a selftest has none.
    """
    if selftest and form not in OF_A_SELFTEST:
        raise UsageError(
            f"--format {form} describes findings of a configuration, and a selftest has planted faults: "
            f"choose one of {', '.join(OF_A_SELFTEST)}"
        )
