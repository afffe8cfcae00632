"""Token positions, padded with the EoT itself (SD 1.x) and with another token (SD 2.x: "!", id 0)."""

import pytest
import torch
from torch import Tensor

from trce_lightning.tokens import Role, Text, eot_index, position_mask, roles_of, trim_length

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


def test_roles_and_named_positions(input_ids: Tensor) -> None:
    keyword_mask, roles = input_ids == 6, roles_of(input_ids, EOT)
    assert roles.dtype == torch.int8
    s, w, e, p = Role
    assert roles.tolist() == [[s, w, w, e, p, p], [s, e, p, p, p, p]]
    assert positions(position_mask(roles, ["sot"])) == [[0], [0]]
    assert positions(position_mask(roles, ["eot"])) == [[3], [1]]
    assert positions(position_mask(roles, ["padding"])) == [[4, 5], [2, 3, 4, 5]]
    assert positions(position_mask(roles, ["keyword"], keyword_mask)) == [[2], []]
    both = position_mask(roles, ["padding", "sot"])
    assert both.dtype == torch.bool
    assert positions(both) == [[0, 4, 5], [0, 2, 3, 4, 5]]


def test_prompt_that_fills_the_length() -> None:
    """The "!" inside the prompt is no padding, though SD 2.x pads with its id."""
    input_ids = torch.tensor(FULL)
    assert eot_index(input_ids, EOT).tolist() == [5]
    assert trim_length(input_ids, EOT) == 6
    assert not position_mask(roles_of(input_ids, EOT), ["padding"]).any()
    assert positions(position_mask(roles_of(input_ids, EOT), ["eot"])) == [[5]]


def test_prompt_without_eot_refused(input_ids: Tensor) -> None:
    without = input_ids.clone()
    without[1, 1:] = BANG
    for function in (eot_index, trim_length, roles_of):
        with pytest.raises(ValueError, match=r"eos_token_id 99, rows \[1\] do not"):
            function(without, EOT)
    # The id that some text encoders' configs hold in its place.
    with pytest.raises(ValueError, match=r"eos_token_id 2, rows \[0, 1\] do not"):
        eot_index(input_ids, 2)


def test_wrong_names_and_masks_refused(input_ids: Tensor) -> None:
    roles = roles_of(input_ids, EOT)
    for which in ([], ["eos"], "eot"):
        with pytest.raises(ValueError, match="which must be a list of one or more of"):
            position_mask(roles, which)
    for keyword_mask in (None, torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 6)):
        with pytest.raises(ValueError, match="needs keyword_mask"):
            position_mask(roles, ["keyword"], keyword_mask)


def text_of(*values: int) -> Text:
    """Prompts of a sequence segment of 3 positions and a pooled one, each filled with its value."""
    clip = torch.stack([torch.full((3, 4), float(value)) for value in values])
    roles = torch.tensor([[Role.SOT, Role.EOT, Role.PADDING]] * len(values), dtype=torch.int8)
    pooled = torch.tensor([[[float(-value)]] for value in values])
    ends = torch.full((len(values), 1), Role.EOT, dtype=torch.int8)
    return Text({"clip": clip, "pooled": pooled}, {"clip": roles, "pooled": ends})


def values_of(text: Text) -> list[int]:
    assert {name: states.shape[:2] for name, states in text.states.items()} == {
        name: roles.shape for name, roles in text.roles.items()
    }
    assert torch.equal(text.states["clip"][:, 0, :1], -text.states["pooled"][:, 0])
    return [int(value) for value in text.states["clip"][:, 0, 0]]


def test_text_moves_all_segments_together() -> None:
    text = Text.cat([text_of(1, 2), text_of(3), text_of(4, 5).rows([1, 0])])
    assert (len(text), values_of(text)) == (5, [1, 2, 3, 5, 4])
    assert values_of(text.rows(slice(1, 3))) == [2, 3]
    assert values_of(text.rows(torch.tensor([4, 0, 0]))) == [4, 1, 1]
    assert values_of(text.rows(torch.tensor([True, False, False, False, True]))) == [1, 4]
    assert len(text.rows([])) == 0
    assert values_of(text_of(7).expand(3)) == [7, 7, 7]
    assert values_of(text.to("cpu")) == values_of(text)
    assert text.to("meta").states["pooled"].is_meta and text.to("meta").roles["clip"].is_meta
    with pytest.raises(RuntimeError):
        text.expand(2)
    with pytest.raises(AssertionError):
        Text(text.states, {**text.roles, "pooled": text.roles["clip"]})
