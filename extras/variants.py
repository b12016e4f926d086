"""
What bench.py compares: ways to treat a batch without images in some rows, with the same weights.

    ours          LlavaMini
    discard       encodes every slot and drops the features of the empty ones, as XTuner does
                  (xtuner/model/internvl.py) and as LLaVA does with an empty slice (llava_arch.py)
    floor         the bare parts: ViT and projector on the images, GPT on embeddings, nothing else
    transformers  its LlavaForConditionalGeneration, given pixels of the real images only
"""

import tempfile

import torch

import data
from extras import to_transformers
from llava_mini import Config, LlavaMini

SHARES = [0, 25, 50, 75, 100]  # text-only rows of a batch, in %
ROWS, TOKENS, SUPERVISED = 16, 128, 40
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Discard(LlavaMini):
    def embed(self, input_ids, pixel_values):
        places = (input_ids == self.config.image_token_id).nonzero(as_tuple=True)
        real = self.real_slots(pixel_values).flatten().nonzero()[:, 0]
        words = self.decoder.wte(input_ids)
        patches = self.encode_images(pixel_values.flatten(0, 1))  # all slots
        words[places] = patches[real].flatten(0, 1).to(words.dtype)  # of none, an empty slice
        return words


class Floor(LlavaMini):
    """Told where the images are: `real` slots and `places` of their tokens, as indices."""

    def embed(self, input_ids, pixel_values):
        words = self.decoder.wte(input_ids)
        if len(self.real) == 0:
            return words
        patches = self.encode_images(pixel_values.flatten(0, 1)[self.real])
        rows = words.flatten(0, 1).index_copy(0, self.places, patches.flatten(0, 1).to(words.dtype))
        return rows.view_as(words)


def make_config(large):
    vision = {"image_size": 112, "patch_size": 16, "width": 384, "depth": 6, "heads": 6}
    if large:
        vision = {"image_size": 224, "patch_size": 32, "width": 768, "depth": 12, "heads": 12}
    vocab = 50304 if large else 8192
    same = {f"vision_{name}": vision[name] for name in ("width", "depth", "heads")}
    return Config(vocab, image_token_id=vocab - 1, block_size=256, **vision, **same)


def make_batch(config, share, rows=ROWS):
    """The last rows are text: their slot is zero, and they hold no image token."""
    n_images = rows - rows * share // 100
    input_ids = torch.randint(config.image_token_id, (rows, TOKENS))
    input_ids[:n_images, 1 : 1 + config.image_tokens] = config.image_token_id
    labels = torch.full_like(input_ids, data.IGNORE_INDEX)
    labels[:, -SUPERVISED:] = input_ids[:, -SUPERVISED:]
    size = config.image_size
    pixel_values = torch.zeros(rows, 1, 3, size, size)
    pixel_values[:n_images] = torch.randn(n_images, 1, 3, size, size)
    batch = {"input_ids": input_ids, "pixel_values": pixel_values, "labels": labels}
    return {name: tensor.to(DEVICE) for name, tensor in batch.items()}


def make_variants(config):
    """-> {name: model}"""
    models = {"ours": LlavaMini(config), "discard": Discard(config), "floor": Floor(config)}
    for model in models.values():
        model.load_state_dict(models["ours"].state_dict())
    models["transformers"] = in_transformers(models["ours"])
    return {name: model.to(DEVICE) for name, model in models.items()}


def in_transformers(model):
    """-> the same weights in transformers"""
    from transformers import LlavaForConditionalGeneration

    with tempfile.TemporaryDirectory() as folder:
        to_transformers.export(model, data.train_tokenizer([]), folder)
        return LlavaForConditionalGeneration.from_pretrained(folder).eval()


def loss_of(name, model, batch):
    """The mean loss of a batch, so that all variants compute the same number."""
    if name == "transformers":
        real = batch["pixel_values"].flatten(1).any(dim=1)
        pixels = batch["pixel_values"][real, 0] if real.any() else None
        return model(input_ids=batch["input_ids"], pixel_values=pixels, labels=batch["labels"]).loss
    _, loss_sum = model(**batch)
    return loss_sum / (len(batch["input_ids"]) * SUPERVISED)
