"""Every installed distribution that registers checks has them judged.

What it does
------------
Imports what distributions register in the entry point group `d2l.checks`, and looks whether their checks are what a check has
to be: codes and names that nobody else has, known stages, complete documentation with sources, planted faults.

Why it matters
--------------
Who installs a team's checks wants runs held to them. A plugin that no longer imports, after an upgrade of a library, would
leave a report that is as green as before, with less behind it.

How it is detected
------------------
Each plugin is imported and judged by itself, so that one disturbs neither the other plugins nor the checks of d2l. One that
raises or lacks something is left out as a whole, and this check fails, for as long as it is installed.

How to fix
----------
Mend what the finding names, or uninstall the plugin. To go on without its checks: `--ignore PLG101=REASON`.
"""

from typing import TYPE_CHECKING

from checks.faults import override
from checks.plugins import Plugin
from checks.result import Fail, Pass, Result
from checks.rule import Fault, Rule

if TYPE_CHECKING:
    from checks.subject import Subject


def check(subject: "Subject") -> Result:
    """List the plugins and what is wrong with them."""
    plugins = subject.implementation.plugins()
    evidence = {f"{it.name}, {it.entry}": list(it.problems) or [rule.code for rule in it.rules] for it in plugins}
    refused = [plugin for plugin in plugins if plugin.problems]
    if not refused:
        count = sum(len(plugin.rules) for plugin in plugins)
        said = f"{count} checks of {', '.join(it.name for it in plugins)} are judged" if plugins else "there are none"
        return Pass(f"plugins: {said}", evidence)
    names = list(dict.fromkeys(plugin.name for plugin in refused))
    return Fail(
        message=f"installed checks are not judged: {', '.join(names)} cannot be loaded",
        expected="plugins that import, with checks that are complete",
        actual="\n".join(f"{it.name}, {it.entry}: {problem}" for it in refused for problem in it.problems),
        remedy=f"mend what is named, or pip uninstall {' '.join(name.partition(' ')[0] for name in names)}",
        evidence=evidence,
    )


def _one_refused(healthy: object) -> tuple[Plugin, ...]:
    return (
        Plugin("team-checks 1.0", "team = team_checks:RULES", problems=("ImportError: no module named torch_old",)),
    )


RULE = Rule(
    code="PLG101",
    name="plugin-not-loaded",
    stage="static",
    severity="error",
    sources=("docs/plugins.md",),
    check=check,
    faults=(Fault("import-fails", "a plugin that cannot be imported any more", override(plugins=_one_refused)),),
)
