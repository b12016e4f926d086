"""ZeRO: extras/zero.py gives two ranks the weights of one process, and DeepSpeed alone does not."""

from importlib.util import find_spec

import pytest
from tables import printed

pytestmark = pytest.mark.skipif(not find_spec("deepspeed"), reason="deepspeed is not installed")
STEPS = ["10 11", "00 00", "10 00", "00 00", "00 01", "01 00 + 00 00", "00 00 + 00 10"]
WITH_IMAGE = [step for step in STEPS if "1" in step]


@pytest.fixture(scope="module")
def tables():
    """-> {stage: {mode: what came of each step}}"""
    tables = {}
    for first, *cells in printed("extras/zero.py"):
        if first.startswith("ZeRO-"):
            stage, modes = first[: len("ZeRO-1")], cells
            tables[stage] = {mode: [] for mode in modes}
        else:
            for mode, cell in zip(modes, cells):
                tables[stage][mode].append(cell)
    return tables


stages = pytest.mark.parametrize("stage", ["ZeRO-1", "ZeRO-2", "ZeRO-3"])


@stages
def test_with_the_recipe_two_ranks_have_the_weights_of_one_process(tables, stage):
    cells = tables[stage]["recipe"]
    assert len(cells) == len(STEPS)
    for step, cell in zip(STEPS, cells):
        assert float(cell.split()[0]) < 1e-5, step  # of tiny gradients AdamW enlarges the rounding


@stages
def test_with_the_recipe_the_encoder_moves_where_a_rank_has_an_image_and_only_there(tables, stage):
    cells = tables[stage]["recipe"]
    assert [step for step, cell in zip(STEPS, cells) if cell.endswith("moved")] == WITH_IMAGE


@stages
@pytest.mark.parametrize("mode", ["naive", "flag only"])
def test_without_passing_over_a_step_of_text_alone_moves_the_encoder(tables, stage, mode):
    difference, *moved = tables[stage][mode][STEPS.index("00 00")].split()
    assert float(difference) > 1e-3
    assert moved == ["moved"]


@stages
def test_without_the_flag_the_calls_of_the_ranks_do_not_match(tables, stage):
    cells = tables[stage]["naive"]
    assert " but " in cells[STEPS.index("10 00")]
    assert set(cells[STEPS.index("10 00") + 1 :]) == {"-"}
