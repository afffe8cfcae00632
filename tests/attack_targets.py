"""The tests of attacks share these: a tiny target, and the way to run a search and generate its images."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from trce_lightning.adapters import Adapter
from trce_lightning.attacks.protocol import Attack, Finding, Target, Way
from trce_lightning.concepts import Concept
from trce_lightning.generation.loop import generate
from trce_lightning.prompts.records import PromptRecord

RECORDS = (
    PromptRecord("a/0", "a dagger"),
    PromptRecord("a/1", "a gun", guidance_scale=1.0),
    PromptRecord("a/2", "a dagger", seed=3),
)


def target_of(adapter: Adapter, original: Adapter | None = None, **changes) -> Target:
    """Return a target whose pictures have a bright subject on a dark ground, somewhere else in each."""
    pictures = torch.full((len(RECORDS), 3, adapter.side, adapter.side), 20, dtype=torch.uint8)
    for row in range(len(RECORDS)):
        pictures[row, :, 4 + row : 11 + row, 5:12] = 200
    target = Target(
        adapter=adapter,
        original=original or adapter,
        records=RECORDS,
        concepts=[Concept("violence", {"dagger": "rose"})],
        pictures=pictures,
        selector=lambda images: torch.zeros(len(images)),
        guidance_scale=3.0,
        num_steps=4,
        batch_size=2,
        autocast_dtype=None,
    )
    return replace(target, **changes)


def searched(
    attack: Attack, target: Target, records: Sequence[PromptRecord] | None = None
) -> dict[str, Finding]:
    """Return the findings by prompt id, after a check that the cost is exact and the progress complete."""
    adapters = {id(adapter): adapter for adapter in (target.adapter, target.original)}.values()
    before, seen = sum(a.network_evaluations for a in adapters), []
    generator = torch.Generator().manual_seed(1)
    findings = attack.search(target, records or target.records, generator, seen.append)
    spent = sum(a.network_evaluations for a in adapters) - before
    if records is None:
        cost = attack.cost(target)
        assert spent == cost.forward + cost.backward
        assert sum(seen) == (spent or cost.text)
        assert spent == sum(f.spent.forward + f.spent.backward for f in findings)
        assert cost.text == sum(finding.spent.text for finding in findings)
    return {finding.prompt_id: finding for finding in findings}


def control(attack: Attack, target: Target) -> dict[str, Finding]:
    """Return the findings of the control by prompt id."""
    found = attack.random(target, target.records, torch.Generator().manual_seed(2))
    return {finding.prompt_id: finding for finding in found}


def ways(attack: Attack, target: Target, findings: Mapping[str, Finding]) -> dict[str, Way]:
    """Return the ways by name, after a check that images have seeds of their own."""
    found = {way.name: way for way in attack.ways(target, findings)}
    used = {record.id for record in target.records}
    for way in found.values():
        assert not used & {record.id for record in way.records}
        assert {record.sample_of for record in way.records} == {r.prompt_id for r in target.records}
        assert all(record.seed is None for record in way.records)
    assert "" in found
    return found


def images(target: Target, way: Way) -> Tensor:
    """Return a way's images."""
    return generate(
        way.adapter,
        way.records,
        guidance_scale=target.guidance_scale,
        num_steps=way.num_steps or target.num_steps,
        batch_size=target.batch_size,
        variation=way.variation,
    )


def judged(way: Way, drawn: Tensor) -> Tensor:
    """Return what the judge sees of a way's images."""
    return drawn if way.judged is None else way.judged(way.records, drawn)


def plain(target: Target, way: Way, adapter: Adapter) -> Tensor:
    """Return the images of another model at a way's seeds, for the prompts that are attacked."""
    prompts = {record.prompt_id: record.prompt for record in target.records}
    records = [replace(record, prompt=prompts[record.prompt_id]) for record in way.records]
    return images(target, Way("", tuple(records), adapter, num_steps=way.num_steps))


def largest_difference(a: Tensor, b: Tensor) -> int:
    return int((a.int() - b.int()).abs().max())


def same_findings(a: Mapping[str, Finding], b: Mapping[str, Finding]) -> bool:
    """Return whether findings are equal but for rounding."""
    return a.keys() == b.keys() and all(
        a[id].tensors.keys() == b[id].tensors.keys()
        and all(torch.allclose(a[id].tensors[n], b[id].tensors[n], atol=1e-4) for n in a[id].tensors)
        for id in a
    )


def configured(name: str, **changes: object) -> Attack:
    """Return an attack as its file in ``configs/attacks`` makes it, with some options changed."""
    options = OmegaConf.load(Path(__file__).parents[1] / "configs" / "attacks" / f"{name}.yaml")
    return instantiate(OmegaConf.merge(options, changes))
