"""
The tokenizer of a decoder from the hub -> one that data.encode can use.

data.encode makes a sample from pieces: a header, an answer, a line end, each encoded alone. What is
asked of a tokenizer.json is

- that pieces join: their tokens, one after the other, are those of the whole text. SentencePiece's
  put a blank before every text, and so before every piece: that is taken away.
- that it adds at most one token of its own, the beginning-of-sequence token that its model knows,
  and that in front. data.encode puts it at the start of a sample, once.
"""

import json
from pathlib import Path

from tokenizers import Tokenizer, processors

import data
from extras import their_configs


def load(folder, config):
    """-> (tokenizer, the ids of the words that its model knows). The config is the decoder's own.
    Raises OSError or ValueError naming the file."""
    path = Path(folder, "tokenizer.json")
    tokenizer = data.load_tokenizer(path)  # which adds special tokens
    known = Tokenizer.from_file(str(path)).get_vocab()
    tokenizer = without_blanks(tokenizer)
    set_beginning(folder, tokenizer)
    check_beginning(path, tokenizer, config.get("bos_token_id"))
    check_joins(path, tokenizer)
    return tokenizer, sorted(known.values())


# ---- pieces that join ---------------------------------------------------------------------------


def without_blanks(tokenizer):
    """transformers with `legacy=False` puts no blank after a special token either, and every piece
    stands after one, or after a line end."""
    parts = json.loads(tokenizer.to_str())
    for kind in ("normalizer", "pre_tokenizer", "decoder"):
        parts[kind] = without_blank(parts[kind])
    return Tokenizer.from_str(json.dumps(parts))


def without_blank(part):
    """A normalizer, pre-tokenizer or decoder, as tokenizer.json has it -> the same or None"""
    if part is None or part["type"] == "Prepend":
        return None
    if part["type"] == "Strip" and part.get("start"):  # a decoder's, of the blank that was added
        return None
    for kind in ("normalizers", "pretokenizers", "decoders"):  # of a Sequence
        if kind in part:
            some = map(without_blank, part[kind])
            part[kind] = [one for one in some if one is not None]
    if "prepend_scheme" in part:
        part["prepend_scheme"] = "never"
    if "add_prefix_space" in part:
        part["add_prefix_space"] = False
    return part


def check_joins(path, tokenizer):
    def words(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    if words("assistant\n") + words("Yes") != words("assistant\nYes"):
        why = "'assistant\\n' and 'Yes' have not the tokens of 'assistant\\nYes'"
        raise ValueError(f"{path}: pieces of a text do not join: {why}")


# ---- the beginning of a sequence ----------------------------------------------------------------


def set_beginning(folder, tokenizer):
    """Give a model its token if tokenizer_config.json says `add_bos_token` and tokenizer.json does
    not do it. In transformers 4 the first made LlamaTokenizerFast add it, so models were trained
    with it; transformers 5 reads the second alone."""
    file = Path(folder, "tokenizer_config.json")
    settings = their_configs.read(file) if file.exists() else {}
    if not settings.get("add_bos_token") or tokenizer.encode("").ids:
        return
    bos = settings.get("bos_token")
    if isinstance(bos, dict):
        bos = bos.get("content")
    number = tokenizer.token_to_id(str(bos))
    if number is None:
        raise ValueError(f"{file}: bos_token is {bos!r}, no word of tokenizer.json")
    begin = processors.TemplateProcessing(f"{bos} $A", None, [(bos, number)])
    tokenizer.post_processor = begin


def check_beginning(path, tokenizer, bos):
    """`bos` is the bos_token_id of the decoder's config.json, or None."""
    begin = tokenizer.encode("").ids
    word = tokenizer.encode("Yes", add_special_tokens=False).ids
    added = [tokenizer.id_to_token(i) for i in begin]
    if len(begin) > 1 or tokenizer.encode("Yes").ids != begin + word:
        why = "we need one token at most, and in front"
        raise ValueError(f"{path} adds {added} to a text: {why}")
    if begin and begin != [begin[0] if bos is None else bos]:
        why = f"config.json has the bos_token_id {bos}"
        raise ValueError(f"{path} begins a text with {added}, {begin}: {why}")
