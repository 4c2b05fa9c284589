"""Trains the byte-level BPE tokenizer: digits single, a token per Chinese character, chat tokens.

The bundled one was made by `python -m r1pipe.data.tokenizer data/tokenizer` and is the same bytes each time.
"""

import itertools
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from r1pipe.chat.template import BOS, EOS, PAD, PLAIN_TOKENS, SPECIAL_TOKENS, TEMPLATE
from r1pipe.runs.files import write_json

VOCABULARY = 1152
CJK = "[\u3400-\u9fff\u3000-\u303f\uff00-\uff65]"


def train_tokenizer(texts: Iterable[str], characters: str, vocab_size: int) -> Tokenizer:
    """A byte-level BPE: any text can be encoded.

    Each of `characters` (those of the bundled Chinese texts) becomes one token: a weak model that must spell
    a character in bytes emits invalid UTF-8. They are split off before BPE, so none joins another.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.Split(Regex(CJK), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS) - len(PLAIN_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    often = 20_000  # enough repeats that a character's bytes merge before any word does
    tokenizer.train_from_iterator(
        [*texts, *(character * often for character in sorted(set(characters)))], trainer
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN_TOKENS])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json as transformers and vLLM read them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1 << 20,
        "chat_template": TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", settings, indent=2)


def train_bundled(folder: Path) -> None:
    """The bundled world's tokenizer: from its corpus and every Chinese character of its texts."""
    from r1pipe.data.world import corpus
    from r1pipe.data.world.content import content

    documents = list(itertools.islice(corpus.Documents(0, [1, 2, 3]), 20_000))
    marks = re.compile("|".join(map(re.escape, (*SPECIAL_TOKENS, *PLAIN_TOKENS))))
    written = "".join(documents) + "".join(str(content(name)) for name in ("words", "facts", "general"))
    texts = [part for document in documents for part in marks.split(document) if part]
    save_tokenizer(train_tokenizer(texts, "".join(re.findall(CJK, written)), VOCABULARY), folder)


if __name__ == "__main__":
    train_bundled(Path(sys.argv[1]))
