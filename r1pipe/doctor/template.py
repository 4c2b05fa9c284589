"""The chat template that comes with the weights; and rewards, tags, end of sequence and lengths under it."""

from collections.abc import Sequence

from r1pipe.chat.template import SHOWN, THINK, compose_response
from r1pipe.chat.tokens import END_THINK, SPECIAL_TOKENS
from r1pipe.config import FineTuneConfig, RLConfig
from r1pipe.core.errors import DataError
from r1pipe.core.types import Demonstration, Message, Prompt, Status
from r1pipe.data.files import summary_of_answer
from r1pipe.data.packing import collate, pack
from r1pipe.data.source import prompt_fits
from r1pipe.doctor.context import Context, Outcome, completions_of
from r1pipe.rewards import BASE_REWARDS, score_all
from r1pipe.runs.findings import FAIL, PASS, WARN
from r1pipe.train.rl.scoring import MEASURED, reward_weights, total_reward

REASONING = {"en": "Let me go through it step by step.", "zh": "我来一步一步地算。"}
USELESS = {"en": "我不知道。", "zh": "I do not know."}  # in the other language, without tags or an answer
SYSTEM = Message("system", "Answer in one line.")  # of the conversations that the template is tried on
ASKED = {"role": "user", "content": "What is 3 + 4?"}
REASONED, CONCLUDED = "Three and four make seven.", "It is 7."
SMALL = 1e-6  # rewards closer than this are the same


def rewards(context: Context) -> Outcome:
    """Correct responses earn the full reward and useless ones nothing, and answers to other questions fail.

    Correct responses pass through tokenizer and template as sampled ones do.
    """
    prompts, texts = _correct_responses(context)
    if not prompts:
        return Outcome(WARN, "no correct response to test with", "use data with solutions or gold answers")
    weights = _tested_weights(context)
    full = sum(weight for weight in weights.values() if weight > 0)
    scored = score_all(prompts, completions_of(texts), sorted(weights))
    correct = [total_reward(scores, weights, 0.0, False) for scores in scored]
    nonsense = completions_of([USELESS.get(prompt.language, USELESS["en"]) for prompt in prompts])
    of_nonsense = score_all(prompts, nonsense, sorted(weights))
    useless = max(total_reward(scores, weights, 0.0, False) for scores in of_nonsense)
    swapped = _swapped_accuracy(prompts, texts)
    value = f"correct responses earn {min(correct):.2f} to {max(correct):.2f} of {full:.2f}, "
    value += f"useless ones up to {useless:.2f}, {swapped:.0%} of answers to other questions pass"
    if not min(correct) >= context.limits.good_share * full:  # also where one is NaN
        worst = min(range(len(correct)), key=lambda i: correct[i])
        name, score = min(scored[worst].items(), key=lambda item: item[1].value)
        remedy = f"{name} gives {score.value:.2f} to {texts[worst][:50]!r} for {prompts[worst].id}"
        remedy += f": {score.detail}" if score.detail else ""
        return Outcome(FAIL, value, f"{remedy}; fix template or data")
    if useless > SMALL:
        return Outcome(FAIL, value, "a reward pays for a response without tags and answer; fix it")
    if swapped > context.limits.swapped:
        return Outcome(FAIL, value, "the checker cannot tell right from wrong; check data.tasks")
    return Outcome(PASS, value)


def custom_rewards(context: Context) -> Outcome:
    """Each custom reward has a verdict on correct responses and on useless ones, in groups of two."""
    custom = context.custom
    if not custom.names:
        return Outcome(PASS, "not needed: this stage has none")
    prompts, texts = _correct_responses(context)
    prompts = prompts or context.prompts[: context.limits.judged]
    texts = texts or [prompt.answer for prompt in prompts]
    useless = [USELESS.get(prompt.language, USELESS["en"]) for prompt in prompts]
    groups = [(p, completions_of(pair)) for p, *pair in zip(prompts, texts, useless, strict=True)]
    values, remedy = [], ""
    for name in custom.names:
        scores = [score for group in custom.score(name, groups) for score in group]
        kept = [score.value for score in scores if score and score.status is Status.SCORED]
        failed = [score.detail for score in scores if score and score.status is not Status.SCORED]
        shown = f"{min(kept):.2f} to {max(kept):.2f}" if kept else "nothing"
        values.append(f"{name} gives {shown} in {len(kept)} of {len(scores)} cases")
        if failed:
            return Outcome(FAIL, "; ".join(values), f"{name} has no verdict: {failed[0]}; fix it")
        if not kept:
            remedy = f"{name} has no rule for any of these prompts, and would count for nothing"
    return Outcome(WARN if remedy else PASS, "; ".join(values), remedy)


