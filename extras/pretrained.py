"""
Real weights: a SigLIP and a decoder, as they lie on the hub, become a folder for
`train.py --init`. The decoder is a GPT-2, a Llama (as SmolLM2 is) or a Qwen2 (as Qwen2.5 is).

$ python extras/pretrained.py --vision siglip-base-patch16-224 --decoder gpt2 --out start
$ python train.py --init start --freeze vision decoder --lr 1e-3 --data train.json --images photos

--vision wants config.json and model.safetensors, of a whole SigLIP or of its vision part alone.
--decoder wants tokenizer.json beside them. Both are folders on this machine: nothing is fetched.
Weights may lie in several files with a model.safetensors.index.json, and in 16 bits.

Our blocks compute what theirs do, up to SigLIP's last norm. A config.json that says otherwise is
refused. The projector between the two is new.
"""

import argparse
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from extras import layouts, their_configs, their_tokens, vocabulary
from llava_mini import Config, LlavaMini

PREFIXES = ["vision_model.", "transformer.", "model."]  # of parts in whole models
WORD_TABLES = {"wte.weight", "embed_tokens.weight", "lm_head.weight"}  # a row for each word


def read_tensors(folder):
    """-> {name without a prefix: tensor}, from one file or several. Raises OSError, ValueError."""
    files = {"model.safetensors"}
    index = Path(folder, "model.safetensors.index.json")
    if index.exists() and not Path(folder, *files).exists():
        files = set(their_configs.read(index).get("weight_map", {}).values())

    tensors = {}
    for file in sorted(files):
        try:
            tensors |= load_file(Path(folder, file))
        except SafetensorError as error:
            raise ValueError(f"{folder}/{file}: is the download complete? {error}") from error
    for prefix in PREFIXES:
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def fill(part, names, tensors, folder, rows=None):
    """Copy their tensors into a part of the model, tables of words into the first rows of ours.
    Raises ValueError naming the tensor."""
    for name, ours in layouts.in_their_layout(part, names):
        if name in WORD_TABLES:
            ours = ours[:rows]
        if name not in tensors:
            raise ValueError(f"{folder}: tensor {name} is missing")
        found, needed = tuple(tensors[name].shape), tuple(ours.shape)
        if found != needed:
            raise ValueError(f"{folder}: tensor {name} is {found}, but we need {needed}")
        ours.copy_(tensors[name])


def check_tied(decoder, tensors, folder):
    """A tied head may lie in the file as well, but then it is the table of words."""
    head, ours = tensors.get("lm_head.weight"), decoder.wte.weight
    if head is None or hasattr(decoder, "lm_head"):
        return
    if not torch.equal(head.float(), ours[: len(head)]):
        why = "lm_head.weight is another table"
        raise ValueError(f"{folder}/config.json: tie_word_embeddings is True, but {why}")


def start_new_words(decoder, names, new, known):
    """A new word begins as an average one: random rows could drown all others in the logits, and
    what a row beyond the vocabulary holds has never been trained."""
    for name, table in layouts.in_their_layout(decoder, names):
        if name in WORD_TABLES:
            table[new] = table[known].mean(dim=0)


def build(vision_folder, decoder_folder, block_size=None):
    """-> (model, tokenizer). Raises OSError or ValueError."""
    siglip = their_configs.read(Path(vision_folder, "config.json"))
    theirs = their_configs.read(Path(decoder_folder, "config.json"))
    fields = their_configs.decoder_fields(decoder_folder, theirs)
    rows = fields.pop("vocab_size")
    if block_size is not None:
        longest, fields["block_size"] = fields["block_size"], block_size
        if not 0 < block_size <= longest:
            raise ValueError(f"--block-size {block_size}: {decoder_folder} has 1 to {longest}")

    tokenizer, known = their_tokens.load(decoder_folder, theirs)
    words = tokenizer.get_vocab()
    config = Config(
        vocab_size=max(rows, max(words.values()) + 1),  # Qwen2's table has rows to spare
        image_token_id=words[data.IMAGE_TOKEN],
        vocab_checksum=vocabulary.checksum(tokenizer),
        **their_configs.vision_fields(vision_folder, siglip),
        **fields,
    )
    model, names = LlavaMini(config), layouts.decoder_names(config)
    fill(model.vision, layouts.SIGLIP_NAMES, read_tensors(vision_folder), vision_folder)
    tensors = read_tensors(decoder_folder)
    fill(model.decoder, names, tensors, decoder_folder, rows)
    check_tied(model.decoder, tensors, decoder_folder)

    added = [words[token] for token in data.SPECIAL_TOKENS if words[token] not in known]
    new = added + list(range(rows, config.vocab_size))
    start_new_words(model.decoder, names, new, [i for i in known if i < rows])
    return model, tokenizer


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--vision", required=True, help="folder of a SigLIP")
    add("--decoder", required=True, help="folder of a GPT-2, Llama or Qwen2")
    add("--out", type=Path, required=True, help="folder to write")
    add("--block-size", type=int, help="longest sequence, if the decoder's own is too long")
    add("--seed", type=int, default=0, help="of the new projector")
    args = parser.parse_args()
    if args.out.exists() and any(args.out.iterdir()):
        raise ValueError(f"{args.out} is not empty: choose another --out")

    torch.manual_seed(args.seed)
    model, tokenizer = build(args.vision, args.decoder, args.block_size)
    model.save(args.out)
    tokenizer.save(str(args.out / "tokenizer.json"))

    config = model.config
    print(f"{args.out}: an image takes {config.image_tokens} of {config.block_size} tokens")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, AssertionError, OSError) as error:
        sys.exit(f"pretrained.py: {error}")
