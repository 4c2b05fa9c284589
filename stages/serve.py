"""Serves a checkpoint in OpenAI's protocol: what `r1pipe serve` runs. No DeepSpeed here.

    python stages/serve.py OPTIONS_FILE     the JSON of r1pipe.config.script_options.ServeOptions

SIGINT or SIGTERM ends it: answers under way are drawn to the end for serve.grace_s, a second signal ends them
at once, and clients that get no answer are told. It runs on the GPU in bfloat16 if there is one.
"""

import ipaddress
import json
import shlex
import signal
import sys
import threading
import time
from types import FrameType

from r1pipe.chat.template import Chat
from r1pipe.config import script_options
from r1pipe.config.script_options import ServeOptions
from r1pipe.core import terminal
from r1pipe.runs import checkpoints, stopping
from r1pipe.serve.engine import Engine
from r1pipe.serve.protocol import Reader
from r1pipe.serve.server import Server
from r1pipe.train.standalone import drawing_defaults, load

POLL_S = 0.2
LAST_WORDS_S = 2.0  # for threads to write their last replies


def main(options: ServeOptions) -> int:
    """Serve until a signal: 0; 1 where the engine has failed."""
    settings, folder = options.settings, options.checkpoint
    stop, at_once = threading.Event(), threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        (at_once if stop.is_set() else stop).set()

    with (
        stopping.handling(on_signal, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)),
        Server(settings) as server,
    ):
        checkpoints.verify(folder)
        chat, model = Chat.load(folder, options.system), load(folder)
        engine = Engine(model, chat.eos_ids, chat.pad_id, settings.max_num_seqs, settings.max_waiting)
        longest, vocabulary = engine.longest, model.config.vocab_size
        made = int((folder / "config.json").stat().st_mtime)
        reader = Reader(options.name, chat, longest, vocabulary, drawing_defaults(folder), settings, made)
        server.open_to(reader, engine)
        engine.start()
        threading.Thread(target=server.serve_forever, args=(POLL_S,), daemon=True).start()
        print(greeting(server, reader, str(model.lm_head.weight.device)), flush=True)
        while not stop.wait(POLL_S) and engine.alive:
            pass
        if not stop.is_set():
            terminal.complain("the engine has failed; what went wrong is told above")
        engine.close(settings.grace_s, at_once)
        ends = time.monotonic() + LAST_WORDS_S
        while server.answering and time.monotonic() < ends:
            time.sleep(POLL_S / 4)
        server.shutdown()
    return 0 if stop.is_set() else 1


def greeting(server: Server, reader: Reader, device: str) -> str:
    """What is served where, and a line to try it with."""
    question = [{"role": "user", "content": "Use 3, 5 and 7 to make 22."}]
    body = json.dumps({"model": reader.name, "messages": question})
    key = f' -H "Authorization: Bearer ${server.config.key_variable}"' if server.key else ""
    lines = [
        f"serving {reader.name} (up to {reader.longest} tokens, on {device}) at {server.url}",
        f"curl {server.url}/chat/completions -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}",
        "Ctrl-C ends it",
    ]
    if reader.chat.system:
        lines.insert(1, f"system prompt: {reader.chat.system}")
    if not local(server.config.host):
        who = "those who have the key" if server.key else "everybody, as there is no key"
        variable = f"; ${server.config.key_variable} is the key" if not server.key else ""
        lines.insert(1, f"warning: other machines can reach it, open to {who}{variable}; it is not encrypted")
    return "\n".join(lines)


def local(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    terminal.run(lambda: main(script_options.read(ServeOptions, sys.argv)))
