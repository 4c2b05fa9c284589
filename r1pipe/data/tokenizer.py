"""Trains the byte-level BPE tokenizer: digits single, a token per Chinese character, chat tokens.

The bundled one was made by `python -m r1pipe.data.tokenizer data/tokenizer` and is the same bytes each time.
"""

import itertools
import re
import sys
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from r1pipe.chat.template import BOS, EOS, PAD, PLAIN_TOKENS, SPECIAL_TOKENS
from r1pipe.core.chat_template import TEMPLATE
from r1pipe.data.world import corpus
from r1pipe.data.world.content import content
from r1pipe.runs.files import write_json

VOCABULARY = 1152
CJK = "[\u3400-\u9fff\u3000-\u303f\uff00-\uff65]"


def train_bundled(folder: Path) -> None:
    """The bundled world's tokenizer, as transformers and vLLM read it: from its corpus and every Chinese
    character of its texts. It is a byte-level BPE: any text can be encoded.

    Each Chinese character becomes one token: a weak model that must spell a character in bytes emits invalid
    UTF-8. They are split off before BPE, so none joins another.
    """
    documents = list(itertools.islice(corpus.Documents(0), 20_000))
    marks = re.compile("|".join(map(re.escape, (*SPECIAL_TOKENS, *PLAIN_TOKENS))))
    texts = [part for document in documents for part in marks.split(document) if part]
    written = "".join(documents) + "".join(str(content(name)) for name in ("words", "facts", "general"))
    characters = sorted(set(re.findall(CJK, written)))
    often = 20_000  # enough repeats that a character's bytes merge before any word does

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
        vocab_size=VOCABULARY - len(SPECIAL_TOKENS) - len(PLAIN_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *(character * often for character in characters)], trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN_TOKENS])

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


if __name__ == "__main__":
    train_bundled(Path(sys.argv[1]))
