"""Answers to general prompts before a judge: rated for help and for harm, and compared with a baseline's.

Helpfulness and harm are rated apart and listed by kind of prompt. The baseline is a checkpoint, a folder or a
server, which answers the same prompts in the same way, or a file of answers.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from r1pipe.chat.answerer import AnswerParams
from r1pipe.config import EvaluateConfig
from r1pipe.config.answerer import AnswererConfig, is_server
from r1pipe.core.errors import DataError
from r1pipe.core.estimates import mean
from r1pipe.core.types import Prompt
from r1pipe.data.source import draw_prompts_that_fit, prompt_fits
from r1pipe.rewards.judge import Judge
from r1pipe.rewards.judge.cache import AnswerCache
from r1pipe.rewards.judge.prompts import judged_part
from r1pipe.rewards.judge.win_rate import win_rates
from r1pipe.runs.lineage import checkpoint_of_folder
from r1pipe.train.answering import open_answerer
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.finish import HELD_OUT
from r1pipe.train.judging import open_judge, summary_of
from r1pipe.train.rollout import SamplingParams
from r1pipe.train.run import Run

Figures = dict[str, Any]
BASELINE = "baseline"  # in a run's data/: answers of the baseline; and their random stream
ANSWERS = ("answer", "response", "output", "completion")  # columns of a baseline's file
QUESTIONS = ("question", "instruction", "prompt")


class Judged(NamedTuple):
    """One answer with what the judge says of it; plain data, so that ranks can exchange it."""

    problem: int  # index of the prompt in the whole list
    ratings: dict[str, float | None]  # kind -> mean verdict; None: could not be read
    margin: float | None  # against the baseline, above 0 if better; None: no verdict
    lengths: tuple[int, int]  # characters of this answer and of the baseline's


def judge_answers(run: Run[EvaluateConfig], ranks: Ranks) -> Figures:
    """What the judge says of the sampler's weights; all ranks call, all get it.

    Raises CheckpointError where the judge is too weak, and DataError where there are no general prompts.
    """
    config = run.stage.judge
    assert config is not None
    judge = open_judge(run, ranks)
    prompts = general_prompts(run)
    places = range(ranks.rank, len(prompts), ranks.world_size)
    mine = [prompts[i] for i in places]
    texts = answers_of(run, ranks, mine, len(prompts))
    ratings: list[dict[str, float | None]] = [{} for _ in mine]
    for kind in config.rates:
        show = partial(_show, run, f"judging ({kind})", len(prompts))
        for row, rating in zip(
            ratings, judge.rate(list(zip(mine, texts, strict=True)), kind, show), strict=True
        ):
            row[kind] = rating.value
    margins: list[float | None] = [None] * len(mine)
    lengths = [(len(judged_part(judge.prompts.pairwise, text)), 0) for text in texts]
    baseline = None
    if config.baseline:
        baseline, others = baseline_answers(run, ranks, judge, mine, len(prompts))
        pairs = list(zip(mine, texts, others, strict=True))
        show = partial(_show, run, "comparing", 2 * len(prompts))  # in both orders
        margins = [each.margin for each in judge.compare(pairs, show)]
        other_lengths = [len(judged_part(judge.prompts.pairwise, text)) for text in others]
        lengths = [(own, other) for (own, _), other in zip(lengths, other_lengths, strict=True)]
    rows = [Judged(*row) for row in zip(places, ratings, margins, lengths, strict=True)]
    everyone = sorted(row for share in ranks.all_gather_objects(rows) for row in share)
    figures = summarise(prompts, everyone, config.rates, baseline)
    if baseline:
        figures["comparison"]["spent"] = asdict(AnswerCache(run.folder.data / BASELINE).spent)
    return {**figures, "judge": summary_of(run, ranks, judge)}


def check_answers(run: Run[EvaluateConfig]) -> None:
    """Before weights are loaded. Raises DataError where there are no general prompts, or a baseline's file
    lacks an answer to one of them."""
    prompts, baseline = general_prompts(run), run.stage.judge.baseline if run.stage.judge else None
    if baseline and Path(baseline).suffix == ".jsonl":
        answers_in(Path(baseline), prompts)


def _show(run: Run[Any], what: str, of_all: int, done: int, total: int) -> None:
    run.shared_progress(what, done, of_all, "questions")


def general_prompts(run: Run[EvaluateConfig]) -> list[Prompt]:
    """The held-out general prompts that fit. Raises DataError where there are none."""
    config, source = run.stage.eval, run.data
    prompts, too_long = draw_prompts_that_fit(
        lambda n: source.general_prompts(config.split, n, HELD_OUT, {}),
        config.general,
        prompt_fits(run.chat, run.config.model.max_position_embeddings, config.max_tokens),
    )
    if not prompts:
        raise DataError(
            f"data={run.config.data.name} has no general prompts of split {config.split} for the judge "
            f"({too_long} are too long); choose data with instructions, and stage.eval.general above 0"
        )
    return prompts


def answers_of(run: Run[EvaluateConfig], ranks: Ranks, prompts: Sequence[Prompt], of_all: int) -> list[str]:
    """The answers to this rank's share of the prompts, drawn as the evaluation draws them. `of_all`: how many
    all ranks have."""
    config = run.stage.eval
    params = SamplingParams(
        *(config.max_tokens, config.temperature, config.top_p, 1, run.seed("judged answers")),
        *(ranks.rank, ranks.world_size),
        max_num_seqs=config.max_num_seqs,
    )
    tokens = [run.chat.prompt_tokens(prompt) for prompt in prompts]
    drawn = run.sampler.generate(tokens, params, partial(_show, run, "answering", of_all))
    return [run.chat.response(completion.tokens) for completion in drawn]


def baseline_answers(
    run: Run[EvaluateConfig], ranks: Ranks, judge: Judge, prompts: Sequence[Prompt], of_all: int
) -> tuple[str, list[str]]:
    """Whose answers the baseline's are, and its answer to each of this rank's prompts, of which all ranks
    have `of_all`. Raises DataError where a file lacks some."""
    config, drawn = run.stage.judge, run.stage.eval
    assert config is not None and config.baseline is not None
    path = Path(config.baseline)
    if path.suffix == ".jsonl":
        return str(path), answers_in(path, prompts)
    named = config.baseline if is_server(config.baseline) else checkpoint_of_folder(path)
    answerer = open_answerer(run, ranks, "stage.judge.baseline", named, of_baseline(config))
    params = AnswerParams(
        *(drawn.max_tokens, drawn.temperature, drawn.top_p, 1, run.seed(BASELINE), drawn.max_num_seqs)
    )
    cache = AnswerCache(run.folder.data / BASELINE, ranks.rank)
    texts = Judge(answerer, judge.config, cache).texts(
        prompts, params, partial(_show, run, "answers of the baseline", of_all)
    )
    answerer.close()
    return answerer.identity.name, [text for [text] in texts]


def of_baseline(config: AnswererConfig) -> AnswererConfig:
    """How a baseline that is a server is asked: as the judge, for the first model that it serves."""
    return AnswererConfig(
        *(
            config.licence,
            None,
            config.key_variable,
            config.timeout_s,
            config.retries,
            config.parallel,
            0.0,
            0.0,
        )
    )


def answers_in(path: Path, prompts: Sequence[Prompt]) -> list[str]:
    """The answer to each prompt in a JSONL file, whose rows have a prompt_id or the question. Raises
    DataError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"stage.judge.baseline={path} cannot be read ({error}); give a JSONL file") from None
    answers: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise DataError(f"{path}:{number}: not JSON; correct it") from None
        text = next((row[name] for name in ANSWERS if name in row), None) if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise DataError(f"{path}:{number}: no text under {', '.join(ANSWERS)}; write one")
        keys = [row[name] for name in ("prompt_id", *QUESTIONS) if isinstance(row.get(name), str)]
        if not keys:
            raise DataError(f"{path}:{number}: neither prompt_id nor {', '.join(QUESTIONS)}; write one")
        answers |= dict.fromkeys(keys, text)
    found = [answers.get(prompt.id, answers.get(prompt.question)) for prompt in prompts]
    if missing := [prompt for prompt, text in zip(prompts, found, strict=True) if text is None]:
        raise DataError(
            f"stage.judge.baseline={path} has no answer to {len(missing)} of {len(prompts)} prompts, among "
            f"them {missing[0].id} ({missing[0].question[:60]!r}); add them"
        )
    return [text for text in found if text is not None]


def summarise(
    prompts: Sequence[Prompt], rows: Sequence[Judged], kinds: Sequence[str], baseline: str | None
) -> Figures:
    """Mean ratings, over all and by task, and the win rates."""
    tasks = sorted({prompt.task for prompt in prompts})
    figures: Figures = {"answers": len(rows)}
    for kind in kinds:
        read = [(prompts[row.problem].task, row.ratings[kind]) for row in rows]
        known = [(task, value) for task, value in read if value is not None]
        figures[kind] = {
            "mean": mean(value for _, value in known),
            "by_task": {task: mean(value for name, value in known if name == task) for task in tasks},
            "without_verdict": len(read) - len(known),
        }
    if baseline:
        figures["comparison"] = {
            "baseline": baseline,
            **win_rates([row.margin for row in rows], [row.lengths for row in rows]),
            "by_task": {
                task: win_rates([row.margin for row in of], [row.lengths for row in of])["win_rate"]
                for task in tasks
                if (of := [row for row in rows if prompts[row.problem].task == task])
            },
        }
    return figures
