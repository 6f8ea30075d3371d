"""A user's own input for tests: film reviews, and a small RoBERTa with byte-level BPE that has read them."""

import random
from pathlib import Path

import pandas as pd
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import RobertaConfig, RobertaForMaskedLM, RobertaTokenizerFast

_SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
_FEELINGS = {
    "positive": (["good", "great", "wonderful"], ["loved", "enjoyed", "praised"], ["smiled", "cheered", "stayed"]),
    "negative": (["bad", "awful", "terrible"], ["hated", "disliked", "mocked"], ["yawned", "complained", "left"]),
}
_WHO = ["critic", "audience", "student", "teacher", "director", "neighbour", "editor", "viewer"]
_WHAT = ["film", "play", "series", "novel", "concert", "comedy", "drama", "opera"]
_PART = ["plot", "music", "acting", "ending", "script", "scenery", "sound", "title"]
_PLACES = ["Paris", "London", "Rome", "Vienna", "Madrid", "Oslo"]


def write_reviews(path: Path, size: int = 3000) -> None:
    """A CSV with a column `review`; a fifth of the rows say nothing good or bad."""
    draw = random.Random(0)
    rows = []
    for number in range(size):
        who, what, part, place = (draw.choice(words) for words in (_WHO, _WHAT, _PART, _PLACES))
        adjectives, verbs, acts = _FEELINGS[draw.choice(sorted(_FEELINGS))]
        if number % 5 == 0:
            rows.append(f"The {who} saw the {what} in {place} and wrote about the {part} on day {number % 97}.")
        else:
            rows.append(
                f"The {who} from {place} {draw.choice(verbs)} the {what} and {draw.choice(acts)},"
                f" because the {part} was {draw.choice(adjectives)} on day {number % 97}."
            )
    pd.DataFrame({"review": rows}).to_csv(path, index=False)


def _adjectives() -> list[str]:
    return [word for adjectives, *_ in _FEELINGS.values() for word in adjectives]


def write_model(folder: Path, reviews: Path, steps: int = 250) -> None:
    """Train the model for a few seconds on all reviews and save it as any user would."""
    texts = list(pd.read_csv(reviews)["review"])
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=500, special_tokens=_SPECIALS, show_progress=False)
    folder.mkdir(parents=True)
    bpe.save_model(str(folder))
    tokenizer = RobertaTokenizerFast.from_pretrained(folder, model_max_length=48)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = RobertaConfig(
            vocab_size=len(tokenizer),
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=96,
            max_position_embeddings=50,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.1,  # a model this small learns nothing in seconds from the usual 0.02
        )
        model = RobertaForMaskedLM(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
        adjectives = torch.tensor([tokenizer.convert_tokens_to_ids(f"Ġ{word}") for word in _adjectives()])
        random_words = torch.Generator().manual_seed(0)
        for _ in range(steps):
            rows = torch.randint(len(texts), (64,), generator=random_words).tolist()
            batch = tokenizer([texts[row] for row in rows], padding=True, return_tensors="pt")
            ids = batch["input_ids"]
            chosen = (torch.rand(ids.shape, generator=random_words) < 0.15) & (ids >= len(_SPECIALS))
            chosen |= torch.isin(ids, adjectives)
            inputs = ids.masked_fill(chosen, tokenizer.mask_token_id)
            labels = ids.masked_fill(~chosen, -100)
            loss = model(input_ids=inputs, attention_mask=batch["attention_mask"], labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
