"""
Ask a trained model. The answer streams.

$ python llava_mini.py out "Describe the image." --image docs/scene.png     # which comes here
"""

import argparse
import sys
from pathlib import Path

from tokenizers.decoders import DecodeStream

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
from llava_mini import LlavaMini


def answer(model, tokenizer, record, max_new_tokens=128):
    """Yield the answer to a record that ends with a question, piece by piece."""
    device = model.decoder.wte.weight.device
    batch = data.collate([data.make_sample(record, tokenizer, model.config)])
    ids, pixels = batch["input_ids"].to(device), batch["pixel_values"].to(device)
    new = max(1, min(max_new_tokens, model.config.block_size - ids.shape[1]))
    end, decode = tokenizer.token_to_id(data.IM_END), DecodeStream(skip_special_tokens=True)
    for token in model.stream(ids, pixels, new, eos_token_id=end):
        yield decode.step(tokenizer, token.item()) or ""  # half a character waits for the rest


def main():
    parser = argparse.ArgumentParser(description="Ask a trained model.")
    parser.add_argument("folder", help="a model, such as the folder that train.py writes")
    parser.add_argument("prompt")
    parser.add_argument("--image", nargs="+", default=[], help="pictures, in order")
    args = parser.parse_args()

    model = LlavaMini.load(args.folder)
    tokenizer = data.load_tokenizer(f"{args.folder}/tokenizer.json")
    question = f"{data.IMAGE_TOKEN}\n" * len(args.image) + args.prompt
    record = {"image": args.image, "conversations": [{"from": "human", "value": question}]}
    for text in answer(model, tokenizer, record):
        print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, AssertionError, OSError) as error:
        sys.exit(f"llava_mini.py: {error}")
