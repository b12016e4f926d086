"""Who turns None into zeros: the table that extras/none_or_zero.py prints on two ranks."""

import pytest
from tables import printed

PASS_NONE_OVER = """SGD Adam AdamW NAdam RAdam Adagrad RMSprop Adadelta Adamax ASGD Rprop Adafactor
Muon transformers.optimization.Adafactor lion_pytorch.Lion bitsandbytes.optim.AdamW8bit""".split()
KEEP_NONE = [
    "DDP find_unused_parameters",
    "- gradient_as_bucket_view",
    "- ZeroRedundancyOptimizer",
    "- encoder and projector apart",
    "FSDP2, extras/fsdp2.py",
]
MOVE_ALL_THE_SAME = [
    "LBFGS",
    "deepspeed.runtime.zero.muon.original_muon.SingleDeviceMuon",
    "FSDP1, encoder in the root's unit",
    "- use_orig_params",
    "FSDP2, unused weights always summed",
    *(f"DeepSpeed ZeRO-{stage}" for stage in range(4)),
]


@pytest.fixture(scope="module")
def moves():
    """-> {what keeps the gradients: [move with None, move with zeros] or the words of errors}"""
    return {name: cells for name, *cells in printed("extras/none_or_zero.py")}


def cells_of(moves, name):
    cells = moves[name]
    if cells[0].startswith("No module named"):
        pytest.skip(cells[0])
    return [float(cell) for cell in cells]


@pytest.mark.parametrize("name", PASS_NONE_OVER + KEEP_NONE)
def test_a_gradient_of_none_moves_nothing_and_one_of_zeros_does(moves, name):
    none, zeros = cells_of(moves, name)
    assert none == 0
    assert zeros > 0 or name == "Rprop"  # it steps by the sign of the gradient alone


@pytest.mark.parametrize("name", MOVE_ALL_THE_SAME)
def test_here_a_skipped_encoder_moves_all_the_same(moves, name):
    none, _ = cells_of(moves, name)
    assert none > 0


@pytest.mark.parametrize("stage", [2, 3])
def test_without_momentum_and_decay_zero_3_alone_moves_it_by_an_old_gradient(moves, stage):
    none, _ = cells_of(moves, f"- ZeRO-{stage}, no memory")
    assert (none > 0) == (stage == 3)


@pytest.mark.parametrize("name", ["DDP", "DDP static_graph"])
def test_ddp_that_does_not_look_for_unused_weights_stops(moves, name):
    assert moves[name][0].startswith("Expected to have finished reduction")
