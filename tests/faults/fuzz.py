"""Whatever stands in a file or on the command line: a clear error or an answer, no traceback and no hang.

Inputs come from hypothesis: real files with a few values or bytes changed, and what never was one.
"""

import json
import pickle
import signal
import struct
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import hypothesis
import pyarrow
import pyarrow.parquet
import torch
from hypothesis import strategies as st
from runfolders import build
from safetensors.torch import save
from shapes import tiny
from tokenizers import AddedToken, Tokenizer, models

from faults.outcome import Outcome
from faults.rows import GOOD, config
from r1pipe.chat.template import SPECIAL_TOKENS, Chat
from r1pipe.cli.lineage import page
from r1pipe.cli.report.load import load_runs
from r1pipe.cli.report.page import page as report_page
from r1pipe.config import config_hash, read_config, to_mapping
from r1pipe.config.compose import compose
from r1pipe.config.rules import check as check_config
from r1pipe.core.chat_template import TEMPLATE
from r1pipe.core.errors import R1pipeError
from r1pipe.core.paths import RunFolder
from r1pipe.core.redaction import publishable, without_login
from r1pipe.core.types import Prompt
from r1pipe.data.files import Files
from r1pipe.data.reading import read_file
from r1pipe.model.names import model_config_from, published_config, published_shapes
from r1pipe.model.reading import INDEX, WEIGHTS, Stored, check
from r1pipe.runs import checkpoints, files, lineage, results, retention
from r1pipe.runs.files import Tail
from r1pipe.runs.lineage.fit import chat_format
from r1pipe.runs.record import read_record
from r1pipe.tracking import naming
from r1pipe.train.engine import state as engine_state

HANG_S = 30.0  # of the processor, for one input
WAIT_S = 900.0  # for one input: a busy machine gives a process little of each second
SHORT = 20  # in the short form, one input of so many
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["", "../../x", "/etc/passwd", "\0", "null", "1e999", "{{ 7 }}", "a" * 5000, "\u202e"]),
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
DEEP = st.sampled_from([b"[" * 100_000, b'{"a":' * 20_000, b"[" * 3000 + b"]" * 3000, b"\xff\xfe{}", b""])

Act = Callable[[Any], object]


class Hung(Exception):
    """An input took longer than HANG_S or WAIT_S."""


