"""
Lengths without tokens: a text is cut into words, and the tokens of a word are counted once.
"""

import json
import re
from types import SimpleNamespace

# GPT-2's way to cut, which ours is too, cuts before every blank that follows a word: each of these
# pieces can be encoded alone. Blanks are Unicode's: Python's \s has four control characters more.
WORD, BLANK = r"[\S\x1c-\x1f]", r"[^\S\x1c-\x1f]"
WORDS = re.compile(f"{BLANK}*{WORD}+|{BLANK}+")


def cuts_like_gpt2(tokenizer):
    parts = json.loads(tokenizer.to_str())
    cut = json.dumps(parts["pre_tokenizer"])
    kinds = set(re.findall(r'"type": "(\w+)"', cut))
    plain = kinds <= {"Sequence", "Digits", "ByteLevel"} and '"add_prefix_space": true' not in cut
    return plain and '"use_regex": true' in cut and parts["normalizer"] is None


class TokenCounts(dict):
    """word -> its number of tokens. It stands in for the tokenizer in data.encode."""

    def __init__(self, tokenizer):
        self.tokenizer, self.token_to_id = tokenizer, tokenizer.token_to_id
        self.by_words = cuts_like_gpt2(tokenizer)

    def __missing__(self, word):
        self.tokenizer.encode_special_tokens = True  # not part of what a process is sent
        count = len(self.tokenizer.encode(word, add_special_tokens=False).ids)
        if len(word) < 40:  # most words come again, and are looked up
            self[word] = count
        return count

    def encode(self, text, add_special_tokens):
        words = WORDS.findall(text) if self.by_words else [text]
        return SimpleNamespace(ids=[0] * sum(map(self.__getitem__, words)))
