"""
Ask a trained model. The answer streams.

$ python llava_mini.py out "Describe the image." --image docs/scene.png     # which comes here
"""

import argparse
import sys

import data
from llava_mini import LlavaMini


def answer(model, tokenizer, record, max_new_tokens=None):
    """Yield the answer to a record that ends with a question, piece by piece.

    Without a limit it ends where the model's block is full, and says so on stderr.
    """
    device = model.decoder.wte.weight.device
    batch = data.collate([data.make_sample(record, tokenizer, model.config)])
    ids, pixels = batch["input_ids"].to(device), batch["pixel_values"].to(device)
    room = max(1, model.config.block_size - ids.shape[1])
    new = min(max_new_tokens or room, room)

    end, said, text = tokenizer.token_to_id(data.IM_END), [], ""
    for token in model.stream(ids, pixels, new, eos_token_id=end):
        said.append(token.item())
        whole = tokenizer.decode(said)
        if whole.endswith("\ufffd"):  # half a character waits for the rest
            yield ""
        else:
            yield whole[len(text) :]
            text = whole
    if whole != text:  # it never came
        yield whole[len(text) :]
    if said[-1] != end and max_new_tokens is None:
        print(f"(cut: the block of {model.config.block_size} tokens is full)", file=sys.stderr)


def main():
    parser = argparse.ArgumentParser(description="Ask a trained model.")
    parser.add_argument("folder", help="a model, such as the folder that train.py writes")
    parser.add_argument("prompt")
    parser.add_argument("--image", nargs="+", default=[], help="pictures, in order")
    args = parser.parse_args()

    if hasattr(sys.stdout, "reconfigure"):  # for a console that can't spell an answer
        sys.stdout.reconfigure(errors="backslashreplace")
    question = f"{data.IMAGE_TOKEN}\n" * len(args.image) + args.prompt
    record = {"image": args.image, "conversations": [{"from": "human", "value": question}]}
    try:
        model = LlavaMini.load(args.folder)
        tokenizer = data.load_tokenizer(f"{args.folder}/tokenizer.json", model.config)
        for text in answer(model, tokenizer, record):
            print(text, end="", flush=True)
        print()
    except KeyboardInterrupt:
        sys.exit("llava_mini.py: stopped")
    except (ValueError, OSError) as error:
        sys.exit(f"llava_mini.py: {error}")
