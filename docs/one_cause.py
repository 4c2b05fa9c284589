"""Change one cause of R1's curve and see what becomes of it.

    python docs/one_cause.py nothing       # base, cold start and GRPO as they are: five minutes on two cores
    python docs/one_cause.py length        # GRPO may think for 64 tokens, not 352
    python docs/one_cause.py reflection    # no text goes on after a try that missed; 35 minutes

Further arguments are overrides of every stage, such as seed=1. Each cause is a pipeline of its own, so an
interrupted command goes on where it was. The last lines say what the three stages do on held-out problems.
"""

import json
import subprocess
import sys
from pathlib import Path

R1PIPE = str(Path(sys.executable).with_name("r1pipe"))
CAUSES = {  # which overrides a stage gets; "every" stage's come first
    "nothing": {"every": []},
    "length": {"every": [], "grpo": ["stage.sampling.max_tokens=64"]},
    "reflection": {
        "every": ["data.thorough=false"],
        "pretrain": ["engine.precision=bf16"],
        "base": ["parent=pretrain"],
        "cold_start": ["parent=pretrain"],
    },
}


def main(cause: str, *overrides: str) -> None:
    changed = CAUSES[cause]
    shared = ["recipe=laptop", f"pipeline=one-cause-{cause}", *changed["every"], *overrides]
    for stage in ("pretrain", "base", "cold_start", "grpo"):
        if stage != "pretrain" or stage in changed:
            own = changed.get(stage, [])
            subprocess.run([R1PIPE, "run", f"stage={stage}", *shared, *own], check=True)
    told = subprocess.run([R1PIPE, "compare", "--json", *shared], check=True, capture_output=True, text=True)
    print(f"{'stage':<12}{'pass@1':>8}{'tokens':>8}{'reflects':>10}{'level 4':>9}")
    for row in json.loads(told.stdout):
        numbers = [row[key] for key in ("pass_at_1", "reflection_rate", "level_4")]
        right, reflects, hardest = (f"{100 * number:.1f}%" for number in numbers)
        print(f"{row['stage']:<12}{right:>8}{row['length_mean']:>8.0f}{reflects:>10}{hardest:>9}")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in CAUSES:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)  # the stage has said why
