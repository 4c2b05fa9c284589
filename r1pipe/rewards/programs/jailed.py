"""The process inside the jail: a JSON line in, {"value"} or {"error"} out.

{"code", "inputs", "host"} runs code in one namespace, {"script", "stdin"} a program in a fresh one.

Run as text by `jail.py`; it imports nothing of r1pipe. A program that forges replies forges its own results
alone: it never sees what is expected of them.
"""

import ast
import atexit
import builtins
import functools
import io
import json
import os
import resource
import sys
import types


def encode(value):
    """A plain value as JSON that keeps tuples, sets and non-string keys. TypeError for others."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if type(value).__module__ == "numpy":  # an array as lists, a scalar as a number
        return encode(value.tolist())
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    for simple in (int, float, str):  # an enumeration's members
        if isinstance(value, simple):
            return simple(value)
    raise TypeError(f"a {type(value).__name__} is not a plain value")


def decode(value):
    """The value of an encoded one. Raises ValueError, KeyError or TypeError on anything else."""
    if not isinstance(value, dict):
        return value
    [(kind, items)] = value.items()
    if kind == "dict":
        return {decode(key): decode(item) for key, item in items}
    if kind == "bytes":
        return bytes.fromhex(items)
    if kind == "complex":
        return complex(*items)
    kinds = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
    return kinds[kind](decode(item) for item in items)


class Silence(io.BytesIO):
    """Discards what a program prints."""

    def fileno(self):
        return 1

    def write(self, data):
        return len(data)

    def close(self):
        pass  # what was written stays


class Output(Silence):
    """Keeps what a program prints, up to a limit."""

    limit = 0

    def write(self, data):
        if self.tell() + len(data) > self.limit:
            raise OSError("too much output")
        return io.BytesIO.write(self, data)


class Input(io.BytesIO):
    """A program's standard input."""

    def fileno(self):
        return 0


class Streams:
    """The standard streams of the program that runs now. The process's own carry requests and replies."""

    def __init__(self):
        self.input, self.output = Input(), Silence()
        self.builtins = dict(vars(builtins))

    def start(self, stdin, output):
        """Give the next program streams of its own, and builtins as they were."""
        vars(builtins).update(self.builtins)
        self.input, self.output = Input(stdin), output
        for name, mode, buffer in (
            ("stdin", "r", self.input),
            ("stdout", "w", output),
            ("stderr", "w", Silence()),
        ):
            stream = io.TextIOWrapper(buffer, "utf-8", "surrogateescape")
            vars(stream)["mode"] = mode
            vars(sys).update({name: stream, f"__{name}__": stream})

    def install(self):
        """Descriptors 0 and 1 mean these streams, too: open(0), os.read(0, n), os.write(1, b)."""
        read, write, opened, fstat = os.read, os.write, open, os.fstat

        def open_(file, mode="r", *arguments, **options):
            if file in (0, "/dev/stdin"):
                return self.input if "b" in mode else sys.stdin
            if file in (1, "/dev/stdout"):
                return self.output if "b" in mode else sys.stdout
            return opened(file, mode, *arguments, **options)

        def fstat_(fd):
            found = fstat(fd)
            return os.stat_result((*found[:6], len(self.input.getbuffer()), *found[7:])) if fd == 0 else found

        os.read = lambda fd, n: self.input.read(n) if fd == 0 else read(fd, n)
        os.write = lambda fd, data: self.output.write(data) if fd == 1 else write(fd, data)
        vars(os).update(fstat=fstat_, fdopen=open_)
        vars(io).update(open=open_)
        self.builtins |= {"open": open_, "exit": sys.exit, "quit": sys.exit}


def serve():
    limits = json.loads(sys.stdin.readline())
    requests, replies = sys.stdin, os.fdopen(os.dup(1), "w")
    depth, Output.limit, packages = (limits.pop(name) for name in ("depth", "output", "packages"))
    sys.path.append(packages)
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # nothing can be started
    for name, value in limits.items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (most, most))
    streams = Streams()
    streams.install()
    streams.start(b"", Silence())
    sys.setrecursionlimit(depth)
    space = namespace("program")

    def send(message):
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    def called(name):
        def function(*arguments, **keywords):
            send({"call": name, "arguments": encode(arguments), "keywords": encode(keywords)})
            answer = json.loads(requests.readline())
            if "error" in answer:
                raise getattr(builtins, answer["kind"], RuntimeError)(answer["error"])
            return decode(answer["value"])

        return function

    send({"value": "ready"})
    for line in requests:
        request = json.loads(line)
        try:
            if "script" in request:
                sys.setrecursionlimit(depth)
                send({"value": run_script(request["script"], request["stdin"], streams)})
                continue
            space.update(decode(request["inputs"]))
            space.update({name: called(name) for name in request["host"]})
            send({"value": encode(evaluate(request["code"], space))})
        except BaseException as error:  # noqa: BLE001 - whatever a program raises is its answer
            send({"error": str(error)[:200], "kind": type(error).__name__})


def evaluate(code, space):
    """The value of the last line, if that is an expression."""
    tree = ast.parse(code)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "program", "exec"), space)
    return eval(compile(ast.Expression(last.value), "program", "eval"), space) if last else None


def namespace(name):
    """The names of a new module, which classes defined in it find by its name (dataclasses look there)."""
    sys.modules[name] = types.ModuleType(name)
    return vars(sys.modules[name])


def run_script(script, stdin, streams):
    """What a program prints, run from its first line with names of its own."""
    output = Output()
    streams.start(stdin.encode("utf-8", "surrogateescape"), output)
    if "threading" in script:
        run_threads_at_once()
    space, standard = namespace("__main__"), sys.stdout
    try:
        exec(compiled(script), space)
    except SystemExit as leaving:
        if leaving.code not in (None, 0):
            raise
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        standard.flush()
        space.clear()
    return output.getvalue().decode("utf-8", "replace")


@functools.cache
def compiled(script):
    return compile(script, "program", "exec")


def ignored(*arguments, **options):
    pass


def run_threads_at_once():
    """Programs of contests start a thread for its large stack; no thread can be started here."""
    import threading

    threading.stack_size = lambda size=0: 0
    methods = {"start": threading.Thread.run, "join": ignored}
    vars(threading)["Thread"] = type("Thread", (threading.Thread,), methods)


if __name__ == "__main__":
    serve()
