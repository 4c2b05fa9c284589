"""Nobody gets in and nothing secret gets out: no unpickling, no way out of a folder, no password on disk."""

import ast
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest
from fake_servers import fake_server
from fakes import House
from runfolders import build
from test_data_files import config, source
from tiny_runs import load_stage

import r1pipe
from r1pipe.cli import commands as cli
from r1pipe.config.compose import compose
from r1pipe.core.errors import CheckpointError, ConfigError, EnvironmentProblem
from r1pipe.core.paths import RunFolder, stages_dir
from r1pipe.core.redaction import publishable, without_login, without_secrets
from r1pipe.data.files import Files
from r1pipe.launch import command as launch
from r1pipe.launch import parents, pipeline
from r1pipe.runs import checkpoints, lineage, machine
from r1pipe.tracking import Mirror, store, sync, ui

CODE = sorted([*Path(r1pipe.__file__).parent.rglob("*.py"), *stages_dir().glob("*.py")])
ERRORS = {"UnpicklingError", "YAMLError"}
BANNED = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "tarfile",
    "zipfile",
    "yaml",
}
INTERPRETERS = (  # they may evaluate what they are given
    "jailed.py",  # generated programs, inside bubblewrap
    "plugin_worker.py",  # files that the user names in stage.rewards.plugins, in a process of their own
)
SECRETS = {
    "MY_API_TOKEN": "tok-4711-abcdefgh",
    "AWS_SECRET_ACCESS_KEY": "key-4712-abcdefgh",
    "DB_PASSWORD": "pas-4713-abcdefgh",
    "MLFLOW_TRACKING_PASSWORD": "pas-4714-abcdefgh",
}
LOGIN = "pas-4715-abcdefgh"