def _correct_responses(context: Context) -> tuple[list[Prompt], list[str]]:
    """Prompts and a correct response to each, which has passed through tokenizer and template; none where the
    data has neither solutions nor gold answers."""
    examples = context.solved or [
        Demonstration(p, compose_response(REASONING.get(p.language, p.question), summary_of_answer(p)))
        for p in context.prompts[: context.limits.judged]
        if p.answer
    ]
    chat, texts = context.chat, []
    for example in examples:
        tokens = chat.example(example.prompt, example.response)
        learned = zip(tokens.tokens, tokens.loss, strict=True)
        texts.append(chat.response([token for token, is_learned in learned if is_learned]))
    return [example.prompt for example in examples], texts


def _tested_weights(context: Context) -> dict[str, float]:
    """An RL stage's weights of its rule-based rewards; other stages weigh all alike.

    Length, repetition and KL are left out: a correct response does not differ in them from a useless one.
    """
    stage = context.config.stage
    weights = reward_weights(stage) if isinstance(stage, RLConfig) else dict.fromkeys(MEASURED, 1.0)
    return {name: weight for name, weight in weights.items() if name in BASE_REWARDS and weight}


def _swapped_accuracy(prompts: Sequence[Prompt], texts: Sequence[str]) -> float:
    """The share of responses that pass for the next prompt, where that has another answer."""
    answers = [(prompt.answer, prompt.checker) for prompt in prompts]
    different = [i for i in range(len(prompts)) if answers[i] != answers[i - 1]]
    responses = completions_of([texts[i - 1] for i in different])
    scores = score_all([prompts[i] for i in different], responses, ["accuracy"])
    return sum(score["accuracy"].value == 1.0 for score in scores if "accuracy" in score) / max(
        1, len(different)
    )


def conversations(context: Context) -> Outcome:
    """Whether the template keeps what is said, and writes an answer as it is trained on and sampled."""
    chat = context.chat
    answered = {"role": "assistant", "content": compose_response(REASONED, CONCLUDED)}
    begun = chat.render([ASKED], add_generation_prompt=True)
    ended = chat.render([ASKED, answered], add_generation_prompt=False)
    later = chat.render([ASKED, answered, ASKED], add_generation_prompt=True)
    try:
        chat.prompt_tokens(Prompt("", "", "", ASKED["content"], context=(SYSTEM,)))
        refusal = ""
    except DataError as error:
        refusal = str(error)
    value = f"system messages {'refused' if refusal else 'kept'}, "
    closed = begun.rstrip().endswith(END_THINK)
    who = "template" if closed or begun.rstrip().endswith(THINK) else "model"
    value += f"{who} opens {f'and closes {THINK}' if closed else THINK}, "
    value += f"earlier reasoning {'kept' if REASONED in later else 'left out'}"
    if chat.system:
        value += f"; system prompt {chat.system[:SHOWN]!r}"
    remedy = ""
    differs = not ended.startswith(begun) or REASONED not in ended
    if ASKED["content"] not in begun or CONCLUDED not in ended or CONCLUDED not in later:
        remedy = "it leaves out what users or assistants say"
    elif closed:
        remedy = "it closes the thought before the answer; where it asks for enable_thinking, begin it with "
        remedy += "{% set enable_thinking = true %}"
    elif differs and not chat.opened:  # those that open the thought often drop it from every answer
        remedy = "what an answer is sampled after is not what it follows in a whole conversation"
    elif not ended.rstrip().endswith(chat.special.eos):
        remedy = f"it does not end an answer with {chat.special.eos}"
    if remedy:
        return Outcome(FAIL, value, f"{remedy}; correct chat_template in tokenizer_config.json")
    if refusal:
        return Outcome(WARN, value, f"{refusal}; or use neither chat.system nor data with system messages")
    if differs:
        return Outcome(WARN, value, "a template drops the thought of every answer; training keeps it")
    return Outcome(PASS, value)


