"""Shows what would be read from data files: what `r1pipe data` runs. No torch, no DeepSpeed here.

    python stages/data.py OPTIONS_FILE     the JSON of r1pipe.config.script_options.DataOptions

Nothing is written. With `as_json` one object with everything is printed.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from r1pipe.chat.template import Chat
from r1pipe.config import script_options
from r1pipe.config.script_options import DataOptions
from r1pipe.core import terminal
from r1pipe.core.errors import DataError
from r1pipe.core.paths import content_dir
from r1pipe.data.files import Files
from r1pipe.data.preview import Summary, summarise
from r1pipe.data.screening import Screening, said_in
from r1pipe.launch.panel import mask_controls
from r1pipe.runs.data_files import KINDS

LONGEST = 600  # characters of a text in a sample on the screen; JSON has all of it
BEGINNING = 2 / 3  # the share of them that is shown from its beginning
REASONS = 12  # lines on the rows set aside


def main(options: DataOptions) -> int:
    """Print the summary: 0. Raises DataError where no row can be used."""
    chat = Chat.load(options.checkpoint or Path(content_dir(), "base"), options.system)
    screening = Screening(options.screening) if options.screening else None
    data = Files(replace(options.data, bad_rows="set_aside", max_bad_rows=1.0), screening=screening)
    summary = summarise(data, chat)
    if not any(summary["rows"].values()):
        raise DataError(data.set_aside[0].reason)
    summary["refused"] = refusal(options) if data.set_aside else None
    if options.as_json:
        print(json.dumps(summary, ensure_ascii=False, indent=1, default=str))
    else:
        show(summary, Console(highlight=False))
    return 0


def refusal(options: DataOptions) -> str | None:
    """What a run with these options says about the rows set aside; None where it takes the data."""
    data = Files(options.data)
    try:
        for kind in KINDS:
            data.items(kind)
    except DataError as error:
        return str(error)
    return None


def show(summary: Summary, console: Console) -> None:
    table = Table(box=box.SIMPLE, show_header=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, value in lines(summary):
        if console.is_terminal:
            table.add_row(name, Text(mask_controls(value)))
        else:  # a line each, for grep
            console.print(Text(mask_controls(f"{name:<16} {value}")), soft_wrap=True)
    if console.is_terminal:
        console.print(table)
    for sample in summary["samples"]:
        place = f"{sample['place']}  {sample['kind']}, {sample['split']}, {sample['language']}"
        console.print(Text(mask_controls(f"\n--- {place}"), "bold"), soft_wrap=True)
        named = {name: sample[name] for name in sample if name not in ("place", "kind", "split", "language")}
        for name, value in named.items():
            if value:
                text = (
                    ", ".join(f"{key}={each}" for key, each in value.items()) if name == "checker" else value
                )
                shown = mask_controls(shortened(str(text)))
                console.print(Text.assemble((f"{name}: ", "bold"), shown), soft_wrap=True)


def lines(summary: Summary) -> list[tuple[str, str]]:
    """The table: a name and what is shown for it."""
    rows = [("file", source["described"] or described(source)) for source in summary["sources"]]
    counts = {name: counted(summary[name]) for name in ("rows", "forms", "splits", "languages")}
    rows += [(name, value) for name, value in counts.items() if value]
    extra = {name: summary[name] for name in ("with_alternatives", "with_context", "exact_repeats")}
    rows += [(name.replace("_", " "), f"{count:,}") for name, count in extra.items() if count]
    if summary["screening"]:
        rows += [("screening", line) for line in said_in(summary["screening"]) or ["nothing found"]]
    for name, found in summary["tokens"].items():
        if found:
            of = f"of {found['rows']:,}: median {found['median']:,}, 95% up to {found['p95']:,}"
            rows.append((f"tokens, {name}", f"{of}, most {found['most']:,}"))
    aside = summary["set_aside"]
    for each in aside[:REASONS]:
        places = ", ".join(map(str, each["lines"])) + (", …" if each["rows"] > len(each["lines"]) else "")
        rows.append(("set aside", f"{each['rows']:,}: {each['reason']} ({each['file']}: {places})"))
    if len(aside) > REASONS:
        rows.append(("set aside", f"and for {len(aside) - REASONS} more reasons (--json has all)"))
    if summary["refused"]:
        rows.append(("a run refuses", summary["refused"]))
    return rows


def described(source: dict[str, Any]) -> str:
    """A source whose columns the config names."""
    listed = ", ".join(f"{role}={column}" for role, column in source["columns"].items())
    return f"{source['path']}: columns named in the config: {listed}"


def counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def shortened(text: str) -> str:
    """A text's beginning and end."""
    if len(text) <= LONGEST:
        return text
    head = int(LONGEST * BEGINNING)
    return f"{text[:head]} […{len(text) - LONGEST:,} characters…] {text[head - LONGEST :]}"


if __name__ == "__main__":
    terminal.run(lambda: main(script_options.read(DataOptions, sys.argv)))
