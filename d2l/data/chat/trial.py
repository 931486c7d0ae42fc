"""Trial of a foreign chat template in a process of its own: one that never ends, or fills the memory, is refused.

A template is a program that comes with a tokenizer. Jinja's sandbox keeps it from the machine, but loops in loops and
repeated text are allowed there. The process runs this very file, without d2l and transformers, which take seconds to
import; what a template writes does not matter here, only that it ends.
"""

import json
import subprocess
import sys
from functools import lru_cache
from typing import Any

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_SECONDS, WALL_SECONDS = 5, 60  # the published templates take 0.1 s; a busy machine may take long to start a process
MEMORY = 1 << 30  # bytes of address space; the process itself needs 50 MB
LONGEST = 10_000_000  # characters of a rendered conversation
LETTERS = 10_000  # of the longer question and answer: a loop over letters in another is 10^8 steps, and too slow
_NO_MEMORY, _TOO_LONG = 3, 4  # exit codes


@lru_cache(maxsize=64)
def why_not_bounded(template: str, variables: str) -> str:
    """Render short and long conversations in a process of its own; return why it was ended, empty where it was not.

    Errors of the template are no reason: whoever renders with it reports them.

    Args:
        variables: the template's variables besides the conversation, as JSON.
    """
    task = json.dumps({"template": template, "variables": json.loads(variables)})
    try:
        done = subprocess.run(
            [sys.executable, "-P", __file__],
            input=task.encode(),
            capture_output=True,
            timeout=WALL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"it did not end within {WALL_SECONDS} s"
    except OSError:  # no process can be started here
        return ""
    if done.returncode < 0:
        return f"it did not end within {CPU_SECONDS} s of computing"
    if done.returncode == _NO_MEMORY:
        return f"it needs more than {MEMORY >> 20:,} MiB"
    return f"it writes more than {LONGEST:,} characters" if done.returncode == _TOO_LONG else ""


class _Generation(Extension):
    """The tag that marks what the assistant says: here its text alone."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own attribute)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _render_all(template: str, variables: dict[str, Any]) -> None:
    """Render a short conversation and a long one, with and without a prompt for the next turn."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = json.dumps
    compiled = environment.from_string(template)
    for length in (5, LETTERS):
        turns = [{"role": role, "content": ("ab <" * length)[:length]} for role in ("user", "assistant")]
        for messages, is_prompt in ((turns, False), (turns[:1], True)):
            written = 0
            for part in compiled.generate(messages=messages, tools=None, add_generation_prompt=is_prompt, **variables):
                written += len(part)
                if written > LONGEST:
                    sys.exit(_TOO_LONG)


def _main() -> None:
    """Render the task of standard input within the limits."""
    task = json.load(sys.stdin)
    try:
        import resource
    except ImportError:  # Windows: only the time on the wall is limited
        pass
    else:
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        _render_all(task["template"], task["variables"])
    except MemoryError:
        sys.exit(_NO_MEMORY)
    except Exception:  # reported by whoever renders with it
        sys.exit(0)


if __name__ == "__main__":
    _main()
