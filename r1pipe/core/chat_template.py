"""The chat template as text: today's, that of earlier versions, and the default system prompt before one.

A checkpoint's template says all about its conversations, the system prompt included. transformers and vLLM
render the same text by it. Chat renders it; the launcher only compares texts, and loads no Jinja.
"""

import hashlib
import json
import re

# As in R1's published template, system text stands between BOS and the first turn, and earlier turns lose
# their reasoning. What it cannot write it refuses: tools, images, other roles.
TEMPLATE = (
    "{% if tools %}{{ raise_exception('the chat template has no place for tools; drop them') }}{% endif %}"
    "{% macro text(m) %}"
    "{% if m.content is string %}{{ m.content }}"
    "{% elif m.content is iterable %}{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}"
    "{% else %}{{ raise_exception('the chat template has no place for a part of type ' ~ part.type "
    "~ ' in a message of ' ~ m.role ~ '; give its text') }}"
    "{% endif %}{% endfor %}"
    "{% else %}{{ raise_exception('a message of ' ~ m.role ~ ' has no text; give content') }}"
    "{% endif %}{% endmacro %}"
    "{% set ns = namespace(system='') %}"
    "{% for m in messages %}"
    "{% if m.tool_calls %}{{ raise_exception('the chat template has no place for tool calls of ' ~ m.role "
    "~ '; give their text as content') }}"
    "{% elif m.role in ['system', 'developer'] %}"
    "{% set ns.system = ns.system ~ ('\\n\\n' if ns.system else '') ~ text(m) %}"
    "{% elif m.role not in ['user', 'assistant'] %}{{ raise_exception('the chat template has no place for "
    "messages of ' ~ m.role ~ '; make them messages of user') }}"
    "{% endif %}{% endfor %}"
    "{{ bos_token }}{{ ns.system }}{% for m in messages %}"
    "{% if m.role == 'user' %}<｜User｜>{{ text(m) }}"
    "{% elif m.role == 'assistant' %}<｜Assistant｜>"
    "{{ text(m) if loop.last else text(m).split('</think>')[-1].strip() }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)
# It left out system messages without a word; users' and assistants' turns read the same.
EARLIER_SHA256 = "615715bf85582a3a778de8be9bb635e14fb2c6c15206879a539ddfd765c7f15b"

_DEFAULT = (  # works before any template
    "{%% set default_system = %s %%}"
    "{%% if not messages | selectattr('role', 'in', ['system', 'developer']) | list %%}"
    "{%% set messages = [{'role': 'system', 'content': default_system}] + messages | list %%}{%% endif %%}"
)
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')


def split_system(template: str) -> tuple[str, str]:
    """A template without its default system prompt, and that prompt; "" where it has none.

    The template of earlier versions becomes today's.
    """
    system, begin = "", _DEFAULT.partition("%s")[0] % ()
    if template.startswith(begin) and (literal := _STRING.match(template, len(begin))):
        prefix = _DEFAULT % literal[0]
        if template.startswith(prefix):
            template, system = template.removeprefix(prefix), json.loads(literal[0])
    return (TEMPLATE if sha256(template) == EARLIER_SHA256 else template), system


def with_system(template: str, system: str | None) -> str:
    """The template with this default system prompt instead of its own; "": none; None: its own."""
    bare, own = split_system(template)
    system = own if system is None else system
    return _DEFAULT % json.dumps(system, ensure_ascii=False) + bare if system else bare


def sha256(template: str) -> str:
    return hashlib.sha256(template.encode("utf-8", "surrogatepass")).hexdigest()
