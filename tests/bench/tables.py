"""What a measured time is worth, what it is judged by, and the tables that show it. Imports no torch.

Of a model's operations only matrix products count, two for a multiplication with its addition, and only
those that are needed: what is recomputed, padded or computed for every expert makes a contestant slower, not
busier.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from bench.config import Case, FP8Step, load_model
from bench.referee import Result
from r1pipe.config import ModelConfig

WORDS = {"sample": "sampling", "train": "training", "grpo": "GRPO step"}

# Operations per second of dense bfloat16 products by NVIDIA's data sheets, which give them with sparsity: the
# double. The names are the driver's, of the SXM modules.
DATA_SHEETS = {"NVIDIA H100 80GB HBM3": 989.4e12, "NVIDIA H200": 989.4e12}


def data_sheet(gpu: str) -> dict[str, float]:
    """What the data sheet promises by dtype, as far as it is known here."""
    return {"bf16": DATA_SHEETS[gpu]} if gpu in DATA_SHEETS else {}


def weights_per_token(config: ModelConfig) -> int:
    """Weights that one token is multiplied with: active experts alone, the head, not the embedding."""
    width, heads = config.hidden_size, config.num_attention_heads
    query = config.qk_nope_head_dim + config.qk_rope_head_dim
    if config.q_lora_rank is None:
        queries = width * heads * query
    else:
        queries = config.q_lora_rank * (width + heads * query)
    latent = width * (config.kv_lora_rank + config.qk_rope_head_dim)
    expanded = config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    attention = queries + latent + expanded + heads * config.v_head_dim * width
    experts = config.num_experts_per_tok + config.n_shared_experts
    sparse = width * config.n_routed_experts + experts * 3 * width * config.moe_intermediate_size
    dense = 3 * width * config.intermediate_size
    first = config.first_k_dense_replace
    layers = config.num_hidden_layers
    return layers * attention + first * dense + (layers - first) * sparse + width * config.vocab_size


def forward_flops(config: ModelConfig, begin: int, end: int) -> int:
    """Operations of the tokens at places [begin, end) of one sequence, each looking at all up to itself."""
    per_head = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    per_pair = 2 * config.num_hidden_layers * config.num_attention_heads * per_head
    pairs = (end * (end + 1) - begin * (begin + 1)) // 2
    return 2 * weights_per_token(config) * (end - begin) + per_pair * pairs


def case_flops(config: ModelConfig, case: Case) -> int:
    """Operations of a case: a backward pass counts twice a forward; grpo reads each prompt once per pass and
    passes over its completions five times (sampling, reference, forward, backward)."""
    if case.kind == "train":
        return 3 * case.sequences * forward_flops(config, 0, case.prompt)
    prompts = case.sequences // case.group * forward_flops(config, 0, case.prompt)
    completions = case.sequences * forward_flops(config, case.prompt, case.prompt + case.new)
    return (5 if case.kind == "grpo" else 1) * (prompts + completions)


def utilisation(flops: float, seconds: float, peak: float) -> float:
    """Model FLOPs utilisation: the share of `peak` (operations per second) that the work's own need is."""
    return flops / seconds / peak


def speedup(ours: float, theirs: float) -> float:
    """How many times faster ours is, from seconds for the same work."""
    return theirs / ours


@dataclass(frozen=True)
class Row:
    """One contestant in one case, in numbers."""

    result: Result
    tokens_per_s: float
    share_of_peak: float  # MFU by the measured matmul in the setting's dtype
    share_of_sheet: float | None  # MFU by the data sheet's peak, where that is known
    ratio: float | None  # how many times faster ours is; None for ours
    judgement: str  # against floor and goal, and memory


def rows_of(results: Sequence[Result], peaks: dict[str, float], sheet: dict[str, float]) -> list[Row]:
    """Rows of one case, ours first. Operations per second by dtype: `peaks` measured, `sheet` promised."""
    ours = next(result for result in results if result.contestant == "ours")
    flops = case_flops(load_model(ours.model), ours.case)
    rows = []
    for result in sorted(results, key=lambda result: result is not ours):
        promised = sheet.get(result.setting.dtype)
        ratio = None if result is ours else speedup(ours.seconds, result.seconds)
        rows.append(
            Row(
                result,
                result.case.tokens / result.seconds,
                utilisation(flops, result.seconds, peaks[result.setting.dtype]),
                utilisation(flops, result.seconds, promised) if promised else None,
                ratio,
                "" if ratio is None else judgement(result, ours, ratio),
            )
        )
    return rows


