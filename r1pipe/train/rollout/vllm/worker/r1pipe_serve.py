"""vLLM's API server, which ends when the job that started it does: `python r1pipe_serve.py PARENT ARGUMENTS`.

PARENT is the job's process id. vLLM's engine and workers are in this process's group, and end with it.
"""

import os
import runpy
import signal
import sys
import threading
import time

SERVER = "vllm.entrypoints.openai.api_server"
POLL_S = 1.0


def end_with(parent: int) -> None:
    """Kill this process group once `parent` is gone, however it ended."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_S)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    end_with(int(sys.argv.pop(1)))
    runpy.run_module(SERVER, run_name="__main__", alter_sys=True)