@st.composite
def edited(draw: st.DrawFn, valid: Any) -> Any:
    """A JSON value with one to three of its parts replaced, taken away, or put in."""
    value = deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        places = [(value, key) for value, key in _places(value)]
        if not places:
            return draw(JSON)
        holder, key = draw(st.sampled_from(places))
        what = draw(st.sampled_from(["replace", "replace", "delete", "insert"]))
        if what == "replace":
            holder[key] = draw(JSON)
        elif what == "delete":
            del holder[key]
        elif isinstance(holder, dict):
            holder[draw(st.text(max_size=5))] = draw(JSON)
        else:
            holder.insert(key, draw(JSON))
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """A file cut off, with bytes changed, put in or taken out, or with a piece of it twice."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        to = at + draw(st.integers(0, 40))
        junk = draw(st.binary(max_size=12))
        content = draw(
            st.sampled_from(
                [
                    content[:at],
                    content[:at] + junk + content[to:],
                    content[:at] + content[to:],
                    content[:to] + content[at:],
                    content[:at] + bytes([content[at] ^ 1 << len(junk) % 8]) + content[at + 1 :]
                    if content
                    else b"",
                ]
            )
        )
    return content


def json_file(valid: Any) -> st.SearchStrategy[bytes]:
    """Bytes of a JSON file that is nearly right, or not at all."""
    text = json.dumps(valid).encode()
    as_json = st.one_of(edited(valid), JSON).map(lambda value: json.dumps(value).encode())
    return st.one_of(as_json, as_json, damaged(text), DEEP, st.binary(max_size=40))


@contextmanager
def limited() -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise Hung(f"no answer within {HANG_S:.0f} s of work, or {WAIT_S:.0f} s in all")

    before = [signal.signal(number, ring) for number in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, HANG_S)
    signal.setitimer(signal.ITIMER_REAL, WAIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGPROF, before[0])
        signal.signal(signal.SIGALRM, before[1])


def fuzzed(fault: str, inputs: st.SearchStrategy, act: Act, times: int, seed: int) -> Outcome:
    """Try so many inputs; the smallest that gives anything but an R1pipeError is told."""
    tried = 0

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=times,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        verbosity=hypothesis.Verbosity.quiet,
    )
    @hypothesis.given(inputs)
    def one(value: Any) -> None:
        nonlocal tried
        tried += 1
        with limited():
            try:
                act(value)
            except R1pipeError as error:
                hypothesis.note(f"refused: {error}")
            except Exception as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                told = f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
                raise AssertionError(f"{told} on {str(value)[:200]}") from error

    try:
        one()
    except AssertionError as error:
        return Outcome(f"fuzzed {fault}", tried, tried - 1, " ".join(str(error).split()))
    return Outcome(f"fuzzed {fault}", tried, tried, "refused in one line, or read")


def run(folder: Path, seed: int, short: bool) -> Iterator[Outcome]:
    for fault, times, (inputs, act) in targets(folder):
        yield fuzzed(fault, inputs, act, max(5, times // SHORT) if short else times, seed)


def targets(folder: Path) -> Iterator[tuple[str, int, tuple[st.SearchStrategy, Act]]]:
    """What is fuzzed, with how many inputs: more than ten thousand in all."""
    yield "overrides", 400, (overrides(), lambda lines: compose(lines))
    yield "config.json", 1500, of_config(folder)
    yield "record.json", 1500, of_record(folder / "record")
    yield "manifest.json", 1000, of_manifest(folder / "manifest")
    yield "data rows (JSONL)", 1500, of_rows(folder / "jsonl")
    yield "gold answers", 100, of_gold(folder / "gold")
    yield "data rows (CSV)", 600, of_csv(folder / "csv")
    yield "data rows (parquet)", 200, of_parquet(folder / "parquet")
    yield "a model's config.json", 1200, of_model(folder / "model")
    yield "safetensors headers", 1500, of_weights(folder / "weights")
    yield "an index of shards", 600, of_index(folder / "index")
    yield "tokenizer and template", 1200, of_tokenizer(folder / "tokenizer")
    yield "metrics.jsonl", 1000, of_metrics(folder / "metrics")
    yield "engine/*.pt", 1500, of_state(folder / "state")
    yield "engine/layout.json", 500, of_layout(folder / "layout")
    yield "addresses", 500, (st.text(max_size=60), lambda text: publishable({"uri": without_login(text)}))


def overrides() -> st.SearchStrategy[list[str]]:
    keys = ["stage", "model", "data", "engine", "stage.optim.lr", "stage.max_steps", "tracking.uri", "parent"]
    signs = [sign + key for key in keys for sign in ("", "+", "++", "~")]
    values = ["grpo", "cold_start", "null", "[1,2]", "{a:1}", "${seed}", "${x", "1,2", "'a", "\\"]
    key = st.one_of(st.sampled_from(signs), st.text(max_size=6))
    value = st.one_of(st.sampled_from(values), st.text(max_size=8))
    return st.lists(st.tuples(key, value).map("=".join), min_size=1, max_size=3)


def of_config(folder: Path) -> tuple[st.SearchStrategy, Act]:
    path = folder / "config.json"

    def act(content: bytes) -> None:
        path.write_bytes(content)
        found = read_config(path)
        config_hash(found)
        check_config(found)

    return json_file(to_mapping(compose(["stage=grpo"]).config)), act


def of_record(root: Path) -> tuple[st.SearchStrategy, Act]:
    """Whatever a record holds: as a parent, in a lineage, in the table and the report, in MLflow's names."""
    first = RunFolder(build(root, "cold_start", steps=2))
    checkpoints.write_manifest(first.checkpoint(2))
    valid = json.loads(first.record.read_text())
    valid["checkpoint_hash"] = checkpoints.manifest_hash(first.checkpoint(2))
    start = lineage.checkpoint_of_folder(first.checkpoint(2))

    def act(content: bytes) -> None:
        first.record.write_bytes(content)
        page(list(lineage.ancestors(start)))
        results.rows(root)
        runs = load_runs(root, None, None)
        if runs:
            report_page(runs, [])
        record = read_record(first.record)
        naming.final_metrics(record)
        naming.provenance(record)
        naming.datasets({"data": {"name": "", "kind": "", "path": "", "tasks": []}}, record)
        lineage.checkpoint_of_run(first)

    return json_file(valid), act


def of_manifest(folder: Path) -> tuple[st.SearchStrategy, Act]:
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    checkpoints.write_manifest(folder)
    valid = json.loads((folder / checkpoints.MANIFEST).read_text())

    def act(content: bytes) -> None:
        (folder / checkpoints.MANIFEST).write_bytes(content)
        checkpoints.manifest_hash(folder)
        checkpoints.verify(folder, engine=True)

    return json_file(valid), act


