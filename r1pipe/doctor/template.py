"""Rewards, tags, end and room, each as they are under the chat format that comes with the weights."""

from collections.abc import Sequence

from r1pipe.chat.template import EOS, THINK, Chat, compose_response
from r1pipe.config import RLConfig
from r1pipe.core.types import Completion, Demonstration, Prompt
from r1pipe.data.files import SUMMARY
from r1pipe.data.fitting import prompt_fits
from r1pipe.data.packing import collate, pack
from r1pipe.doctor.context import Context, graded, learns_from_demonstrations
from r1pipe.rewards import BASE_REWARDS, score_all
from r1pipe.runs.findings import FAIL, PASS, WARN, Finding
from r1pipe.train.rl.scoring import MEASURED, reward_weights, total_reward

REASONING = {"en": "Let me go through it step by step.", "zh": "我来一步一步地算。"}
USELESS = {"en": "我不知道。", "zh": "I do not know."}  # in the other language, without tags or an answer
SMALL = 1e-6  # rewards closer than this are the same


def rewards(context: Context, name: str) -> Finding:
    """A known-good response earns all, a useless one nothing, and a right answer to another question does
    not pass for right. Good responses go through tokenizer and template as sampled ones do."""
    good = context.solved or _written(context.prompts[: context.limits.judged])
    if not good:
        return Finding(
            name, WARN, "no known-good response", "give data with worked solutions or gold answers"
        )
    prompts = [trace.prompt for trace in good]
    texts = [_as_sampled(context.chat, trace) for trace in good]
    weights = _weights(context)
    full = sum(weight for weight in weights.values() if weight > 0)
    earned = _earned(prompts, texts, weights)
    useless = _earned(prompts, [USELESS[prompt.language] for prompt in prompts], weights)
    apart = [i for i in range(len(good)) if _differ(prompts[i], prompts[i - 1])]
    swapped = score_all(
        [prompts[i] for i in apart], _completions([texts[i - 1] for i in apart]), ["accuracy"]
    )
    passed = sum(score["accuracy"].value for score in swapped if "accuracy" in score) / max(1, len(apart))
    least, most = min(earned), max(useless)
    shown = f"good ones earn {least:.2f} to {max(earned):.2f} of {full:.2f}, useless ones up to {most:.2f}, "
    shown += f"{passed:.0%} of answers to other questions pass"
    if not least >= context.limits.good_share * full:  # also where one is NaN
        worst = min(range(len(earned)), key=lambda i: earned[i])
        return Finding(name, FAIL, shown, _why(prompts[worst], texts[worst], weights))
    if most > SMALL:
        return Finding(name, FAIL, shown, "a reward pays for a response without tags and answer; mend it")
    if passed > context.limits.swapped:
        return Finding(name, FAIL, shown, "the checker does not tell right from wrong; look at data.tasks")
    return Finding(name, PASS, shown)


def _weights(context: Context) -> dict[str, float]:
    """What the rules weigh: an RL stage's own, else all alike. Those on length and repetition are not tried,
    nor is the KL: they tell no good response from a useless one."""
    stage = context.config.stage
    weights = reward_weights(stage) if isinstance(stage, RLConfig) else dict.fromkeys(MEASURED, 1.0)
    return {name: weight for name, weight in weights.items() if name in BASE_REWARDS and weight}


def _written(prompts: Sequence[Prompt]) -> list[Demonstration]:
    """The gold answer, in the pattern that is asked for."""
    return [
        Demonstration(p, compose_response(REASONING[p.language], SUMMARY[p.language].format(p.answer)))
        for p in prompts
        if p.answer
    ]


def _as_sampled(chat: Chat, trace: Demonstration) -> str:
    """The response's text as it comes back from its tokens."""
    example = chat.example(trace.prompt, trace.response)
    response = [token for token, learned in zip(example.tokens, example.loss, strict=True) if learned]
    return chat.decode(response)


def _completions(texts: Sequence[str]) -> list[Completion]:
    return [Completion([], [], "stop", text) for text in texts]


def _earned(prompts: Sequence[Prompt], texts: Sequence[str], weights: dict[str, float]) -> list[float]:
    scores = score_all(prompts, _completions(texts), sorted(weights))
    return [total_reward(score, weights, 0.0, False) for score in scores]


def _differ(one: Prompt, other: Prompt) -> bool:
    return (one.answer, one.checker) != (other.answer, other.checker)


