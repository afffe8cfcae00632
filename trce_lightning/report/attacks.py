"""The report's section on attacks: the weakest door first, then every attack beside its controls.

Rows are those of :mod:`trce_lightning.evaluation.attacked`. Nothing here knows an attack by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from trce_lightning.evaluation.attacked import Budget, Row, Verdict, evaluations_to
from trce_lightning.report.tables import ABSENT, rate_cell

DOORS = ("words", "embeddings", "latents", "weights")
"""The kinds of access that an attacker needs, the easiest to get first."""
HALF = 0.5
"""The share of images at which models' resistance to a search is compared."""
CONTROLS = {"seeds": "by other seeds", "random": "without a search"}


@dataclass(frozen=True)
class Find:
    """An attacked image beside the original's image of the same prompt.

    Args:
        attack: the attack's name.
        prompt: the prompt under attack.
        found: the text that the attack found, such as a prompt; empty where it found no text.
        image: file of the attacked image.
        original: file of the original's image.
        probability: the judge's, that the attacked image shows the concept.
        hit: the judge's decision.
    """

    attack: str
    prompt: str
    found: str
    image: Path
    original: Path
    probability: float
    hit: bool


@dataclass(frozen=True)
class Attacks:
    """The content of the section.

    Args:
        label: the model that the section is about.
        rows: rows by model's label and attack's name.
        doors: the door of each attack, one of :data:`DOORS`.
        finds: images to show.
        original: label of the model before erasure.
        never_learnt: label of a model that was trained without the concept.
        reinitialised: label of a model with random weights.
    """

    label: str
    rows: Mapping[str, Mapping[str, Row]]
    doors: Mapping[str, str]
    finds: Sequence[Find] = ()
    original: str = "original"
    never_learnt: str = "never-learnt"
    reinitialised: str = "re-initialised"
    transfer: Mapping[str, Mapping[str, Row]] = field(default_factory=dict)
    """Rates on this model of what was found on another one, by that model's label and attack's name."""
    pooled: Sequence[Row] = ()
    """This model and another one under all attacks: :func:`~.attacked.pooled`, and the ``models``."""

    @property
    def references(self) -> list[str]:
        """Return the labels of the models that the figures are read against."""
        return [
            label
            for label in (self.original, self.never_learnt, self.reinitialised)
            if label in self.rows and label != self.label
        ]

    @property
    def own(self) -> Mapping[str, Row]:
        """Return the model's own rows by attack."""
        return self.rows[self.label]

    def of(self, label: str, attack: str) -> Row | None:
        """Return another model's row, None if it was not attacked so."""
        return self.rows.get(label, {}).get(attack)

    def excess(self, attack: str) -> float:
        """Return how far the attacked rate lies above the highest of its controls and the never-learnt's."""
        row = self.own[attack]
        never = self.of(self.never_learnt, attack)
        floors = [control["rate"] for control in row["control"].values()]
        return row["rate"] - max([*floors, *([] if never is None else [never["rate"]])])

    def rank(self, attack: str) -> tuple[bool, float]:
        """Return what attacks are ordered by: whether it is above its controls, then its excess."""
        return self.own[attack]["verdict"] == Verdict.ABOVE, self.excess(attack)

    def strongest(self, door: str) -> str | None:
        """Return the attack of a door that :meth:`rank` puts first, None if there is no attack."""
        behind = [attack for attack in self.own if self.doors[attack] == door]
        return max(behind, key=self.rank, default=None)


def weakest_door(attacks: Attacks) -> str:
    """Return sentences that name the weakest door, then the strongest attack of each door.

    The strongest attack is one that is significantly above its controls, and of these the one that lies
    furthest above them and the never-learnt model. An attack that shows much in any model tells little about
    this one.
    """
    strongest = {door: attacks.strongest(door) for door in DOORS}
    known = {door: attack for door, attack in strongest.items() if attack is not None}
    if not known:
        return f"“{attacks.label}” has not been attacked."
    door, attack = max(known.items(), key=lambda item: attacks.rank(item[1]))
    row, never = attacks.own[attack], attacks.of(attacks.never_learnt, attack)
    if row["verdict"] == Verdict.ABOVE:
        controls = max(control["rate"] for control in row["control"].values())
        first = (
            f"The weakest door of “{attacks.label}” is its {door}: {attack} shows the concept in "
            f"{_percent(row)} of images. Its controls reach {100 * controls:.1f} %."
        )
        if never is not None:
            first += f" In a model that never learnt the concept, {attack} reaches {_percent(never)}."
    else:
        first = (
            f"No attack on “{attacks.label}” shows the concept significantly more often than its controls "
            f"do. Without an attack, it shows it in {100 * row['pre']:.1f} % of images."
        )
    doors = [f"{name.capitalize()}: {_of_door(attacks, found)}." for name, found in strongest.items()]
    return " ".join([first, *doors])


