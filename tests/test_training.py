"""The training step, in one process and in two, the learning rate and the score."""

import copy
import itertools
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import SIZE, START, P, close, make_model
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import data
import train


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def one_batch(model, samples):
    """-> loss and gradients of the mean over all supervised tokens, the samples in one batch."""
    model.zero_grad()
    batch = train.to_device(data.collate(samples), model.decoder.wte.weight.device)
    loss = model(**batch)[1] / (batch["labels"] != data.IGNORE_INDEX).sum()
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_step_is_the_same_however_it_is_cut(exact_model, config, samples_of, device, parts):
    samples = samples_of(0, 2, 1, 0, dtype=torch.float64)
    loss, expected = one_batch(exact_model, samples)

    model = make_model(config, torch.float64).to(device)
    batches = [data.collate(samples[i::parts]) for i in range(parts)]
    found = train.training_step(model, [train.to_device(batch, device) for batch in batches])
    torch.testing.assert_close(found, loss.float())
    for name, gradient in gradients(model).items():
        close(gradient, expected[name])

    name = "decoder.wte.weight"  # the mean of the samples' means would be another step
    means = [one_batch(exact_model, [sample])[1][name] for sample in samples]
    assert (sum(means) / 4 - expected[name]).abs().max() > 0.01


def test_the_learning_rate_rises_during_warm_up_and_falls_to_zero():
    def rates(**args):
        args = SimpleNamespace(lr=4.0, **args)
        return [train.learning_rate(step, args) for step in range(args.steps + 1)]

    assert rates(warmup=4, steps=8) == [1, 2, 3, 4, 4, 3, 2, 1, 0]
    assert rates(warmup=0, steps=4) == [4, 3, 2, 1, 0]


def test_every_epoch_is_a_permutation_of_which_ranks_and_micro_batches_have_parts():
    def rows(seed=0, first_step=0, rank=0, world_size=1, parts=1):
        """Five steps of 4 samples are two epochs of 10."""
        args = SimpleNamespace(seed=seed, batch_size=4, accumulate=parts, steps=5)
        return list(train.micro_batch_indices(args, 10, first_step, rank, world_size))

    first, second = torch.tensor(rows()).view(2, 10).tolist()
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert rows() != rows(seed=1)
    assert rows(first_step=3) == rows()[3:]
    ranks = torch.tensor([rows(rank=rank, world_size=2, parts=2) for rank in (0, 1)]).view(2, 5, 2)
    steps = torch.cat([*ranks], dim=1)
    assert torch.equal(steps.sort().values, torch.tensor(rows()).sort().values)


def talk(model, images, wrong=()):
    """A sample of two turns that ask three tokens each: those of greedy generation, but for a
    mistake in the last token of the turns that `wrong` names."""
    device, image = model.decoder.wte.weight.device, model.config.image_token_id
    question = torch.tensor([[7, 8]], device=device)
    pixels = images * torch.ones(1, 1, 3, SIZE, SIZE, device=device)
    ids = torch.tensor([[9] + images * P * [image]], device=device)
    labels = torch.full_like(ids, data.IGNORE_INDEX)
    for turn in (0, 1):
        ids = model.generate(torch.cat([ids, question], dim=1), pixels, 3)
        if turn in wrong:
            ids[:, -1] = (ids[:, -1] + 1) % model.config.vocab_size
        nothing = torch.full_like(question, data.IGNORE_INDEX)
        labels = torch.cat([labels, nothing, ids[:, -3:]], dim=1)
    sample = {"input_ids": ids[0], "labels": labels[0], "pixel_values": pixels[0]}
    return train.to_device(sample, "cpu")


TALKS = [(0, ()), (1, (0,)), (0, (1,)), (1, ()), (1, (0, 1)), (0, ()), (0, (0,))]  # 3 of 7 right


def test_a_record_is_right_if_every_answer_is_that_of_greedy_generation(model):
    samples = [talk(model, *options) for options in TALKS]
    assert [train.evaluate(model, [s], 1)[0] for s in samples] == [1, 0, 0, 1, 0, 1, 0]
    score, loss = train.evaluate(model, samples, 3)
    assert score == 3 / 7
    assert loss == pytest.approx(one_batch(model, samples)[0].item())


# ---- two ranks ----------------------------------------------------------------------------------

# Which (rank, micro-batch) has an image: 00, 01, 10, 11.
PLACEMENTS = list(itertools.product((0, 1), repeat=4))


def exchange(exchanges, bucket):
    """Notes that DDP exchanges gradients."""
    exchanges.append(bucket.index())
    return allreduce_hook(None, bucket)


def run_rank(rank, folder):
    """What each of the two processes does. A hang is an error after a minute."""
    store, limit = f"file://{folder}/store", timedelta(seconds=60)
    dist.init_process_group("gloo", store, limit, world_size=2, rank=rank)
    original, cases, talks = torch.load(folder / "cases.pt", weights_only=False)
    steps = []
    for cells in cases:
        model, exchanges = copy.deepcopy(original), []
        parallel = train.data_parallel(model)
        parallel.register_comm_hook(exchanges, exchange)
        loss = train.training_step(parallel, cells[2 * rank :][:2], world_size=2)
        steps.append((loss, gradients(model), exchanges))
    score = train.evaluate(original.float(), talks, 2, rank, world_size=2)
    torch.save((steps, score), folder / f"rank-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, config, samples_of):
    """-> (steps, score) of one process, and those of either rank"""
    folder, steps, cases = tmp_path_factory.mktemp("ranks"), [], []
    model = make_model(config, torch.float64)
    for a, b, c, d in PLACEMENTS:
        samples = samples_of(0, a, 0, b, 0, c, d, 0, dtype=torch.float64)
        steps.append(one_batch(model, samples))
        cases.append([data.collate(samples[i : i + 2]) for i in (0, 2, 4, 6)])

    model.zero_grad()
    talks = [talk(make_model(config), *options) for options in TALKS]
    torch.save((model, cases, talks), folder / "cases.pt")
    torch.multiprocessing.start_processes(run_rank, (folder,), nprocs=2, start_method=START)
    score = train.evaluate(make_model(config), talks, 2)
    return (steps, score), [torch.load(folder / f"rank-{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("case", range(16), ids=["".join(map(str, p)) for p in PLACEMENTS])
def test_two_ranks_take_the_step_of_one_process_wherever_the_images_are(two_ranks, case):
    (alone, _), ranks = two_ranks
    loss, expected = alone[case]
    for steps, _ in ranks:
        found_loss, found, exchanges = steps[case]
        assert exchanges == [0]  # one, at the end of the step
        torch.testing.assert_close(found_loss, loss.float())
        for name, gradient in found.items():
            if any(PLACEMENTS[case]) or name.startswith("decoder"):
                close(gradient, expected[name])
            else:
                assert gradient is None


def test_two_ranks_find_the_scores_of_one_process(two_ranks):
    (_, alone), ranks = two_ranks
    assert [score for _, score in ranks] == 2 * [pytest.approx(alone)]