def _why(prompt: Prompt, text: str, weights: dict[str, float]) -> str:
    [scores] = score_all([prompt], _completions([text]), sorted(weights))
    name, score = min(scores.items(), key=lambda item: item[1].value)
    detail = f": {score.detail}" if score.detail else ""
    return f"{name} gives {score.value:.2f} to {text[:50]!r} for {prompt.id}{detail}; mend template or data"


def opens_think(context: Context, name: str) -> Finding:
    """Whether the template opens <think> (the format reward then never sees it) or the policy does."""
    [prompt] = context.prompts[:1]
    if context.chat.decode(context.chat.prompt_tokens(prompt)).rstrip().endswith(THINK):
        remedy = f"the format reward wants {THINK} from the model; end the template with the assistant token"
        return Finding(name, FAIL, "the template does", remedy)
    texts = [one.text for group in context.probe.groups for one in group.completions]
    share = sum(text.startswith(THINK) for text in texts) / len(texts)
    return graded(
        name,
        share,
        context.limits.opens,
        f"the policy does, in {share:.0%} of {len(texts)} completions",
        "start from a cold start (stage=cold_start), or expect R1-Zero's slow beginning",
    )


def end_of_sequence(context: Context, name: str) -> Finding:
    """EOS is a token of its own, within the vocabulary, not the filling, and learned."""
    chat, rows = context.chat, context.config.model.vocab_size
    shown = f"EOS {chat.eos_id}, pad {chat.pad_id}, model.vocab_size {rows:,}"
    example = chat.example(Prompt("", "", "en", "?"), "!")
    packed, _ = pack([example], len(example.tokens))
    batch = collate([*packed, *pack([chat.example(Prompt("", "", "en", "?"), "! !")], 99)[0]], chat.pad_id)
    last = len(example.tokens) - 1
    learned = bool(batch.loss_BT[0, last]) and int(batch.tokens_BT[0, last]) == chat.eos_id
    stops = context.engine.module.eos_ids if context.config.weights_from else ()
    faults = {
        "EOS is also the filling, which is never learned; give the tokenizer two tokens": (
            chat.eos_id == chat.pad_id
        ),
        f"the text {EOS} is not this one token; mend the tokenizer": chat.encode(EOS) != [chat.eos_id],
        "raise model.vocab_size above the tokenizer's size": max(chat.eos_id, chat.vocab_size - 1) >= rows,
        "the loss leaves EOS out, so that no answer learns to end; mend the masks": not learned,
        f"generation_config.json ends at {stops}, not at {chat.eos_id}; mend it": (
            bool(stops) and chat.eos_id not in stops
        ),
    }
    remedies = [remedy for remedy, is_so in faults.items() if is_so]
    return Finding(name, FAIL, shown, remedies[0]) if remedies else Finding(name, PASS, f"{shown}; learned")


def lengths(context: Context, name: str) -> Finding:
    """What is passed over because it does not fit: prompts with their answers, or whole examples."""
    config, chat, stage = context.config, context.chat, context.config.stage
    if context.demonstrations and learns_from_demonstrations(config):
        room = getattr(stage, "sequence_length")  # noqa: B009 - only some stages have it
        sizes = [len(chat.example(trace.prompt, trace.response).tokens) for trace in context.demonstrations]
        what, remedy = "examples", _longer(room, config.model.max_position_embeddings)
        long = sum(size > room for size in sizes)
    else:
        answer = getattr(stage, "sampling").max_tokens  # noqa: B009 - likewise
        room = config.model.max_position_embeddings - answer
        fits = prompt_fits(chat, config.model.max_position_embeddings, answer)
        what, remedy = "prompts", "lower stage.sampling.max_tokens or take a model with a longer context"
        prompts = [*context.prompts, *context.general]
        sizes = [len(chat.prompt_tokens(prompt)) for prompt in prompts]
        long = sum(not fits(prompt) for prompt in prompts)
    share = long / max(1, len(sizes))
    shown = f"{long:,} of {len(sizes):,} {what} are over {room:,} tokens; longest {max(sizes, default=0):,}"
    return graded(name, share, context.limits.too_long, shown, remedy)


def _longer(room: int, context: int) -> str:
    """How examples get more room, as far as the model's context goes."""
    if room < context:
        return f"raise stage.sequence_length, up to model.max_position_embeddings={context}"
    return f"take shorter examples, or a model with more than model.max_position_embeddings={context}"