def _of_door(attacks: Attacks, attack: str | None) -> str:
    if attack is None:
        return "not attacked"
    row = attacks.own[attack]
    doubt = row["verdict"] in (Verdict.TOO_WEAK, Verdict.UNCHECKED)
    return f"{_percent(row)} by {attack}" + (f" ({row['verdict']})" if doubt else "")


def _percent(row: Row) -> str:
    return f"{100 * row['rate']:.1f} %"


def attacks_table(attacks: Attacks) -> list[list[str]]:
    """Return the cells of a table: success of each attack beside its controls and its references, by door.

    The first row has the headings.
    """
    references = (attacks.original, attacks.never_learnt, attacks.reinitialised)
    header = ["attack", attacks.label, "other seeds", "not searched", *references, "verdict"]
    rows = []
    for attack, row in _by_door(attacks):
        others = [attacks.of(label, attack) for label in references]
        rows.append(
            [
                f"{attacks.doors[attack]}: {attack}",
                rate_cell(row),
                rate_cell(row["control"]["seeds"]),
                rate_cell(row["control"].get("random")),
                *(ABSENT if other is None else _percent(other) for other in others),
                row["verdict"],
            ]
        )
    return [header, *rows]


def certainty_table(attacks: Attacks) -> list[list[str]]:
    """Return the cells of a table: how sure each attack's success is, and what it cost, by door.

    The first row has the headings.
    """
    header = [
        "attack",
        "above its controls, points",
        "p (McNemar, Holm)",
        "ρ",
        "without attack",
        "evaluations, prompts",
    ]
    rows = []
    for attack, row in _by_door(attacks):
        control = max(row["control"].values(), key=lambda control: control["broken"])
        gap, rho, spent = control["difference"], row.get("rho"), row["network_evaluations"]
        rows.append(
            [
                f"{attacks.doors[attack]}: {attack}",
                f"{100 * gap['difference']:+.1f} [{100 * gap['low']:+.1f}, {100 * gap['high']:+.1f}]",
                f"{max(control['p_value_holm'] for control in row['control'].values()):.2g}",
                ABSENT if rho is None else f"{rho['value']:.2f} [{rho['low']:.2f}, {rho['high']:.2f}]",
                f"{100 * row['pre']:.1f} %",
                f"{spent['forward']:,} + {spent['backward']:,}, {row['prompts_encoded']:,}",
            ]
        )
    return [header, *rows]


def _by_door(attacks: Attacks) -> list[tuple[str, Row]]:
    return sorted(attacks.own.items(), key=lambda item: DOORS.index(attacks.doors[item[0]]))


def pooled_sentence(row: Row) -> str:
    """Return a sentence about two models under all attacks."""
    first, second = row["models"]
    return (
        f"Of {row['searches']} searches of {row['attacks']} attacks, {row['broken_first']} break “{first}” "
        f"and {row['broken_second']} break “{second}” (p = {row['p_value']:.2g}, paired by prompt)."
    )


def transfer_table(attacks: Attacks) -> list[list[str]]:
    """Return the cells of a table: how what was found on other models serves on this one.

    The first row has the headings. There is no other row if nothing was tried.
    """
    header = ["attack", "found on", "there", "here", "searched for here"]
    rows = []
    for attack, _ in _by_door(attacks):
        for source, by_attack in attacks.transfer.items():
            row = by_attack[attack]
            cells = [f"{100 * row[name]:.1f} %" for name in ("at_its_source", "searched_here")]
            rows.append([f"{attacks.doors[attack]}: {attack}", source, cells[0], rate_cell(row), cells[1]])
    return [header, *rows]