def opens_think(context: Context) -> Outcome:
    """Whether the policy opens <think>, or the template does it."""
    if context.chat.opened:
        return Outcome(PASS, "the template does; rewards read it as part of every response")
    texts = [completion.text for group in context.probe.groups for completion in group.completions]
    share = sum(text.startswith(THINK) for text in texts) / len(texts)
    value = f"the policy does, in {share:.0%} of {len(texts)} completions"
    remedy = "start from a cold start (stage=cold_start), or expect R1-Zero's slow beginning"
    return Outcome(context.limits.opens.grade(share), value, remedy)


def end_of_sequence(context: Context) -> Outcome:
    """EOS is a token of its own, within the vocabulary, different from padding, and learned."""
    chat, rows = context.chat, context.config.model.vocab_size
    value = f"EOS {chat.eos_id}, pad {chat.pad_id}, model.vocab_size {rows:,}"
    example = chat.example(Prompt("", "", "en", "?"), "!")
    packed, _ = pack([example], len(example.tokens))
    batch = collate([*packed, *pack([chat.example(Prompt("", "", "en", "?"), "! !")], 99)[0]], chat.pad_id)
    last = len(example.tokens) - 1
    learned = bool(batch.loss_BT[0, last]) and int(batch.tokens_BT[0, last]) == chat.eos_id
    stops = context.engine.module.eos_ids if context.config.weights_from else ()
    remedy = ""
    if chat.eos_id == chat.pad_id and chat.special.texts == SPECIAL_TOKENS:
        remedy = "EOS is also the padding, which is never learned; give the tokenizer two tokens"
    elif chat.encode(chat.special.eos) != [chat.eos_id]:
        remedy = f"the text {chat.special.eos} is not one token; fix the tokenizer"
    elif max(chat.eos_id, chat.vocab_size - 1) >= rows:
        remedy = "raise model.vocab_size above the tokenizer's size"
    elif not learned:
        remedy = "the loss leaves out EOS, so that no answer learns to end; fix the masks"
    elif stops and chat.eos_id not in stops:
        remedy = f"generation_config.json ends at {stops}, not at {chat.eos_id}; fix it"
    return Outcome(FAIL, value, remedy) if remedy else Outcome(PASS, f"{value}; learned")


def lengths(context: Context) -> Outcome:
    """The share that is skipped because it is too long: prompts with their answers, or whole examples."""
    config, chat, stage = context.config, context.chat, context.config.stage
    longest = config.model.max_position_embeddings
    if context.demonstrations and isinstance(stage, FineTuneConfig):
        room, what = stage.sequence_length, "examples"
        sizes = [
            len(chat.example(example.prompt, example.response).tokens) for example in context.demonstrations
        ]
        skipped = sum(size > room for size in sizes)
        remedy = f"raise stage.sequence_length, up to model.max_position_embeddings={longest}"
        if room >= longest:
            remedy = f"use shorter examples, or a model with model.max_position_embeddings over {longest}"
    else:
        max_tokens = getattr(stage, "sampling").max_tokens  # noqa: B009 - only some stages have it
        room, what = longest - max_tokens, "prompts"
        fits = prompt_fits(chat, longest, max_tokens)
        prompts = [*context.prompts, *context.general]
        sizes = [len(chat.prompt_tokens(prompt)) for prompt in prompts]
        skipped = sum(not fits(prompt) for prompt in prompts)
        remedy = "lower stage.sampling.max_tokens or use a model with a longer context"
    share = skipped / max(1, len(sizes))
    value = f"{skipped:,} of {len(sizes):,} {what} are over {room:,} tokens"
    value += f"; longest {max(sizes, default=0):,}"
    return Outcome(context.limits.too_long.grade(share), value, remedy)
