"""What every `stage.extract` needs: the run, the teacher, and what must not be trained on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from r1pipe.config import DistillConfig
from r1pipe.core.errors import DataError
from r1pipe.core.types import Completion, Prompt
from r1pipe.data.source import draw_prompts_that_fit, prompt_fits
from r1pipe.runs import samples
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.extract.answers import scored
from r1pipe.train.extract.dataset import Kept, Steps, filtered, filters_of
from r1pipe.train.extract.teacher import GenerationParams, TeacherGenerator
from r1pipe.train.run import Run, log

ANSWERS = "answers"  # the name of the teacher's answers among its shards


@dataclass
class Found:
    """What an extraction gives: rows, on rank 0, with the funnel that they came through."""

    rows: list[Kept]
    funnel: Steps


@dataclass(frozen=True)
class Work:
    """One extraction. All ranks have one."""

    run: Run[DistillConfig]
    ranks: Ranks
    teacher: TeacherGenerator
    questions: Sequence[str]  # of the evaluation

    @property
    def stage(self) -> DistillConfig:
        return self.run.stage

    def answers(self, top_logprobs: int = 0) -> GenerationParams:
        """How answers are drawn."""
        sampling, each = self.stage.sampling, self.stage.samples_per_prompt
        return GenerationParams(sampling.max_tokens, sampling.temperature, sampling.top_p, each, top_logprobs)

    def data_prompts(self) -> list[Prompt]:
        """The data's prompts that leave room for an answer, reasoning and then general ones. Raises DataError
        where there are none."""
        run, stage = self.run, self.stage
        context = run.config.model.max_position_embeddings
        fits = prompt_fits(run.chat, context, stage.sampling.max_tokens)
        kinds = partial(run.data.general_prompts, kinds=stage.general_kinds)
        found: list[Prompt] = []
        for draw, wanted, stream in (
            (run.data.prompts, stage.prompts, "prompts"),
            (kinds, stage.general_prompts, "general prompts"),
        ):
            if not wanted:
                continue
            seed = run.seed(stream)
            prompts, too_long = draw_prompts_that_fit(partial(_train, draw, seed), wanted, fits)
            log.info("%d of %d %s, %d more are too long", len(prompts), wanted, stream, too_long)
            found += prompts
        if not found:
            raise DataError(
                f"data={run.config.data.name} has no prompts that leave room for stage.sampling.max_tokens="
                f"{stage.sampling.max_tokens} in a context of {context} tokens; lower it, or choose others"
            )
        return found

    def origin(self, name: str) -> dict[str, str | None]:
        """Where a text of the teacher came from; `name`: of the work that asked for it."""
        who = self.teacher.identity
        return {
            "source": samples.TEACHER + who.name,
            "checkpoint_hash": who.version if who.kind == "checkpoint" else None,
            "seed": str(self.teacher.seed(name)),
            "licence": who.licence or None,
            "teacher": who.name,
            "teacher_version": who.version,
        }

    def kept(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[list[Completion]],
        origin: Mapping[str, str | None] | None = None,
    ) -> tuple[list[Kept], Steps, list[Completion]]:
        """The answers that pass the filters, with the funnel, and their completions. `origin`: the teacher's,
        unless it is another; without a licence, the prompt's is theirs. On rank 0 alone: others get nothing.
        """
        if self.ranks.rank != 0:
            return [], [], []
        drawn = scored([*zip(prompts, answers, strict=True)], self.stage.filters.min_agreement)
        passed, steps = filtered(self.run, drawn, self.questions)
        origin = origin or self.origin(ANSWERS)
        rows = [
            Kept(
                one.prompt,
                one.completion.text,
                {"licence": one.prompt.licence, **origin},
                filters_of(self.stage, one),
            )
            for one in passed
        ]
        return rows, steps, [one.completion for one in passed]


def _train(draw, seed: int, n: int) -> list[Prompt]:  # type: ignore[no-untyped-def]
    return draw("train", n, seed)
