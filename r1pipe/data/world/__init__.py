"""The bundled world: procedural, seeded, in English and Chinese, with a held-out split."""

import hashlib
import itertools
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace

from r1pipe.chat.template import compose_response, parse
from r1pipe.config import DataConfig
from r1pipe.config.data import LEVELS
from r1pipe.core.errors import ConfigError, nearest
from r1pipe.core.paths import content_dir
from r1pipe.core.types import GENERAL_TASKS, HELPFUL_TASKS, Demonstration, PreferencePair, Prompt, SafetyLabel
from r1pipe.data.source import Source
from r1pipe.data.world import corpus, general, truth
from r1pipe.data.world.content import choose, content, draw_until, reworded
from r1pipe.runs import heartbeat

# Keys of `data` left out of the world's hash.
IGNORED = ("licence", "labels", "bad_rows", "max_bad_rows", "longest_row")
# A draw stops when, for each prompt it has found, this many in a row were not new. The rarest prompts come up
# about a third as often as the average one.
PATIENCE = 30
TEXTS = ("corpus", "facts", "general", "words")


class World(Source):
    """The data source of the bundled world; every method is a pure function of its arguments and `seed`."""

    def __init__(self, config: DataConfig, seed: int, report: Callable[[str], None] | None = None):
        """`report` takes a line where the world has fewer prompts than requested."""
        self.config, self.seed, self._report = config, seed, report
        settings = {key: value for key, value in asdict(config).items() if key not in IGNORED}
        if not config.unseen:  # nothing is trained on the other wordings
            del settings["unseen"]
        if config.thorough:  # the usual world keeps its hash
            del settings["thorough"]
        texts = b"".join((content_dir() / "world" / f"{name}.json").read_bytes() for name in TEXTS)
        identity = json.dumps([settings, seed, hashlib.sha256(texts).hexdigest()], sort_keys=True)
        self.hash = hashlib.sha256(identity.encode()).hexdigest()
        self.files = {}
        self.truth, self.strategy_of = truth.truth_of, corpus.strategy_of
        self._all: dict[str, list[Prompt]] = {}  # split -> its prompts, once a draw has requested more

    def _rng(self, *stream: object) -> random.Random:
        return random.Random("/".join(map(str, (self.seed, *stream))))

    def prompts(self, split: str, n: int, seed: int) -> list[Prompt]:
        """n distinct reasoning prompts, tasks in the corpus's proportions, languages and levels even.

        Where there are fewer than n (of easy programs in one language there are 4,454), all of them.
        """
        if split not in self._all or n <= len(self._all[split]):
            config = self.config
            found = self._distinct(self._rng("prompts", split, seed), split, n, config.levels)
            if len(found) == n:
                return found
            self._all[split] = sorted(found, key=lambda prompt: prompt.id)
            if self._report:
                chosen = []
                for key in ("tasks", "levels", "languages"):
                    values = ",".join(map(str, getattr(config, key)))
                    chosen.append(f"data.{key}=[{values}]")
                self._report(
                    f"data={config.name} has {len(found):,} distinct {split} problems with "
                    f"{' '.join(chosen)}, fewer than the {n:,} requested; all are used. For more, add tasks, "
                    f"levels or languages; or request {len(found):,}"
                )
        return self._rng("all prompts", split, seed).sample(self._all[split], len(self._all[split]))

    def _distinct(self, rng: random.Random, split: str, n: int, levels: Sequence[int]) -> list[Prompt]:
        """n distinct prompts of these levels, or fewer where hardly any new one comes."""
        shares = {task: content("corpus")["tasks"].get(task, 1.0) for task in self.config.tasks}
        found: dict[str, Prompt] = {}
        repeats = 0
        while len(found) < n and repeats <= PATIENCE * (len(found) + PATIENCE):
            heartbeat.tick()
            task, language = choose(rng, shares), rng.choice(self.config.languages)
            prompt = self._draw(rng, split, task, language, rng.choice(levels))
            repeats = repeats + 1 if prompt.id in found else 0
            found.setdefault(prompt.id, prompt)
        return list(found.values())

    def harder_prompts(self, split: str, n: int, seed: int) -> list[Prompt]:
        """n problems of each level above `data.levels`."""
        above = [level for level in LEVELS if level > max(self.config.levels)]
        drawn = (
            self._distinct(self._rng("harder", level, split, seed), split, n, [level]) for level in above
        )
        return list(itertools.chain.from_iterable(drawn))

    def demonstrations(
        self, n: int, seed: int, styles: dict[str, float], correct_only: bool
    ) -> list[Demonstration]:
        """n worked solutions to train prompts, each in one language and in the right format."""
        rng, shares = self._rng("traces", seed), content("corpus")
        mix = corpus.shares_of(styles or shares["styles"], self.config.thorough)
        blocks = (self.prompts("train", 512, hash_of(seed, block)) for block in itertools.count())
        prompts = itertools.chain.from_iterable(blocks)

        def solve() -> Demonstration:
            return corpus.reasoning_demonstration(next(prompts), rng, mix, shares["written_slip"])

        def is_wanted(trace: Demonstration) -> bool:
            task = corpus.TASKS[trace.prompt.task]
            return not correct_only or task.is_right(trace.prompt, parse(trace.response).summary)

        wanted = f"correct solution in stage.styles={mix}; set stage.correct_only=false or add styles"
        return [draw_until(solve, is_wanted, wanted) for _ in range(n)]

    def general_prompts(self, split: str, n: int, seed: int, kinds: Mapping[str, float]) -> list[Prompt]:
        """n general prompts, the kinds by these shares (none: in turn)."""
        rng = self._rng("general", split, seed)
        if kinds:
            return [self._general(rng, split, choose(rng, dict(kinds))) for _ in range(n)]
        return [self._general(rng, split, GENERAL_TASKS[i % len(GENERAL_TASKS)]) for i in range(n)]

    def _general(self, rng: random.Random, split: str, kind: str) -> Prompt:
        if kind not in GENERAL_TASKS:
            raise ConfigError(f"general_kinds: the world has no {kind}; {nearest(kind, list(GENERAL_TASKS))}")
        return self._draw(rng, split, kind, rng.choice(self.config.languages))

    def _draw(self, rng: random.Random, split: str, task: str, language: str, level: int = 0) -> Prompt:
        prompt = corpus.draw_prompt(rng, split, task, language, level)
        if self.config.unseen:
            prompt = reworded(prompt)
        return replace(prompt, source=corpus.SOURCE, licence=self.config.licence)

    def general_demonstrations(self, n: int, seed: int, kinds: Mapping[str, float]) -> list[Demonstration]:
        """n written answers, the kinds by these shares (none: by the corpus's)."""
        rng, shares = self._rng("general traces", seed), content("corpus")
        demonstrations = []
        for _ in range(n):
            kind = choose(rng, dict(kinds) or shares["kinds"])
            prompt = self._general(rng, "train", kind)
            # annotators of mixed quality wrote the safety answers, so the last stage has something to fix
            right = shares["written_safety_right"] if kind == "safety" else 1.0
            response = compose_response(*general.respond(prompt, rng, right, shares["written_manner"]))
            demonstrations.append(corpus.demonstration(prompt, response))
        return demonstrations

    def preference_pairs(self, split: str, n: int, seed: int) -> list[PreferencePair]:
        """n pairs ranked by the hidden truth, half of them on safety: fewer would not teach that refusing a
        safe request is unhelpful too."""
        rng = self._rng("pairs", split, seed)
        kinds = [kind for helpful in HELPFUL_TASKS for kind in (helpful, "safety")]
        return [
            truth.preference_pair(self._general(rng, split, kinds[i % len(kinds)]), rng) for i in range(n)
        ]

    def safety_labels(self, split: str, n: int, seed: int) -> list[SafetyLabel]:
        """n labelled responses, three in four to safety prompts."""
        rng = self._rng("labels", split, seed)
        kinds = ("safety", "safety", "safety", *HELPFUL_TASKS[:1])
        return [truth.safety_label(self._general(rng, split, kinds[i % len(kinds)]), rng) for i in range(n)]

    def documents(self, seed: int) -> corpus.Documents:
        return corpus.Documents(hash_of(self.seed, seed), self.config.thorough)


def hash_of(*parts: object) -> int:
    """An integer that depends on all parts, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "big")