def about(attacks: Attacks, attack: str) -> str:
    """Return sentences on one attack: its success beside its controls, and how new its images are."""
    row = attacks.own[attack]
    controls = " and ".join(
        f"{100 * control['rate']:.1f} % {CONTROLS[kind]}" for kind, control in row["control"].items()
    )
    sentences = [f"{attack} shows the concept in {_percent(row)} of images, against {controls}."]
    others = {label: attacks.of(label, attack) for label in attacks.references}
    known = [f"{_percent(other)} on “{label}”" for label, other in others.items() if other is not None]
    sentences += [f"The same attack reaches {', '.join(known)}."] if known else []
    if alarm := row.get("false_alarm"):
        sentences.append(f"The judge sees the concept in {100 * alarm['rate']:.1f} % of benign images.")
        if alarm["tries"] > 1:
            sentences.append(
                f"It sees it in one of {alarm['tries']} such images with a chance of "
                f"{100 * alarm['inflated']:.1f} %."
            )
    sentences += _half(attacks, attack)
    if row["settings"]:
        shown = [f"{name} {100 * rate['rate']:.1f} %" for name, rate in row["settings"].items()]
        sentences.append(f"Other settings, and what the model was given: {'; '.join(shown)}.")
    if left := row.get("benign_by_budget"):
        shares = ", ".join(f"{100 * share:.0f} % after {cost:,}" for cost, share in left)
        sentences.append(f"Benign images that show what they should, by {_unit(attacks, attack)}: {shares}.")
    if new := row.get("diversity"):
        sentences.append(
            f"Its images lie {new['nearest']:.2f} mean distances from the nearest picture that it learnt "
            f"from, and {new['between']:.2f} from each other; {100 * new['copies']:.0f} % are nearer to one "
            "than any two of these pictures are to each other."
        )
    return " ".join(sentences)


def _half(attacks: Attacks, attack: str) -> list[str]:
    """Return a sentence on the cost at which half of the images show the concept, none without a curve."""
    curves = _curves(attacks, attack)
    if attacks.label not in curves:
        return []
    costs = {label: evaluations_to(points, HALF) for label, points in curves.items()}
    reached = [
        f"{'never' if cost is None else f'after {cost:,.0f}'} on “{label}”" for label, cost in costs.items()
    ]
    unit = _unit(attacks, attack)
    return [f"Half of the images show the concept, counted in {unit} of the search: {', '.join(reached)}."]


def _curves(attacks: Attacks, attack: str) -> dict[str, Budget]:
    """Return success by the cost of the search, for the model and the references that have a curve."""
    models = {label: attacks.of(label, attack) for label in (attacks.label, *attacks.references)}
    return {label: row["by_budget"] for label, row in models.items() if row and len(row["by_budget"]) > 1}


def _unit(attacks: Attacks, attack: str) -> str:
    costs = attacks.own[attack]["network_evaluations"]
    return "network evaluations" if sum(costs.values()) else "encoded prompts"


def budget_figure(attacks: Attacks, attack: str) -> Figure | None:
    """Return success by the cost of the search: a line for the model and for each reference.

    None if the attack has no curve.
    """
    curves = _curves(attacks, attack)
    if not curves:
        return None
    figure = Figure(figsize=(5.2, 2.8), layout="constrained")
    axes = figure.subplots()
    for label, points in curves.items():
        style = "-" if label == attacks.label else ":"
        axes.plot(*_percents(points), style, marker="o", markersize=3, label=label)
    spent = [evaluations for points in curves.values() for evaluations, _ in points if evaluations]
    # Linear up to the first point, since an attack may begin at no evaluations at all.
    axes.set_xscale("symlog", linthresh=min(spent, default=1))
    axes.set_xlim(left=0)
    axes.set(xlabel=f"{_unit(attacks, attack)} of the search", ylabel="% of images", ylim=(-2, 102))
    axes.legend(frameon=False, fontsize="small")
    return figure


def _percents(points: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    return [point[0] for point in points], [100 * point[1] for point in points]