def _rows_of(folder: Path, name: str) -> Act:
    """Read as data, by both ways of treating bad rows."""
    folder.mkdir()
    path = folder / name
    columns = {"question": "question", "response": "answer"}  # answers that no worker must compare
    source = replace(config(path, "").reasoning[0], columns=columns, task="writing", language="auto")
    strict = replace(config(path, "refuse"), reasoning=[], general=[source])
    lenient = replace(strict, bad_rows="set_aside", max_bad_rows=1.0)

    def act(content: bytes) -> None:
        path.write_bytes(content)
        read_file(path, 1000)
        Files(lenient, folder).general_demonstrations(9, 0, {})
        Files(strict).general_demonstrations(9, 0, {})

    return act


def of_gold(folder: Path) -> tuple[st.SearchStrategy, Act]:
    """Gold answers, which a worker compares with themselves."""
    folder.mkdir()
    path = folder / "rows.jsonl"

    def act(answer: str) -> None:
        path.write_text(json.dumps({"question": "What?", "answer": answer}))
        Files(config(path, "refuse")).prompts("train", 1, 0)

    pieces = st.sampled_from(["1", "\\frac{1}{2}", "x", "{", "}", "\\sqrt", "^", "9", ",", " ", "%", "一"])
    return st.lists(pieces, max_size=5).map("".join), act


def of_rows(folder: Path) -> tuple[st.SearchStrategy, Act]:
    line = st.one_of(json_file(GOOD[0]), st.just(json.dumps(GOOD[1]).encode()))
    lines = st.lists(line, min_size=1, max_size=4).map(b"\n".join)
    return lines, _rows_of(folder, "rows.jsonl")


def of_csv(folder: Path) -> tuple[st.SearchStrategy, Act]:
    text = b'question,answer\nWhat is 1 + 1?,2\n"a, ""b""\nc",3\n'
    return st.one_of(damaged(text), st.binary(max_size=60)), _rows_of(folder, "rows.csv")


def of_parquet(folder: Path) -> tuple[st.SearchStrategy, Act]:
    act = _rows_of(folder, "rows.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(GOOD[:4]), folder / "rows.parquet")
    return damaged((folder / "rows.parquet").read_bytes()), act


def of_model(folder: Path) -> tuple[st.SearchStrategy, Act]:
    folder.mkdir()

    def act(content: bytes) -> None:
        (folder / "config.json").write_bytes(content)
        model_config_from(folder)

    return json_file(published_config(tiny(), torch.float32)), act


def of_weights(folder: Path) -> tuple[st.SearchStrategy, Act]:
    """Headers whose length, offsets, shapes or types lie, and files that are cut off."""
    folder.mkdir()
    shapes = published_shapes(tiny())
    whole = save({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)})
    length = struct.unpack("<Q", whole[:8])[0]
    header, body = json.loads(whole[8 : 8 + length]), whole[8 + length :]

    def packed(parts: tuple[Any, int, bytes]) -> bytes:
        content, lie, rest = parts
        text = json.dumps(content).encode()
        return struct.pack("<Q", max(0, min(2**64 - 1, len(text) + lie))) + text + rest

    lies = st.sampled_from([0, 0, 0, 0, 1, -1, 7, 2**20, 2**40, 2**63])
    bodies = st.sampled_from([body, body[:-1], b"", body + b"x", body * 2])
    offsets = st.lists(st.integers(-1, 40), min_size=0, max_size=3)
    parts = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "BF16", "F64", "I64", "F8_E4M3", "BOOL", "Q4", "", None]),
            "shape": st.lists(st.sampled_from([0, 1, 2, 3, 4, -1, 2**62]), max_size=3),
            "data_offsets": offsets,
        }
    )
    invented = st.dictionaries(st.sampled_from(["a", "b", "model.norm.weight"]), parts, max_size=3)
    headers = st.one_of(edited(header), invented, JSON)
    path = folder / WEIGHTS

    def act(content: bytes) -> None:
        path.write_bytes(content)
        stored = Stored(folder)
        for name in stored.names():
            stored.raw(name)
        check(stored, shapes)

    return st.one_of(st.tuples(headers, lies, bodies).map(packed), damaged(whole)), act


