"""FSDP2: extras/fsdp2.py on two gloo ranks has the gradients of one process, and None where due."""

import pytest
import torch
from tables import printed

pytestmark = pytest.mark.skipif(
    torch.__version__ < (2, 13), reason="FSDP2's switch for unused weights came with torch 2.13"
)


@pytest.fixture(scope="module")
def columns():
    """-> {heading: {images of a step: what came of it}}, the printed table."""
    (_, *headings), *rows = printed("extras/fsdp2.py")
    return {heading: {row[0]: row[i + 1] for row in rows} for i, heading in enumerate(headings)}


@pytest.mark.parametrize("heading", ["recipe", "frozen embeddings"])
def test_two_ranks_have_the_gradients_of_one_process_and_none_without_an_image(columns, heading):
    assert columns[heading].keys() == {"10 11", "10 00", "00 01", "01 00 + 00 00", "00 00"}
    for images, cell in columns[heading].items():
        assert float(cell.split()[0]) < 1e-6, images
        assert cell.endswith("None") == (images == "00 00")  # the encoder's, where no rank has one


def test_an_encoder_wrapped_apart_gathers_on_one_rank_alone(columns):
    """The first step with an image on one rank only: the ranks issue calls that do not match."""
    assert columns["encoder wrapped apart"]["10 00"].count("ALLGATHER_BASE") == 2
    assert columns["encoder wrapped apart"]["00 01"] == "-"
