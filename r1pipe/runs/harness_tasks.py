"""Tasks of lm-evaluation-harness in a user's folder: whether they would run code of their own.

A task is a YAML file that may name Python (`!function utils.f`, beside it or anywhere), metrics that are
downloaded with their code, or programs to run. lm-evaluation-harness runs all of it without a sandbox.
"""

from collections.abc import Collection, Iterator
from pathlib import Path

import yaml  # type: ignore[import-untyped]

from r1pipe.config import BenchmarkConfig
from r1pipe.config.benchmark import task_of
from r1pipe.core.errors import DataError

KEY = "benchmark.harness.trust_code"
RUNS_CODE = ("hf_evaluate", "trust_remote_code", "unsafe_code")  # keys that, if not false, run some
SUFFIXES = (".yaml", ".yml")


def check_tasks(benchmark: BenchmarkConfig | None, metrics: Collection[str] | None = None) -> None:
    """`metrics`: those of lm_eval itself; any other is downloaded, with its code.

    Raises DataError for a folder that is missing, for a file of it that is not YAML, and, unless trust_code
    says so, for one that would run code.
    """
    if not task_of(benchmark) or benchmark is None or benchmark.harness is None:
        return
    harness = benchmark.harness
    if harness.tasks is None:
        return
    folder = Path(harness.tasks)
    if not folder.is_dir():
        raise DataError(f"benchmark.harness.tasks={folder} is no folder; give the one that holds the tasks")
    files = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES)
    if not files:
        raise DataError(f"benchmark.harness.tasks={folder} has no .yaml file; give a folder with tasks")
    seen: set[Path] = set()
    for path in files if not harness.trust_code else ():
        _check_file(path, seen, metrics)


def _check_file(path: Path, seen: set[Path], metrics: Collection[str] | None) -> None:
    """The file and what it includes."""
    if path.resolve() in seen:
        return
    seen.add(path.resolve())
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8"
        raise DataError(f"{path} cannot be read ({why}); correct benchmark.harness.tasks") from None
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise DataError(f"{path}{line} is not YAML ({getattr(error, 'problem', '')}); correct it") from None
    for name, node in _nodes(root):
        if what := _code_in(name, node, metrics):
            raise DataError(
                f"{path}:{node.start_mark.line + 1}: {what} would run code outside the sandbox; take it out, "
                f"or, if you trust the files, say {KEY}=true"
            )
        if name == "include" and isinstance(node.value, str):
            _check_file(path.parent / node.value, seen, metrics)


def _code_in(name: str, node: yaml.Node, metrics: Collection[str] | None) -> str:
    """What the value of a key would run; "" for none."""
    text = node.value if isinstance(node.value, str) else ""
    if node.tag.startswith(("!", "tag:yaml.org,2002:python")):
        return f"{node.tag} {text}".strip()
    downloads = name == "metric" and ("/" in text or (metrics is not None and text not in metrics))
    if downloads or (name in RUNS_CODE and text.lower() != "false"):
        return f"{name}: {text}"
    return ""


def _nodes(root: yaml.Node | None) -> Iterator[tuple[str, yaml.Node]]:
    """(key, node) of all below; of an item in a list, the list's key. An anchor may hold itself."""
    open_nodes = [("", root)] if root else []
    known: set[int] = set()
    while open_nodes:
        name, node = open_nodes.pop()
        if id(node) in known:
            continue
        known.add(id(node))
        yield name, node
        if isinstance(node, yaml.MappingNode):
            open_nodes += [(str(key.value), value) for key, value in node.value]
            open_nodes += [("", key) for key, _ in node.value]
        elif isinstance(node, yaml.SequenceNode):
            open_nodes += [(name, item) for item in node.value]
