"""The pages' templates; whatever they show is escaped."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from r1pipe.core.formatting import duration, number, percent

_templates = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_templates.filters |= {"duration": duration, "number": number, "percent": percent}


def render(template: str, **values: Any) -> str:
    return _templates.get_template(template).render(values)
