"""lm-evaluation-harness on our checkpoints: `python -m r1pipe.lm_eval --model r1pipe`."""
