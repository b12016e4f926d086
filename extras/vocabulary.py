"""
Whether a tokenizer is the one that a model has learned with. data.load_tokenizer asks here.
"""

import json
import zlib

import data


def checksum(tokenizer):
    """-> what Config.vocab_checksum keeps of all words and their ids"""
    words = json.dumps(sorted(tokenizer.get_vocab().items()))
    return f"{zlib.crc32(words.encode()):08x}"


def check(path, tokenizer, config=None):
    """Raises ValueError that names the file, for a tokenizer that the model can't use.

    A model may have more rows than its tokenizer has words, never fewer. One whose Config knows no
    checksum is held to the place of <image> alone.
    """
    if config is None:
        return
    words = tokenizer.get_vocab()
    image = words[data.IMAGE_TOKEN]
    if image == data.PAD_TOKEN_ID:
        raise ValueError(f"{path}: {data.IMAGE_TOKEN} has the id {image}, which pads rows here")

    last = max(words.values())
    if image != config.image_token_id or last >= config.vocab_size:
        found = f"{data.IMAGE_TOKEN} is {image} and the last word {last}"
        needed = f"{config.image_token_id} and below {config.vocab_size}"
        raise ValueError(f"{path} is not the tokenizer of its model: {found}, not {needed}")
    if config.vocab_checksum not in ("", checksum(tokenizer)):
        raise ValueError(f"{path} is not the tokenizer of its model: that learned other words")
