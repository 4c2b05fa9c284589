"""lm-evaluation-harness's own command with our model in its registry.

    python -m r1pipe.lm_eval --model r1pipe --model_args checkpoint=DIR --tasks gsm8k

lm_eval 0.4 finds models in its registry alone, without entry points or plugins.
"""

from lm_eval.__main__ import cli_evaluate

from r1pipe.core import terminal
from r1pipe.lm_eval.adapter import register

if __name__ == "__main__":
    register()
    terminal.run(cli_evaluate)
