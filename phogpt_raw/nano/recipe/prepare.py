"""Train a tokenizer on articles, and write the articles and questions about them as token streams.

    python -m phogpt_raw.nano.recipe.prepare --articles articles.jsonl.gz --out DATA

Writes the token streams train.bin and heldout.bin, the tokenizer, corpus.json with the counts, and
questions.jsonl, which a person can read. In the token streams each token id is a uint16, and each
document ends with </s>.
"""

import argparse
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from phogpt_raw.model.checkpoint_format import write_json
from phogpt_raw.nano.recipe import corpus, questions
from phogpt_raw.nano.recipe.pages import choose, make_pages
from phogpt_raw.nano.recipe.tokenizer import EOS, save_tokenizer, train_tokenizer
from phogpt_raw.nano.recipe.truecase import Truecaser
from phogpt_raw.refusal import Refusal, exits_cleanly


def prepare(args: argparse.Namespace) -> dict:
    """Write the tokenizer, the token streams, corpus.json and questions.jsonl.

    Returns the counts in corpus.json.
    """
    rng = random.Random(args.seed)
    topics = [t for (t,) in corpus.read_json_lines(args.topics, "topic")] if args.topics else []
    train, heldout = [], []
    for title, text in corpus.read_json_lines(args.articles, "title", "text"):
        if text := corpus.clean(text):
            (heldout if corpus.is_held_out(title, args.heldout) else train).append((title, text))
    if not train or not heldout:
        raise Refusal(
            f"--articles {args.articles}: {len(train)} articles to train on and {len(heldout)} "
            "held out; give more articles, or a larger --heldout share"
        )
    articles = [text for _, text in train]
    found = mine(train, topics, rng)
    length = sum(map(len, articles)) * args.questions / (1 - args.questions)
    chosen = choose(found, int(length), args.repeats, rng)
    pages = make_pages(chosen, rng)

    tokenizer = train_tokenizer(articles + pages, args.vocab_size)
    out = Path(args.out)
    save_tokenizer(tokenizer, out, args.max_seq_len)
    documents = list(encode(tokenizer, articles)) + list(encode(tokenizer, pages))
    question_tokens = sum(map(len, documents[len(articles) :]))
    rng.shuffle(documents)
    stream = np.concatenate(documents)
    stream.tofile(out / "train.bin")
    heldout_stream = np.concatenate(list(encode(tokenizer, (text for _, text in heldout))))
    heldout_stream.tofile(out / "heldout.bin")
    counts = {
        "articles": len(articles),
        "heldout_articles": len(heldout),
        "question_pages": len(pages),
        "questions": len(chosen),
        "distinct_phrases": len({q.phrase.casefold() for q in chosen}),
        "topics_left_out": len(topics),
        "train_tokens": len(stream),
        "question_share_of_tokens": round(question_tokens / len(stream), 4),
        "heldout_tokens": len(heldout_stream),
        "heldout_bytes": sum(len(text.encode()) for _, text in heldout),
        "vocab_size": tokenizer.get_vocab_size(),
        "max_seq_len": args.max_seq_len,
        "seed": args.seed,
    }
    write_json(out / "corpus.json", counts)
    with open(out / "questions.jsonl", "w", encoding="utf-8") as lines:  # not read by pretrain
        for q in chosen:
            lines.write(json.dumps(vars(q), ensure_ascii=False) + "\n")
    print(json.dumps(counts, indent=2))
    return counts


def mine(
    articles: list[tuple[str, str]], topics: list[str], rng: random.Random
) -> list[questions.Question]:
    """Return the questions that the articles answer, except questions about held-out topics."""
    truecaser, left_out = Truecaser(text for _, text in articles), questions.Overlap(topics)
    found = (q for title, text in articles for q in questions.mine(title, text, truecaser, rng))
    return [q for q in found if q.phrase not in left_out]


def encode(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[np.ndarray]:
    """Yield the ids of each text, with </s> at the end, as uint16."""
    texts = list(texts)
    for start in range(0, len(texts), 256):
        for encoding in tokenizer.encode_batch_fast(texts[start : start + 256]):
            yield np.array([*encoding.ids, EOS], dtype=np.uint16)


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("--articles", required=True, help="JSON lines of {title, text}, .jsonl or .jsonl.gz")
    flag("--topics", help="JSON lines with a `topic` that no question may be about")
    flag("--out", required=True, help="folder for the tokenizer and the tokens")
    flag("--vocab-size", type=int, default=4096)
    flag("--max-seq-len", type=int, default=1024, help="tokens of the model's longest row")
    flag("--heldout", type=float, default=0.015, help="share of articles kept out")
    flag("--questions", type=float, default=0.15, help="share of questions in the training text")
    flag("--repeats", type=int, default=6, help="largest number of questions about one phrase")
    flag("--seed", type=int, default=0)
    prepare(parser.parse_args(argv))


if __name__ == "__main__":
    main()
