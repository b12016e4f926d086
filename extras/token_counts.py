"""
Lengths without tokens: a text is cut into words, and the tokens of a word are counted once. Words
that the tokenizer does not know are found on the way.
"""

import json
import re
import unicodedata
from types import SimpleNamespace

# GPT-2's way to cut, which ours is too, cuts before every blank that follows a word: each of these
# pieces can be encoded alone. Blanks are Unicode's: Python's \s has four control characters more.
WORD, BLANK = r"[\S\x1c-\x1f]", r"[^\S\x1c-\x1f]"
WORDS = re.compile(f"{BLANK}*{WORD}+|{BLANK}+")


def cuts_like_gpt2(parts):
    """Whether a tokenizer.json cuts texts so, and does nothing else before or after."""
    cut = json.dumps(parts["pre_tokenizer"])
    kinds = set(re.findall(r'"type": "(\w+)"', cut))
    plain = kinds <= {"Sequence", "Digits", "ByteLevel"} and '"add_prefix_space": true' not in cut
    plain = plain and '"use_regex": true' in cut and parts["normalizer"] is None
    if any(not token["special"] for token in parts["added_tokens"]):
        return False  # such a word is found first, wherever it stands
    return plain and parts["model"]["type"] == "BPE" and not parts["model"].get("dropout")


def id_of_unknown(tokenizer, model):
    """-> the id of the word that stands for all unknown ones, or None"""
    if model.get("unk_token") is not None:
        return tokenizer.token_to_id(model["unk_token"])
    return model.get("unk_id")


def unknown_part(text, encoding, unknown):
    """-> what of the text became the unknown word or no token at all, or an empty text"""
    seen = set()
    for token, (begin, end) in zip(encoding.ids, encoding.offsets):
        if token == unknown:
            return text[begin:end]
        seen.update(range(begin, end))
    for i, sign in enumerate(text):
        if i not in seen and unicodedata.category(sign)[0] in "LNPS":  # no blank, no accent
            return sign
    return ""


class TokenCounts(dict):
    """word -> its number of tokens. It stands in for the tokenizer in data.encode, and raises
    ValueError for words that the tokenizer does not know."""

    def __init__(self, tokenizer):
        parts = json.loads(tokenizer.to_str())
        self.tokenizer, self.token_to_id = tokenizer, tokenizer.token_to_id
        self.by_words = cuts_like_gpt2(parts)
        self.unknown = id_of_unknown(tokenizer, parts["model"])

    def __missing__(self, word):
        self.tokenizer.encode_special_tokens = True  # not part of what a process is sent
        encoding = self.tokenizer.encode(word, add_special_tokens=False)
        unknown = unknown_part(word, encoding, self.unknown)
        if unknown:
            why = "is no word of the tokenizer, the model would learn to leave it out"
            raise ValueError(f"unknown words: {unknown[:40]!r} {why}")
        count = len(encoding.ids)
        if len(word) < 40:  # most words come again, and are looked up
            self[word] = count
        return count

    def encode(self, text, add_special_tokens=True):
        if add_special_tokens:  # what stands before every text
            return self.tokenizer.encode(text)
        words = WORDS.findall(text) if self.by_words else [text]
        return SimpleNamespace(ids=[0] * sum(map(self.__getitem__, words)))
