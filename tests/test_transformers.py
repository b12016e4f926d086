"""transformers, trusted by everybody, judges ours: every layer, whole answers, and the folders in both directions."""

import logging
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import IMAGE_SIZE, PATCH_SIZE, P, batch, load_file, picture, random_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import data
import llava_mini
from llava_mini import LlavaMini, load_decoder, load_vision

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", reason="the outside judge is optional")
from transformers import LlavaForConditionalGeneration  # noqa: E402

EXACT = {"rtol": 1e-9, "atol": 1e-9}  # float64
SINGLE = {"rtol": 1e-4, "atol": 1e-5}  # transformers takes the loss in float32


def make_random(module, seed=0):
    """Every parameter away from its initial value: zeros and ones hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return module.eval()


def clip_config(depth=3):
    return transformers.CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=96,
        num_hidden_layers=depth,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )


def gpt2_config(vocab_size=300, **fields):
    return transformers.GPT2Config(vocab_size=vocab_size, n_positions=128, n_embd=32, n_layer=2, n_head=4, **fields)


def their_llava(tokenizer, **fields):
    text = gpt2_config(tokenizer.get_vocab_size(), tie_word_embeddings=False)
    image_token_id = tokenizer.token_to_id(data.IMAGE_TOKEN)
    config = transformers.LlavaConfig(
        vision_config=clip_config(), text_config=text, image_token_id=image_token_id, image_seq_length=P, **fields
    )
    return make_random(LlavaForConditionalGeneration(config))


def real_images(pixel_values):
    """All that transformers wants to see of the slots: the images alone, or None."""
    slots = pixel_values.flatten(0, 1)
    slots = slots[slots.flatten(1).any(1)]
    return slots if len(slots) else None


def logits_of(theirs, made):
    with torch.no_grad():
        return theirs(input_ids=made["input_ids"], pixel_values=real_images(made["pixel_values"])).logits


def assert_same_logits(ours, theirs, tokenizer):
    made = batch(tokenizer, 0, 1, 2, dtype=torch.float64)
    with torch.no_grad():
        logits = ours.double()(made["input_ids"], made["pixel_values"])[0]
    torch.testing.assert_close(logits, logits_of(theirs.double(), made), **EXACT)


def fresh_model(tokenizer, **kwargs):
    return random_model(tokenizer.get_vocab_size(), tokenizer.token_to_id(data.IMAGE_TOKEN), **kwargs)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """What save_pretrained wrote of our random model."""
    folder = tmp_path_factory.mktemp("saved")
    fresh_model(tokenizer).save_pretrained(folder, tokenizer)
    return folder


@pytest.fixture
def ours(tokenizer):
    return fresh_model(tokenizer, dtype=torch.float64)


@pytest.fixture
def theirs(folder):
    return LlavaForConditionalGeneration.from_pretrained(folder).double()


PROMPTS = pytest.mark.parametrize("images", [(0,), (1,), (2,), (0, 1, 2)], ids=["text", "one", "two", "mixed"])


# --- layer by layer --------------------------------------------------------------------------------------------------
def pictures(n):
    return torch.stack([data.to_tensor(picture(i), IMAGE_SIZE) for i in range(n)]).double()


def assert_same_features(vit, clip):
    images = pictures(3)
    with torch.no_grad():
        features = clip.double()(images, output_hidden_states=True).hidden_states[-2][:, 1:]
        torch.testing.assert_close(vit.double()(images), features, **EXACT)


def assert_same_words(gpt, gpt2):
    ids = torch.randint(gpt2.config.vocab_size, (2, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(gpt.double()(gpt.wte(ids))[0], gpt2.double()(ids).logits, **EXACT)


def test_the_vision_encoder_is_clips_up_to_its_last_block(tmp_path):
    clip = make_random(transformers.CLIPVisionModel(clip_config()))
    clip.save_pretrained(tmp_path)
    assert_same_features(load_vision(tmp_path)[1], clip)


def test_the_decoder_is_gpt2_to_the_last_position(tmp_path):
    gpt2 = make_random(transformers.GPT2LMHeadModel(gpt2_config()))
    gpt2.save_pretrained(tmp_path)
    assert_same_words(load_decoder(tmp_path, 300)[1], gpt2)


@PROMPTS
def test_the_whole_model_gives_llavas_logits(ours, theirs, tokenizer, images):
    made = batch(tokenizer, *images, dtype=torch.float64)
    logits, loss = ours(made["input_ids"], made["pixel_values"])
    torch.testing.assert_close(logits, logits_of(theirs, made), **EXACT)
    assert loss is None


@PROMPTS
def test_the_whole_model_gives_llavas_loss_and_logits_where_there_are_labels(ours, theirs, tokenizer, images):
    made = batch(tokenizer, *images, dtype=torch.float64)
    logits, loss = ours(**made)
    theirs = theirs(**made | {"pixel_values": real_images(made["pixel_values"])})
    torch.testing.assert_close(loss.float(), theirs.loss.float(), **SINGLE)
    supervised = made["labels"][:, 1:] != data.IGNORE_INDEX
    torch.testing.assert_close(logits, theirs.logits[:, :-1][supervised], **EXACT)


def test_in_single_precision_the_logits_agree_to_a_ten_thousandth(theirs, tokenizer):
    made = batch(tokenizer, 0, 1, 2)
    logits = fresh_model(tokenizer)(made["input_ids"], made["pixel_values"])[0]
    assert (logits - logits_of(theirs.float(), made)).abs().max() <= 1e-4


@pytest.mark.parametrize("images", [(0, 0), (0, 1, 2)], ids=["text", "mixed"])
def test_the_gradients_are_llavas(tokenizer, tmp_path, images):
    ours = fresh_model(tokenizer, tied_head=False)
    ours.save_pretrained(tmp_path, tokenizer)
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path).double()
    ours, made = ours.double(), batch(tokenizer, *images, dtype=torch.float64)
    ours(**made)[1].backward()
    theirs(**made | {"pixel_values": real_images(made["pixel_values"])}).loss.backward()
    with torch.no_grad():  # their gradients take the place of their weights, and the way of weights into our layout
        for p in theirs.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
    theirs.float().save_pretrained(tmp_path / "gradients")
    expected = LlavaMini.from_pretrained(tmp_path / "gradients")
    for name, p in ours.named_parameters():
        wanted = expected.get_parameter(name)
        if p.grad is None:
            assert images == (0, 0) and not name.startswith("decoder.")
            assert not wanted.any()
        else:
            torch.testing.assert_close(p.grad.float(), wanted.data, **SINGLE, msg=lambda m, name=name: f"{name}: {m}")


def test_a_tied_head_adds_up_what_llava_learns_apart(ours, theirs, tokenizer):
    made = batch(tokenizer, 0, 1, dtype=torch.float64)
    ours(**made)[1].backward()
    theirs(**made | {"pixel_values": real_images(made["pixel_values"])}).loss.backward()
    apart = theirs.get_input_embeddings().weight.grad + theirs.get_output_embeddings().weight.grad
    torch.testing.assert_close(ours.decoder.wte.weight.grad, apart, **SINGLE)


# --- answers ---------------------------------------------------------------------------------------------------------
def conversation(question, images):
    """The same prompt twice: our record, and messages for transformers."""
    record = {"conversations": [{"from": "human", "value": f"{data.IMAGE_TOKEN}\n" * len(images) + question}]}
    parts = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": question}]
    return record | {"image": images}, [{"role": "user", "content": parts}]


def prompt_of(record, tokenizer, dtype=torch.float32):
    made = data.collate([data.make_sample(record, tokenizer, IMAGE_SIZE, PATCH_SIZE)])
    return made["input_ids"], made["pixel_values"].to(dtype)


def our_answer(model, record, tokenizer, length=12):
    ids, pixel_values = prompt_of(record, tokenizer)
    out = model.generate(ids, pixel_values, length, eos_token_id=tokenizer.token_to_id(data.IM_END))
    return tokenizer.decode(out[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("images", [0, 1, 2])
def test_greedy_answers_are_llavas(ours, theirs, tokenizer, images):
    record, _ = conversation("How many shapes are there?", [picture(i) for i in range(images)])
    ids, pixel_values = prompt_of(record, tokenizer, torch.float64)
    seen = {"pixel_values": real_images(pixel_values)} if images else {}
    seen |= {"attention_mask": torch.ones_like(ids)}  # else it hides what equals the padding token
    out = theirs.generate(input_ids=ids, **seen, max_new_tokens=24, do_sample=False, eos_token_id=None)
    assert torch.equal(ours.generate(ids, pixel_values, 24), out)
    assert out.shape[1] == ids.shape[1] + 24


@pytest.fixture(scope="module")
def brief(tokenizer, tmp_path_factory):
    """(model, folder, record, messages): a random model that ends its answer before the twelfth token."""
    model, end = fresh_model(tokenizer, tied_head=False), tokenizer.token_to_id(data.IM_END)
    record, messages = conversation("Describe the image.", [picture(0)])
    ids, pixel_values = prompt_of(record, tokenizer)
    answer = model.generate(ids, pixel_values, 11)[0, ids.shape[1] :].tolist()
    last = end if end in answer else max(answer, key=answer.index)
    assert answer.index(last) >= 2
    rows = model.decoder.lm_head.weight.data
    rows[[last, end]] = rows[[end, last]]
    folder = tmp_path_factory.mktemp("brief")
    model.save_pretrained(folder, tokenizer)
    return model, folder, record, messages


def test_transformers_stops_where_our_model_ends_its_turn(brief, tokenizer):
    model, folder, record, _ = brief
    ids, pixel_values = prompt_of(record, tokenizer)
    theirs, end = LlavaForConditionalGeneration.from_pretrained(folder), tokenizer.token_to_id(data.IM_END)
    out = theirs.generate(input_ids=ids, pixel_values=real_images(pixel_values), max_new_tokens=12, do_sample=False)
    assert out[0, -1] == end and out.shape[1] < ids.shape[1] + 12
    assert torch.equal(model.generate(ids, pixel_values, 12, eos_token_id=end), out)
    assert theirs.generation_config.eos_token_id == theirs.generation_config.pad_token_id == end
    assert theirs.config.text_config.eos_token_id == theirs.config.text_config.bos_token_id == end


@pytest.fixture(scope="module")
def pipe(folder):
    return transformers.pipeline("image-text-to-text", model=str(folder))


def ask_pipeline(pipe, messages, length=12):
    return pipe(text=messages, max_new_tokens=length, do_sample=False, return_full_text=False)[0]["generated_text"]


@pytest.mark.parametrize("images", [0, 1, 2])
def test_the_pipeline_answers_as_our_generate(pipe, tokenizer, images):
    record, messages = conversation("What is this?", [picture(i) for i in range(images)])
    assert ask_pipeline(pipe, messages) == our_answer(fresh_model(tokenizer), record, tokenizer)


def test_the_command_line_answers_as_the_pipeline(brief, tokenizer, tmp_path):
    model, folder, record, messages = brief
    record["image"][0].save(tmp_path / "picture.png")
    command = [sys.executable, llava_mini.__file__, folder, "Describe the image.", "--image", tmp_path / "picture.png"]
    done = subprocess.run(
        [str(word) for word in [*command, "--device", "cpu", "--max-new-tokens", 12]],
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        env=os.environ | {"PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"},
    )
    answer = ask_pipeline(transformers.pipeline("image-text-to-text", model=str(folder)), messages)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", answer.rstrip("\ufffd") + "\n")
    assert answer == our_answer(model, record, tokenizer) != ""


# --- the processor ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def processor(folder):
    return transformers.AutoProcessor.from_pretrained(folder)


CONVERSATIONS = {
    "text": ["human: What is 3 plus 14?"],
    "one image": ["human: <image>\nWhat is this?"],
    "two images": ["human: <image>\n<image>\nWhich picture holds the cross?"],
    "an image in the middle": ["human: Before<image>\nand after"],
    "an image at the end": ["human: Where is the circle?<image>\n"],
    "several turns": ["human: Where is the cross?", "gpt: top left", "human: What colour is it?", "gpt: red"],
    "images in several turns": ["human: <image>\nWhat?", "gpt: a red cross", "human: <image>\nAnd this?"],
    "a system turn": ["system: Be brief.", "human: Reverse: moon kite", "gpt: kite moon"],
    "other letters and spaces": ["human:  Grüße,  日本\n\n\tx = 1 ", "gpt: 10 é!", "human: "],
}


def as_record(turns):
    turns = [{"from": turn.split(": ", 1)[0], "value": turn.split(": ", 1)[1]} for turn in turns]
    markers = sum(turn["value"].count(data.IMAGE_TOKEN) for turn in turns)
    return {"conversations": turns, **({"image": [picture(i) for i in range(markers)]} if markers else {})}


def as_messages(record, parts):
    """LLaVA's record as transformers' messages, with text and images in parts, or with the markers in one string."""
    images, messages = iter(record.get("image", [])), []
    for turn in record["conversations"]:
        content = turn["value"]
        if parts:
            content = []
            for i, text in enumerate(turn["value"].split(f"{data.IMAGE_TOKEN}\n")):
                content += [{"type": "image", "image": next(images)}] if i else []
                content += [{"type": "text", "text": text}] if text else []
        role = {"human": "user", "gpt": "assistant", "system": "system"}[turn["from"]]
        messages.append({"role": role, "content": content})
    return messages


@pytest.mark.parametrize("parts", [True, False], ids=["parts", "one string"])
@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_the_processor_prepares_a_conversation_as_we_do(processor, tokenizer, turns, parts):
    record = as_record(turns)
    sample = data.make_sample(record, tokenizer, IMAGE_SIZE, PATCH_SIZE)
    messages, ask = as_messages(record, parts), turns[-1].startswith("human")
    text = processor.apply_chat_template(messages, add_generation_prompt=ask)
    made = processor(text=text, images=record.get("image"), return_tensors="pt")
    assert made["input_ids"].tolist() == [sample["input_ids"].tolist()]
    if "image" in record:  # to one 8-bit level
        level = 1 / 255 / data.STD
        assert made["pixel_values"].shape == sample["images"].shape
        assert ((made["pixel_values"] - sample["images"]).abs() <= level).all()
    else:
        assert "pixel_values" not in made


def prepared(processor, messages):
    return processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )


def test_the_chat_template_fetches_the_images_itself(processor, tokenizer):
    record = as_record(CONVERSATIONS["images in several turns"])
    sample = data.make_sample(record, tokenizer, IMAGE_SIZE, PATCH_SIZE)
    made = prepared(processor, as_messages(record, parts=True))
    assert made["input_ids"].tolist() == [sample["input_ids"].tolist()]
    assert len(made["pixel_values"]) == 2


def test_the_processor_is_llavas_with_clips_images_and_our_special_tokens(processor, tokenizer):
    assert type(processor).__name__ == "LlavaProcessor"
    assert type(processor.image_processor).__name__.startswith("CLIPImageProcessor")
    assert processor.tokenizer.image_token == processor.image_token == data.IMAGE_TOKEN
    assert processor.tokenizer.eos_token == processor.tokenizer.pad_token == data.IM_END
    assert processor.tokenizer.model_max_length == 128
    ids = tokenizer.encode("a red circle at the top left").ids + [tokenizer.token_to_id(data.IM_END)]
    assert processor.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)


def test_a_foreign_tokenizer_and_other_sizes_go_with_the_folder(tmp_path):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    foreign = Tokenizer(models.BPE())
    foreign.pre_tokenizer = byte_level
    trainer = trainers.BpeTrainer(initial_alphabet=byte_level.alphabet(), show_progress=False)
    foreign.train_from_iterator(["a few words to begin with"], trainer)
    foreign.save(str(tmp_path / "foreign.json"))
    tokenizer = data.load_tokenizer(tmp_path / "foreign.json")
    for name, text in data.processor_files(tokenizer, image_size=24, patch_size=4, block_size=77).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    record, messages = conversation("What?", [picture(0, size=24)])
    sample = data.make_sample(record, tokenizer, 24, 4)
    made = prepared(processor, messages)
    assert made["input_ids"].tolist() == [sample["input_ids"].tolist()]
    assert made["pixel_values"].shape == (1, 3, 24, 24)
    assert processor.tokenizer.model_max_length == 77


# --- folders in both directions --------------------------------------------------------------------------------------
@pytest.fixture
def warnings_of_transformers(caplog):
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("tied_head", [True, False])
def test_our_folder_opens_without_a_key_too_many_or_too_few(tokenizer, tmp_path, tied_head, warnings_of_transformers):
    ours = fresh_model(tokenizer, tied_head=tied_head)
    ours.save_pretrained(tmp_path, tokenizer)
    theirs, info = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert "newly initialized" not in warnings_of_transformers.text
    assert_same_logits(ours, theirs, tokenizer)


def test_the_loading_info_would_show_a_missing_key(folder, tmp_path, warnings_of_transformers):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["multi_modal_projector.linear_1.bias"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    _, info = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert any(info.values())
    assert re.search("newly initialized|MISSING", warnings_of_transformers.text)


@pytest.mark.parametrize("layer", [-1, -2])
def test_a_llava_of_clip_and_gpt2_that_transformers_wrote_is_read(tokenizer, tmp_path, layer):
    theirs = their_llava(tokenizer, vision_feature_layer=layer)
    theirs.save_pretrained(tmp_path)
    ours = LlavaMini.from_pretrained(tmp_path)
    assert ours.config.vision.depth == len(ours.vision.blocks) == 3 + layer + 1
    assert ours.config.image_token_id == tokenizer.token_to_id(data.IMAGE_TOKEN)
    assert ours.config.text.tied_head is False
    assert_same_logits(ours, theirs, tokenizer)


def test_a_head_that_equals_the_embeddings_is_tied(tokenizer, tmp_path):
    theirs = their_llava(tokenizer, vision_feature_layer=-1)
    with torch.no_grad():
        theirs.get_output_embeddings().weight.copy_(theirs.get_input_embeddings().weight)
    theirs.save_pretrained(tmp_path)
    ours = LlavaMini.from_pretrained(tmp_path)
    assert ours.config.text.tied_head is True
    assert_same_logits(ours, theirs, tokenizer)


def test_a_llava_goes_through_our_hands_and_back_unchanged(tokenizer, tmp_path):
    theirs = their_llava(tokenizer, vision_feature_layer=-2)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = LlavaMini.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours", tokenizer)
    back = LlavaForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert back.config.vision_config.num_hidden_layers == 2
    made = batch(tokenizer, 0, 1, 2)
    assert torch.equal(logits_of(back, made), logits_of(theirs, made))


def test_a_folder_that_transformers_saves_again_reads_back_bit_for_bit(theirs, tokenizer, tmp_path):
    theirs.float().save_pretrained(tmp_path)
    again, ours = LlavaMini.from_pretrained(tmp_path), fresh_model(tokenizer)
    assert again.config == ours.config
    for name, p in ours.named_parameters():
        assert torch.equal(again.get_parameter(name), p), name


# --- pretrained parts ------------------------------------------------------------------------------------------------
def test_the_vision_tower_comes_out_of_a_whole_clip_model(tmp_path):
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(vision_config=clip_config().to_dict(), text_config=text | {"vocab_size": 50})
    clip = make_random(transformers.CLIPModel(config))
    clip.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for tower in ("vision_model", "text_model"):  # older versions wrote these buffers
        tensors[f"{tower}.embeddings.position_ids"] = torch.arange(P + 1)[None]
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same_features(load_vision(tmp_path)[1], clip.vision_model)


def test_a_gpt2_without_its_head_gives_the_same_logits(tmp_path):
    gpt2 = make_random(transformers.GPT2LMHeadModel(gpt2_config()))
    gpt2.transformer.save_pretrained(tmp_path)
    assert_same_words(load_decoder(tmp_path, 300)[1], gpt2)


def test_a_gpt2_in_shards_gives_the_same_logits(tmp_path):
    gpt2 = make_random(transformers.GPT2LMHeadModel(gpt2_config()))
    gpt2.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_words(load_decoder(tmp_path, 300)[1], gpt2)


def test_a_gpt2_in_half_precision_gives_the_logits_of_its_weights(tmp_path):
    gpt2 = make_random(transformers.GPT2LMHeadModel(gpt2_config())).half()
    gpt2.save_pretrained(tmp_path)
    assert_same_words(load_decoder(tmp_path, 300)[1], gpt2)


def test_new_words_leave_the_old_ones_logits_alone(tmp_path):
    gpt2 = make_random(transformers.GPT2LMHeadModel(gpt2_config()))
    gpt2.save_pretrained(tmp_path)
    _, gpt = load_decoder(tmp_path, 303)
    ids = torch.arange(128)[None]
    with torch.no_grad():
        logits, theirs = gpt.double()(gpt.wte(ids))[0], gpt2.double()(ids).logits
    torch.testing.assert_close(logits[..., :300], theirs, **EXACT)
    torch.testing.assert_close(logits[..., 300:], theirs.mean(-1, keepdim=True).expand(-1, -1, 3), **SINGLE)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation_function": "gelu"}, "activation_function is 'gelu'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"n_inner": 64}, "h.0.mlp.c_fc.weight is of shape (32, 64), not (32, 128)"),
    ],
)
def test_a_gpt2_that_computes_something_else_is_refused(tmp_path, fields, message):
    transformers.GPT2LMHeadModel(gpt2_config(**fields)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_decoder(tmp_path, 300)
