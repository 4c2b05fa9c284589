"""Change one cause of R1's curve and see what becomes of it.

    python docs/one_cause.py nothing       # base, cold start and GRPO as they are: five minutes on two cores
    python docs/one_cause.py length        # GRPO may think for 64 tokens, not 352
    python docs/one_cause.py reflection    # no text keeps trying after a miss; trains a base: 35 minutes

Further arguments are overrides of every stage, such as seed=1 (`reflection` trains a base of that seed then).
An interrupted command goes on where it was. The last lines say what the stages do on held-out problems.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

R1PIPE = str(Path(sys.executable).with_name("r1pipe"))
CPU = Path("/proc/cpuinfo")
BF16 = CPU.exists() and re.search("amx_bf16|avx512_bf16", CPU.read_text())  # fast; as in make pretrain
CAUSES = {  # overrides of all stages, and of one
    "nothing": {},
    "length": {"grpo": ["stage.sampling.max_tokens=64"]},
    "reflection": {
        "all": ["data.thorough=false"],
        "pretrain": ["engine.precision=bf16"] if BF16 else [],
        "base": ["parent=pretrain"],
        "cold_start": ["parent=pretrain"],
    },
}


def main(cause: str, *overrides: str) -> None:
    changed = CAUSES[cause]
    name = re.sub(r"[^\w.]+", "-", " ".join(["one-cause", cause, *overrides]))
    shared = ["recipe=laptop", f"pipeline={name}", *changed.get("all", []), *overrides]
    finished = {row["stage"] for row in compared(shared)}
    for stage in ("pretrain", "base", "cold_start", "grpo"):
        if stage not in finished and (stage != "pretrain" or stage in changed):
            subprocess.run([R1PIPE, "run", f"stage={stage}", *shared, *changed.get(stage, [])], check=True)
    print(f"{'stage':<12}{'pass@1':>8}{'tokens':>8}{'reflects':>10}{'level 4':>9}")
    for row in compared(shared):
        shares = [row[key] for key in ("pass_at_1", "reflection_rate", "level_4")]
        right, reflects, hardest = ("-" if share is None else f"{share:.1%}" for share in shares)
        print(f"{row['stage']:<12}{right:>8}{row['length_mean']:>8.0f}{reflects:>10}{hardest:>9}")


def compared(overrides: list[str]) -> list[dict[str, Any]]:
    found = subprocess.run([R1PIPE, "compare", "--json", *overrides], check=True, stdout=subprocess.PIPE)
    return json.loads(found.stdout)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in CAUSES:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)  # r1pipe has said why
