"""Fixtures that the tests share: a tiny model in which every parameter is random, a tokenizer, records and batches."""

import os

import pytest
import torch
from PIL import Image
from safetensors.torch import load

import data
from llava_mini import GPTConfig, LlavaMini, LlavaMiniConfig, ViTConfig

IMAGE_SIZE, PATCH_SIZE = 16, 8
P = (IMAGE_SIZE // PATCH_SIZE) ** 2
WORDS = [
    "What is this? a red circle and a green cross, a blue square at the top left, two, one, three, nothing",
    "Where is the orange triangle? at the bottom right. Number 5? Describe the image. What colour is it? it is yellow",
    "How many shapes are there? Which picture holds the circle? the first, the second. Reverse: apple bread "
    "chair house",
]


def spoken(*texts):
    """Records that consist of these texts."""
    return [{"conversations": [{"from": "human", "value": text}]} for text in texts]


@pytest.fixture(scope="session")
def device():
    """The one GPU if there is one; CUDA_VISIBLE_DEVICES="" keeps the tests on the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() and os.environ.get("CUDA_VISIBLE_DEVICES") != "" else "cpu")


@pytest.fixture(scope="session")
def tokenizer():
    """Trained on words of its own, so that no test depends on how the toy data puts things."""
    return data.train_tokenizer(spoken(*WORDS), vocab_size=480)


def random_model(vocab_size, image_token_id, depth=2, dtype=torch.float32, seed=0, tied_head=True):
    """A tiny model with every parameter random: at initialisation some are zero and would hide mistakes."""
    vision = ViTConfig(IMAGE_SIZE, PATCH_SIZE, width=24, depth=depth, heads=2)
    text = GPTConfig(vocab_size, block_size=128, width=32, depth=depth, heads=4, tied_head=tied_head)
    model = LlavaMini(LlavaMiniConfig(vision, text, image_token_id))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            centre = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
            p.copy_(centre + 0.3 * torch.randn(p.shape, generator=generator))
    return model.to(dtype)


@pytest.fixture
def tiny_model(tokenizer, device):
    return random_model(tokenizer.get_vocab_size(), tokenizer.token_to_id(data.IMAGE_TOKEN)).to(device)


@pytest.fixture
def exact_model(tokenizer):
    """The tiny model in float64, on the CPU, for comparisons up to rounding."""
    return random_model(tokenizer.get_vocab_size(), tokenizer.token_to_id(data.IMAGE_TOKEN), dtype=torch.float64)


def picture(seed, size=IMAGE_SIZE):
    pixels = torch.randint(0, 256, (size, size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.frombytes("RGB", (size, size), bytes(pixels.flatten().tolist()))


def record(question="What is this?", answer="a red circle", images=0, seed=0):
    """A LLaVA record with one exchange and so many random pictures."""
    turns = [
        {"from": "human", "value": f"{data.IMAGE_TOKEN}\n" * images + question},
        {"from": "gpt", "value": answer},
    ]
    pictures = {"image": [picture(100 * seed + i) for i in range(images)]} if images else {}
    return {"id": f"record-{seed}", **pictures, "conversations": turns}


def sample(tokenizer, **kwargs):
    return data.make_sample(record(**kwargs), tokenizer, IMAGE_SIZE, PATCH_SIZE)


def batch(tokenizer, *images, device="cpu", dtype=torch.float32):
    """A batch of samples with these numbers of images, of different lengths: batch(tokenizer, 0, 1, 2)."""
    answers = ("red", "a blue square at the top left", "two", "a red circle and a green cross")
    samples = [
        sample(tokenizer, answer=answers[i % 4], images=n, seed=i, question=f"Number {i}?")
        for i, n in enumerate(images)
    ]
    made = data.collate(samples)
    return {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in made.items()}


def load_file(path):
    """-> {name: tensor}. safetensors' own would map the file into memory, and tests write over files they have read."""
    return load(path.read_bytes())
