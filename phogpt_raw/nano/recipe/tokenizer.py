"""A byte-level BPE that splits text exactly as PhoGPT's tokenizer does, with fixed ids 0 to 3.

Merges never cross the border of a word. `###` is a word, and so is `lời:`, since a colon does not
separate words. What is between words (a full stop, a newline) is a word of its own. No token is
added before or after a text; the caller appends `</s>`.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

from phogpt_raw.refusal import Refusal

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]  # ids 0, 1, 2, 3
EOS = 2
# A word and the space before it, without white space, punctuation, ( ) and |. VinAI's file has the
# equivalent ` ?[^(\s|[.,!?…。，、।۔،])]+` with a nested set.
WORD = r" ?[^\s.,!?()|…。，、।۔،]+"
CHAT_TEMPLATE = (
    "{%- set so_far = namespace(told='', between='') -%}"
    "{%- for message in messages -%}"
    "{%- set text = message['content'] | trim -%}"
    "{%- if message['role'] == 'assistant' -%}{{ '\\n### Trả lời: ' + text + eos_token }}"
    "{%- elif message['role'] == 'system' -%}"
    "{%- if text -%}{%- set so_far.told = so_far.told + text + '\\n' -%}{%- endif -%}"
    "{%- else -%}{{ so_far.between + '### Câu hỏi: ' + so_far.told + text }}"
    "{%- set so_far.told = '' -%}{%- set so_far.between = '\\n' -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '\\n### Trả lời:' }}{%- endif -%}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int = 4096) -> Tokenizer:
    """Learn the merges from `texts`; all 256 bytes are in the vocabulary, so no text is <unk>.

    Texts are split after `### Trả lời:`. The 7B5-Instruct template has no space there: without the
    split the colon could merge with the answer, and a prompt's tokens would depend on the answer.
    Raises Refusal where there is too little text for `vocab_size`.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = (piece for text in texts for piece in re.split(r"(?<=### Trả lời:)", text))
    tokenizer.train_from_iterator(pieces, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise Refusal(
            f"--vocab-size {vocab_size}: the text gives only {tokenizer.get_vocab_size()} tokens; "
            "give more articles or a smaller vocabulary (260 at least)"
        )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path, max_length: int = 1024) -> None:
    """Write tokenizer.json, and tokenizer_config.json with the fields of VinAI's."""
    config = {
        "add_prefix_space": False,
        "bos_token": "<s>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "model_max_length": max_length,
        "pad_token": "<pad>",
        "padding_side": "right",
        "tokenizer_class": "BloomTokenizer",
        "unk_token": "<unk>",
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    text = json.dumps(config, ensure_ascii=False, indent=2)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