def called(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    """Every call by its dotted name."""
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def keyword(call: ast.Call, name: str) -> object:
    return next((ast.literal_eval(one.value) for one in call.keywords if one.arg == name), None)


def safe_yaml(name: str, call: ast.Call) -> bool:
    loaders = [ast.unparse(one.value) for one in call.keywords if one.arg == "Loader"]
    return "safe_" in name or loaders == ["yaml.SafeLoader"]


def banned_imports(tree: ast.AST) -> list[str]:
    found: list[str] = []
    for node in ast.walk(tree):
        # calls of yaml.NAME are looked at
        names = (
            [alias.name for alias in node.names if alias.name != "yaml"]
            if isinstance(node, ast.Import)
            else []
        )
        if isinstance(node, ast.ImportFrom) and {alias.name for alias in node.names} - ERRORS:
            names += [node.module or ""]
        found += [f"import {name}" for name in names if name.partition(".")[0] in BANNED]
    return found


def unsafe(path: Path) -> list[str]:
    """What of a source file could run what somebody else wrote."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = banned_imports(tree)
    for name, call in called(tree):
        if name.endswith("torch.load") and keyword(call, "weights_only") is not True:
            found.append("torch.load without weights_only")
        if name in ("np.load", "numpy.load") and keyword(call, "allow_pickle") is not False:
            found.append("np.load without allow_pickle=False")
        if name.endswith("load_dataset") and not isinstance(call.args[0], ast.Constant):
            found.append("load_dataset of a name that is not fixed")
        if name in ("eval", "exec") and path.name not in INTERPRETERS:
            found.append(name)
        if name.startswith("yaml.") and not safe_yaml(name, call):
            found.append(f"{name} without SafeLoader")
        if keyword(call, "trust_remote_code") not in (None, False):
            found.append("trust_remote_code")
        if keyword(call, "shell") is True if name.startswith("subprocess") else False:
            found.append("a shell")
    return found


def test_nothing_in_the_code_unpickles_or_runs_what_comes_from_outside() -> None:
    assert len(CODE) > 150
    assert {path.name: unsafe(path) for path in CODE if unsafe(path)} == {}


def test_the_scan_finds_what_it_looks_for(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text(
        "import pickle\nimport torch\ntorch.load('x')\ntorch.load('x', weights_only=False)\n"
        "np.load('x')\nload_dataset(name)\neval('1')\nfrom tarfile import open\n"
        "subprocess.run('ls', shell=True)\nAuto.load(1, trust_remote_code=True)\n"
        "import yaml\nyaml.load('x')\nyaml.compose('x', Loader=yaml.SafeLoader)\nfrom yaml import load\n"
    )
    assert len(unsafe(path)) == 11 and "torch.load without weights_only" in unsafe(path)


# paths


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a/../../x", "", "\0", "x" * 5000])
def test_a_manifest_that_leads_out_of_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-1" / "manifest.json").write_text(json.dumps({"files": {name: "00"}}))
    for ask in (checkpoints.verify, checkpoints.manifest_hash):
        with pytest.raises(CheckpointError, match=r"manifest\.json: .* is not a file of") as caught:
            ask(tmp_path / "step-1")
        assert "\n" not in str(caught.value)


def test_a_link_out_of_a_checkpoint_is_refused_and_never_copied(tmp_path: Path) -> None:
    folder = tmp_path / "step-1"
    folder.mkdir()
    (folder / "notes.txt").symlink_to("/etc/hostname")
    checkpoints.write_manifest(folder)
    with pytest.raises(CheckpointError, match="is not a file of"):
        checkpoints.copy_published(folder, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("where", ["../../elsewhere", "/etc", "checkpoints/../../.."])
def test_a_record_that_leads_out_of_its_run_is_refused(tmp_path: Path, where: str) -> None:
    folder = build(tmp_path, "grpo", steps=2)
    record = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(json.dumps(record | {"checkpoint": where}))
    with pytest.raises(CheckpointError, match=r"record\.json: .* is not a file of"):
        lineage.checkpoint_of_run(RunFolder(folder))
    with pytest.raises(EnvironmentProblem, match=r"record\.json: .* is not a file of"):
        sync(tmp_path)


@pytest.mark.parametrize("script", ["../../evil.py", "/tmp/evil.py", "grpo", "a/b.py"])
def test_a_stage_script_is_a_name_in_stages(script: str) -> None:
    with pytest.raises(ConfigError, match=r"stage\.script=.* must be the name of a script"):
        compose(["stage=grpo", f"stage.script={script}"])


@pytest.mark.parametrize("name", ["../secret.jsonl", "/etc/passwd", "a/../../b.jsonl"])
def test_a_source_stays_in_the_data_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"is outside data\.path"):
        Files(config(tmp_path, reasoning=[source(path=name)]))


def test_links_out_of_an_imported_folder_are_refused_but_for_hugging_faces_cache(tmp_path: Path) -> None:
    check_no_outside_links = load_stage("import_weights").check_no_outside_links
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "1f2e", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "aa").write_text("{}")
    (snapshot / "config.json").symlink_to(Path("../../blobs/aa"))
    (snapshot / "same.json").symlink_to(snapshot / "config.json")
    check_no_outside_links(snapshot)
    (snapshot / "tokenizer.json").symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json links to /etc/hostname, out of its"):
        check_no_outside_links(snapshot)


def test_an_import_cannot_be_called_by_a_path(house: House, capsys: pytest.CaptureFixture) -> None:
    for name in ("..", "a/b", "/etc"):
        assert house.call("import", "theirs", "--name", name) == 2
        assert "must be a name, not a path" in capsys.readouterr().err


# secrets


def planted_in(root: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in (path for path in root.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for secret in (*SECRETS.values(), LOGIN):
            if secret.encode() in content:
                found.setdefault(str(path), []).append(secret)
    return found


def test_secrets_are_in_no_file_of_a_run_nor_in_mlflow(
    house: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    place = house.root / "mlflow.db"
    address = f"sqlite://user:{LOGIN}@/{place}"  # a login in the address; this store does not look at it
    monkeypatch.setattr(store, "store_uri", lambda root, uri=None: f"sqlite:///{place}")
    monkeypatch.setattr("r1pipe.tracking.mirror.store_uri", lambda root, uri=None: f"sqlite:///{place}")
    given = compose(["stage=cold_start", f"root={house.root}", f"tracking.uri='{address}'"]).config
    placed = pipeline.plan_run(parents.with_parents(given))
    assert pipeline.run_stage(placed) == 0
    assert (placed.run.path / "mirrored").read_text() == "whole\n" and place.exists()
    assert json.loads(placed.run.config.read_text())["tracking"]["uri"] == f"sqlite:///{place}"
    assert planted_in(house.root) == {}
    told = capsys.readouterr()
    assert not [secret for secret in (*SECRETS.values(), LOGIN) if secret in told.out + told.err]


def test_a_job_does_not_get_the_trackers_password(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2hunter2")
    fake = next(path for path in launch.stages_dir().glob("sft.py"))
    fake.write_text("import os\nfrom pathlib import Path\n" + fake.read_text().replace(
        'print(f"{config.stage.name} began")', 'Path(path, "seen").write_text(str(dict(os.environ)))'
    ))  # fmt: skip
    assert house.call("run", "stage=cold_start") == 0
    seen = (house.runs("cold_start")[0] / "seen").read_text()
    assert "PATH" in seen and "hunter2" not in seen


def test_a_server_that_refuses_us_is_named_without_the_login(tmp_path: Path) -> None:
    with fake_server(lambda path, body: (200 if path == "/health" else 401, {})) as server:
        uri = server.url.replace("//", f"//user:{LOGIN}@")
        folder = build(tmp_path, "grpo", finished=False, uri=uri)
        with pytest.raises(EnvironmentProblem) as caught:
            Mirror(folder, json.loads((folder / "config.json").read_text())).finish()
        assert LOGIN not in str(caught.value) and "127.0.0.1" in str(caught.value)


def test_what_is_taken_out_and_what_stays() -> None:
    assert without_login(f"http://user:{LOGIN}@host:5000/a@b") == "http://host:5000/a@b"
    assert without_login(f"postgresql+psycopg://u:{LOGIN}@host/db?sslmode=require&password=x") == (
        "postgresql+psycopg://host/db?sslmode=require&password=***"
    )
    for same in (
        "sqlite:////runs/mlflow.db",
        "models:/r1pipe@grpo",
        "me@example.org",
        "imported/a@b",
        "a: //b@c",
    ):
        assert without_login(same) == same
    assert publishable({"a": [f"http://u:{LOGIN}@h"], "n": 1.5}) == {"a": ["http://h"], "n": 1.5}


def test_a_secrets_value_is_taken_out_of_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_TOKEN", SECRETS["MY_API_TOKEN"])
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("SSH_KEY_FILE", "/home/me/keyfile")
    text = f"false: /home/me/keyfile said {SECRETS['MY_API_TOKEN']}"
    assert without_secrets(text) == "false: /home/me/keyfile said ***"


def test_the_screen_shows_no_login(house: House, capsys: pytest.CaptureFixture) -> None:
    address = f"tracking.uri='http://me:{LOGIN}@127.0.0.1:9'"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["r1pipe", "config", "stage=grpo", address])
        with pytest.raises(SystemExit):
            cli.main()
        patch.setattr(sys, "argv", ["r1pipe", "run", "stage=cold_start", f"root={house.root}", address])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    told = capsys.readouterr()
    assert ended.value.code == 2 and "no MLflow server at tracking.uri=http://127.0.0.1:9 " in told.err
    assert 'tracking.uri="http://127.0.0.1:9"' in told.out and LOGIN not in told.out + told.err


def test_facts_hold_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    told = json.dumps(machine.facts())
    assert not [secret for secret in SECRETS.values() if secret in told]


def test_the_diff_of_the_code_has_new_files_and_no_login(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*words: str) -> str:
        line = ["git", "-C", str(tmp_path), *words]
        return subprocess.run(line, check=True, capture_output=True, text=True).stdout

    run("init", "-q")
    (tmp_path / "r1pipe").mkdir()
    (tmp_path / "r1pipe" / "old.py").write_text("a = 1\n")
    run("add", ".")
    run("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "x")
    monkeypatch.setattr(machine, "_checkout", lambda: tmp_path)
    assert machine.code_diff() == "" and machine.facts()["code"]["dirty"] is False
    (tmp_path / "r1pipe" / "old.py").write_text("a = 2\n")
    (tmp_path / "r1pipe" / "new.py").write_text(f"uri = 'http://u:{LOGIN}@host'\n")
    (tmp_path / "private.txt").write_text("elsewhere\n")
    diff = machine.code_diff()
    assert "+a = 2" in diff and "+uri = 'http://host'" in diff
    assert LOGIN not in diff and "elsewhere" not in diff
    assert "?? r1pipe/new.py" in run("status", "--porcelain"), "the checkout's own index is left alone"


# who may listen


def test_the_ui_binds_to_this_machine_alone_unless_told_otherwise_and_then_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    started: list[list[str]] = []
    servers: list[subprocess.Popen] = []

    @contextmanager
    def server(command: list[str], log: IO[str]) -> Iterator[subprocess.Popen]:
        started.append(command)
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:  # runs until its input is closed
            servers.append(process)
            yield process

    def no_page(address: str, experiment: str) -> str:
        servers[-1].communicate()
        return address

    monkeypatch.setattr(ui, "serving", server)
    monkeypatch.setattr(ui, "comparison", no_page)
    monkeypatch.setattr(ui, "prepare", lambda store: None)
    (tmp_path / "mlflow.db").touch()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    tracking = compose([]).config.tracking
    ui.serve_ui(tmp_path, tracking, port)
    assert started[-1][started[-1].index("--host") + 1] == "127.0.0.1"
    assert "--allowed-hosts" not in started[-1]
    assert "can read, change and delete all runs" not in capsys.readouterr().err
    ui.serve_ui(tmp_path, tracking, port, host="0.0.0.0")
    assert started[-1][started[-1].index("--host") + 1] == "0.0.0.0"
    hosts = started[-1][started[-1].index("--allowed-hosts") + 1]
    assert f"{socket.gethostname()}:{port}" in hosts.split(",")
    assert "can read, change and delete all runs" in capsys.readouterr().err
    assert ui.is_loopback("::1") and ui.is_loopback("localhost") and not ui.is_loopback("myhost")
