"""Training data looked over for claims to be another model, personal data and secrets, and what is done then.

The report that a run keeps in data/screening.json: {"rows": 2400, "claims": {"rows": 1, "found":
{"ChatGPT": 1}, "places": ["alpaca_en.json:17"]}, "personal": {"rows": 0, "found": {}, "places": []},
"dropped": 0, "rewritten": 1, "actions": {"identity": "rewrite", "personal": "count"}}. What was dropped is in
no other number.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from r1pipe.config import ScreeningConfig
from r1pipe.core.types import Demonstration
from r1pipe.data import personal
from r1pipe.data.identity import Claims
from r1pipe.data.items import Item
from r1pipe.runs import heartbeat

PLACES = 20  # rows that a report names


@dataclass
class Tally:
    """Rows with something in them."""

    rows: int = 0
    found: Counter[str] = field(default_factory=Counter)  # rows by what was found
    places: list[str] = field(default_factory=list)  # of the first rows

    def add(self, names: Iterable[str], place: str) -> None:
        names = dict.fromkeys(names)
        if names:
            self.rows += 1
            self.found.update(names.keys())
            self.places += [place] if len(self.places) < PLACES else []


class Screening:
    """Looks over rows, and remembers what it found."""

    def __init__(self, config: ScreeningConfig):
        self.config, self.claims = config, Claims(config.identity)
        self.rows = self.dropped = self.rewritten = 0
        self.found = {"claims": Tally(), "personal": Tally()}

    @property
    def only_counts(self) -> bool:
        return self.config.identity.action == self.config.personal.action == "count"

    def look(self, asked: Sequence[str], said: Sequence[str], place: str) -> tuple[list[str] | None, str]:
        """What a row's answers become (None: the row is dropped), and why. Claims are looked for in what is
        `said`, personal data in what is `asked`, too."""
        heartbeat.tick()
        identity, private = self.config.identity.action, self.config.personal.action
        claims, kinds = self._found(asked, said)
        for names, action, what in ((claims, identity, "claims to be"), (kinds, private, "personal data:")):
            if names and action == "drop":
                self.dropped += 1
                return None, f"{what} {', '.join(dict.fromkeys(names))}"
        self._add(claims, kinds, place)
        if claims and identity == "rewrite":
            self.rewritten += 1
            return [self.claims.rewritten(text) for text in said], ""
        return list(said), ""

    def demonstrations(self, rows: Iterable[Demonstration]) -> list[Demonstration]:
        """The rows that stay, rewritten where that is configured."""
        kept = []
        for row in rows:
            before = [message.content for message in row.prompt.context]
            said, _ = self.look([*before, row.prompt.question], [row.response], row.source)
            if said is not None:
                kept.append(row if said[0] == row.response else replace(row, response=said[0]))
        return kept

    def count(self, row: Demonstration) -> None:
        """Look over a row that stays as it is."""
        self._add(*self._found([row.prompt.question], [row.response]), row.source)

    def documents(self, texts: Iterable[str]) -> None:
        """Look over documents, which stay as they are."""
        for number, text in enumerate(texts, 1):
            self._add(*self._found([], [text]), f"document {number}")

    def _found(self, asked: Sequence[str], said: Sequence[str]) -> tuple[list[str], list[str]]:
        claims = [name for text in said for name in self.claims.found(text)]
        kinds = [kind for text in (*asked, *said) for kind in personal.found(text, self.config.personal)]
        return claims, kinds

    def _add(self, claims: list[str], kinds: list[str], place: str) -> None:
        self.rows += 1
        self.found["claims"].add(claims, place)
        self.found["personal"].add(kinds, place)

    def report(self) -> dict[str, Any]:
        """As it is kept in screening.json."""
        return {
            "rows": self.rows,
            **{
                name: {"rows": tally.rows, "found": dict(tally.found.most_common()), "places": tally.places}
                for name, tally in self.found.items()
            },
            "dropped": self.dropped,
            "rewritten": self.rewritten,
            "actions": {"identity": self.config.identity.action, "personal": self.config.personal.action},
        }


SAID = ("response", "solution", "chosen")  # roles of an item that are learned; a rejected answer is not


def screened_item(item: Item, screening: Screening | None) -> tuple[Item | None, str]:
    """The row of a file as screening leaves it, or None and why it is dropped."""
    if screening is None:
        return item, ""
    said = {role: text for role, text in item.texts.items() if role in SAID and text}
    asked = [text for role, text in item.texts.items() if role not in said and text]
    asked += [message.content for message in item.prompt.context]
    kept, why = screening.look(asked, list(said.values()), item.source)
    if kept is None:
        return None, why
    return replace(item, texts=item.texts | dict(zip(said, kept, strict=True))), ""


def said_in(report: dict[str, Any]) -> list[str]:
    """A report in a few words; [] where nothing was found."""
    named = {"claims": "claims to be another model", "personal": "personal data or secrets"}
    lines = []
    for name, what in named.items():
        if report[name]["rows"]:
            found = ", ".join(f"{kind} {rows:,}" for kind, rows in report[name]["found"].items())
            lines.append(f"{report[name]['rows']:,} of {report['rows']:,} rows with {what} ({found})")
    lines += [f"{report['dropped']:,} rows dropped by screening"] if report["dropped"] else []
    return lines