def of_index(folder: Path) -> tuple[st.SearchStrategy, Act]:
    folder.mkdir()
    (folder / "one.safetensors").write_bytes(save({"a": torch.ones(2)}))
    (folder / "two.safetensors").write_bytes(save({"b": torch.ones(2)}))
    valid = {"metadata": {}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}

    def act(content: bytes) -> None:
        (folder / INDEX).write_bytes(content)
        Stored(folder)

    return json_file(valid), act


def of_tokenizer(folder: Path) -> tuple[st.SearchStrategy, Act]:
    folder.mkdir()
    made = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    made.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer, settings = json.loads(made.to_str()), {"chat_template": TEMPLATE, "bos_token": "x"}
    templates = st.one_of(
        damaged(TEMPLATE.encode()).map(lambda content: content.decode(errors="replace")),
        st.sampled_from(
            ["{{ 1 / 0 }}", "{{ x.y.z }}", "{% for", "{{ ''.__class__.__mro__ }}", "{{ [1][5] }}"]
        ),
    )
    others = templates.map(lambda template: json.dumps({"chat_template": template}).encode())
    right = (json.dumps(tokenizer).encode(), json.dumps(settings).encode())
    pairs = st.one_of(
        st.tuples(json_file(tokenizer), st.just(right[1])),
        st.tuples(st.just(right[0]), st.one_of(json_file(settings), others)),
    )

    def act(content: tuple[bytes, bytes]) -> None:
        (folder / "tokenizer.json").write_bytes(content[0])
        (folder / "tokenizer_config.json").write_bytes(content[1])
        told: list[R1pipeError] = []
        for ask in (chat_format, _speak):
            try:
                ask(folder)
            except R1pipeError as error:
                told.append(error)

    return pairs, act


def _speak(folder: Path) -> None:
    Chat.load(folder).prompt_tokens(Prompt("", "", "", "ab?"))


def of_metrics(folder: Path) -> tuple[st.SearchStrategy, Act]:
    folder.mkdir()
    path = folder / "metrics.jsonl"
    rows = [{"step": n, "time": 1.5, "train/loss": 0.5, "eval/pass_at_1": 0.2} for n in (1, 2, 3)]
    lines = [st.one_of(st.just(json.dumps(row).encode()), json_file(row)) for row in rows]

    def act(content: Sequence[bytes]) -> None:
        path.write_bytes(b"\n".join(content) + b"\n")
        for row in Tail(path).read():
            list(naming.points(row))
        for direction in ("max", "min"):
            retention.best(path, {1, 2, 3}, "eval/pass_at_1", direction)
        files.cut_metrics_after(path, 3)

    return st.one_of(st.tuples(*lines), st.lists(lines[-1], max_size=3)), act


class Code:
    """A pickle that makes a file when it is read by one who trusts it."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.path,)


def of_state(folder: Path) -> tuple[st.SearchStrategy, Act]:
    """What torch.save wrote, damaged, and pickles of anything, code among them."""
    folder.mkdir()
    path, ran = folder / "state.pt", folder / "ran"
    valid = {"step": 3, "loop": {"cursor": [1, 2]}, "exp_avg": torch.ones(3), "name": "x"}
    zipped, old = folder / "zipped.pt", folder / "old.pt"
    torch.save(valid, zipped)
    torch.save(valid, old, _use_new_zipfile_serialization=False)
    right = [file.read_bytes() for file in (zipped, old)]
    things = st.one_of(JSON, st.just(Code(ran)), JSON.map(lambda value: {"a": value, "b": Code(ran)}))
    pickled = st.tuples(things, st.integers(0, 5)).map(lambda pair: pickle.dumps(*pair))

    def act(content: bytes) -> None:
        path.write_bytes(content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's, of other pickle protocols
                engine_state.load_tensors(str(path), "cpu")
        finally:
            assert not ran.exists(), "code in a checkpoint was run"

    damages = [damaged(content) for content in (*right, pickle.dumps(valid["loop"], 2))]
    return st.one_of(*damages, pickled, pickled.flatmap(damaged), st.binary(max_size=40)), act


def of_layout(folder: Path) -> tuple[st.SearchStrategy, Act]:
    (folder / engine_state.TAG).mkdir(parents=True)
    (folder / engine_state.TAG / engine_state.MODEL_STATES[0]).touch()

    def act(content: bytes) -> None:
        (folder / engine_state.LAYOUT).write_bytes(content)
        engine_state.read_layout(folder)

    return json_file({"ranks": 1, "zero_level": 0}), act
