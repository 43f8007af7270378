"""Train a byte-level BPE tokenizer that splits text into words exactly as PhoGPT's tokenizer does.

The special tokens have the fixed ids 0 to 3. Merges never cross the border of a word. For example,
`###` is a word, and `lời:` is a word too, because a colon does not separate words. The text between
two words, such as a full stop or a newline, counts as a word of its own. No token is added before
or after a text, so the caller must append `</s>`.
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
# A word with the space before it. A word has no white space, no punctuation, no ( ) and no |.
# VinAI's file has an equivalent pattern with a nested set: ` ?[^(\s|[.,!?…。，、।۔،])]+`.
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
    """Learn the merges from `texts`. The vocabulary has all 256 bytes, so no text becomes <unk>.

    Texts are split after `### Trả lời:`, because the 7B5-Instruct template has no space there.
    Without the split, the colon could merge with the answer. The tokens of a prompt would then
    depend on its answer. Raises Refusal if the texts are too short for `vocab_size`.
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
    """Write tokenizer.json and tokenizer_config.json. The latter has the fields of VinAI's file."""
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
