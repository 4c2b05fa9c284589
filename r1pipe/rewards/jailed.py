"""The process inside the jail: a JSON line {"code", "inputs", "host"} in, {"value"} or {"error"} out.

Run as text by `jail.py`; it imports nothing of r1pipe. A program that forges replies forges its own results
alone: it never sees what is expected of them.
"""

import ast
import json
import os
import resource
import sys


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


class Silence:
    """Discards what a program prints."""

    encoding = "utf-8"

    def write(self, text):
        return len(text)

    def flush(self):
        pass


def serve():
    limits = json.loads(sys.stdin.readline())
    requests, replies = sys.stdin, os.fdopen(os.dup(1), "w")
    sys.stdin, sys.stdout, sys.stderr = None, Silence(), Silence()
    sys.setrecursionlimit(limits.pop("depth"))
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))
    space = {"__name__": "program"}

    def send(message):
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    def called(name):
        def function(*arguments, **keywords):
            send({"call": name, "arguments": encode(arguments), "keywords": encode(keywords)})
            answer = json.loads(requests.readline())
            if "error" in answer:
                raise getattr(__import__("builtins"), answer["kind"], RuntimeError)(answer["error"])
            return decode(answer["value"])

        return function

    send({"value": "ready"})
    for line in requests:
        request = json.loads(line)
        try:
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


if __name__ == "__main__":
    serve()
