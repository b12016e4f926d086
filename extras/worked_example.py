"""
The worked example: two records, one with a picture and one without, token by token.

$ python data.py        # which, without an argument, comes here
"""

import data
from llava_mini import Config


def main():
    """Print the conversation, each token with its label, and the image slots."""
    tokenizer = data.train_tokenizer(data.ToyRecords("train", 500))
    config = Config(tokenizer.get_vocab_size(), tokenizer.token_to_id(data.IMAGE_TOKEN))
    for text_fraction in (0, 1):
        record = data.ToyRecords("test", 1, text_fraction=text_fraction)[0]
        sample = data.make_sample(record, tokenizer, config)
        print(*record["conversations"], "position  token  label", sep="\n")
        for i, (token, label) in enumerate(zip(sample["input_ids"], sample["labels"])):
            word = tokenizer.decode([token], skip_special_tokens=False)
            print(f"{i:8} {token:6} {label:6}  {word!r}" + "  <- trained on" * (label >= 0))
        slots = sample["pixel_values"]
        print(f"pixel_values {tuple(slots.shape)},", "an image\n" if slots.any() else "all zero\n")