def judgement(result: Result, ours: Result, ratio: float) -> str:
    """Whether the ratio reaches the case's floor and goal, and whether ours takes no more memory."""
    floor, goal = result.case.floors.get(result.contestant), result.case.goals.get(result.contestant)
    memory = "ours takes more memory" if ours.memory > result.memory else ""
    return ", ".join(filter(None, [reached(ratio, floor, goal), memory]))


def reached(ratio: float, floor: float | None, goal: float | None) -> str:
    """Which of the two a ratio reaches; empty where there is neither."""
    if goal is not None and ratio >= goal:
        return f"goal {goal:g} reached"
    if floor is not None:
        return f"floor {floor:g} {'reached' if ratio >= floor else 'MISSED'}"
    return ""


def words(case: Case) -> str:
    """A case as the table names it."""
    if case.kind == "train":
        return f"{WORDS[case.kind]} {case.sequences} x {case.prompt}"
    if case.kind == "grpo":
        return f"{WORDS[case.kind]} {case.sequences // case.group} x {case.group} x {case.new}"
    return f"{WORDS[case.kind]} {case.sequences} x {case.prompt}+{case.new}"


def new_table(title: str, left: Sequence[str], right: Sequence[str], judged: bool = True) -> Table:
    """An empty table with columns of text, columns of figures and, last, one of judgements."""
    table = Table(title=title, title_justify="left")
    for heading in left:
        table.add_column(heading)
    for heading in right:
        table.add_column(heading, justify="right")
    if judged:
        table.add_column("judged")
    return table


def table_of(rows: Sequence[Row], threads: int, peaks: dict[str, float]) -> Table:
    """The whole table, with the measured peaks above it: MFU is a share of these, or of the data sheet's."""
    measured = ", ".join(f"{dtype} {peak / 1e9:,.0f} GFLOP/s" for dtype, peak in peaks.items())
    figures = ("s", "tokens/s", "MFU", "of sheet", "memory MiB", "ours is faster by")
    title = f"{threads} threads; matmul peak: {measured}"
    table = new_table(title, ("model", "case", "contestant", "setting"), figures)
    for row in rows:
        result = row.result
        table.add_row(
            result.model,
            words(result.case),
            result.contestant,
            str(result.setting),
            f"{result.seconds:.3g}",
            f"{row.tokens_per_s:,.0f}",
            f"{row.share_of_peak:.1%}",
            "" if row.share_of_sheet is None else f"{row.share_of_sheet:.1%}",
            f"{result.memory / 2**20:,.0f}",
            "" if row.ratio is None else f"{row.ratio:.1f}",
            row.judgement,
            end_section=row is rows[-1],
        )
    return table


def fp8_table(step: FP8Step, bf16: Result, fp8: Result) -> list[RenderableType]:
    """Two contestants that took the same steps on the same data, and where FP8's time goes."""
    title = f"{fp8.model}, {words(step.case)}: FP8 beside BF16, {step.steps + 1} steps each on the same data"
    table = new_table(
        title, ["setting"], ("s", "tokens/s", "memory MiB", "FP8 is faster by", "loss", "apart by")
    )
    ratio = speedup(fp8.seconds, bf16.seconds)
    apart = abs(fp8.facts["loss"] - bf16.facts["loss"]) / abs(bf16.facts["loss"])
    for result in (bf16, fp8):
        table.add_row(
            str(result.setting),
            f"{result.seconds:.3g}",
            f"{step.case.tokens / result.seconds:,.0f}",
            f"{result.memory / 2**20:,.0f}",
            f"{ratio:.2f}" if result is fp8 else "",
            f"{result.facts['loss']:.5f}",
            f"{apart:.3%}" if result is fp8 else "",
            fp8_judgement(step, ratio, apart) if result is fp8 else "",
        )
    shares = ", ".join(f"{kind} {share:.0%}" for kind, share in fp8.facts["shares"].items())
    return [table, Text(f"of an FP8 step's time: {shares}\n")]


def fp8_judgement(step: FP8Step, ratio: float, apart: float) -> str:
    """Whether FP8 is as much faster as it must and should be, and whether it learns the same."""
    speed = reached(ratio, step.case.floors.get("bf16"), step.case.goals.get("bf16"))
    within, beyond = f"loss within {step.loss:.2%}", f"LOSS MORE THAN {step.loss:.2%} APART"
    return ", ".join(filter(None, [speed, within if apart <= step.loss else beyond]))
