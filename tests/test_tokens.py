"""Token positions, padded with the EoT itself (SD 1.x) and with another token (SD 2.x: "!", id 0)."""

import pytest
import torch
from torch import Tensor

from trce_lightning.tokens import eot_index, position_mask, trim_length

SOT, EOT, BANG = 98, 99, 0
#                         0    1    2     3     4     5
PADDED_WITH_EOT = [[SOT, 5, 6, EOT, EOT, EOT], [SOT, EOT, EOT, EOT, EOT, EOT]]
PADDED_WITH_BANG = [[SOT, 5, 6, EOT, BANG, BANG], [SOT, EOT, BANG, BANG, BANG, BANG]]
FULL = [[SOT, 5, BANG, 7, 8, EOT]]


@pytest.fixture(params=[PADDED_WITH_EOT, PADDED_WITH_BANG], ids=["eot-padding", "bang-padding"])
def input_ids(request: pytest.FixtureRequest) -> Tensor:
    return torch.tensor(request.param)


def positions(mask: Tensor) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in mask]


def test_first_eot_whatever_the_padding(input_ids: Tensor) -> None:
    assert eot_index(input_ids, EOT).tolist() == [3, 1]
    assert eot_index(input_ids, EOT).dtype == torch.int64
    assert trim_length(input_ids, EOT) == 4
    assert trim_length(input_ids[1:], EOT) == 2
    assert torch.equal(eot_index(input_ids[:, :4], EOT), eot_index(input_ids, EOT))


def test_named_positions(input_ids: Tensor) -> None:
    keyword_mask = input_ids == 6
    assert positions(position_mask(input_ids, EOT, ["sot"])) == [[0], [0]]
    assert positions(position_mask(input_ids, EOT, ["eot"])) == [[3], [1]]
    assert positions(position_mask(input_ids, EOT, ["padding"])) == [[4, 5], [2, 3, 4, 5]]
    assert positions(position_mask(input_ids, EOT, ["keyword"], keyword_mask)) == [[2], []]
    both = position_mask(input_ids, EOT, ["padding", "sot"])
    assert both.dtype == torch.bool
    assert positions(both) == [[0, 4, 5], [0, 2, 3, 4, 5]]


def test_prompt_that_fills_the_length() -> None:
    """The "!" inside the prompt is no padding, though SD 2.x pads with its id."""
    input_ids = torch.tensor(FULL)
    assert eot_index(input_ids, EOT).tolist() == [5]
    assert trim_length(input_ids, EOT) == 6
    assert not position_mask(input_ids, EOT, ["padding"]).any()
    assert positions(position_mask(input_ids, EOT, ["eot"])) == [[5]]


def test_prompt_without_eot_refused(input_ids: Tensor) -> None:
    without = input_ids.clone()
    without[1, 1:] = BANG
    for function in (eot_index, trim_length):
        with pytest.raises(ValueError, match=r"eos_token_id 99, rows \[1\] do not"):
            function(without, EOT)
    # The id that some text encoders' configs hold in its place.
    with pytest.raises(ValueError, match=r"eos_token_id 2, rows \[0, 1\] do not"):
        eot_index(input_ids, 2)


def test_wrong_names_and_masks_refused(input_ids: Tensor) -> None:
    for which in ([], ["eos"], "eot"):
        with pytest.raises(ValueError, match="which must be a list of one or more of"):
            position_mask(input_ids, EOT, which)
    for keyword_mask in (None, torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 6)):
        with pytest.raises(ValueError, match="needs keyword_mask"):
            position_mask(input_ids, EOT, ["keyword"], keyword_mask)
