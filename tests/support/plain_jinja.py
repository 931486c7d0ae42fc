"""The shipped GPT-OSS template under plain jinja2, set up as chat templates are everywhere."""

import json
from datetime import date
from functools import cache
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from d2l.data.chat.format import DEFAULT_DATE
from d2l.data.chat.harmony import TEMPLATE
from d2l.io.resources import resource


class GenerationTags(Extension):
    """The generation tags of transformers, without the tracking."""

    tags = {"generation"}  # noqa: RUF012 as jinja2 declares it

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


@cache
def compiled() -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTags, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(resource(TEMPLATE).read_text(encoding="utf-8"))


def plain_jinja(day: str = DEFAULT_DATE, **variables: Any) -> str:
    """The template rendered on a given day with these variables."""
    return compiled().render(strftime_now=date.fromisoformat(day).strftime, **variables)
