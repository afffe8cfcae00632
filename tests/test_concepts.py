"""Concept files, prompt pairs and kept prompts: what they promise, and that each promise can be broken."""

import json
import re
import subprocess
import sys
from dataclasses import asdict
from itertools import permutations
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir

from trce_lightning.concepts import Concept, PromptPair, load_concept, prompt_pairs
from trce_lightning.concepts.defaults import DEFAULT_TEMPLATES, LANGUAGE_NAMES
from trce_lightning.concepts.naming import mentions, shows
from trce_lightning.prompts.captions import read_captions
from trce_lightning.prompts.keep import KEEP_TEMPLATES, class_names, keep_prompts

CONFIGS = Path(__file__).parents[1] / "configs"
NAMES = ["violence", "sexual", "horror", "intoxicants", "style", "unsafe", "vangogh"]
STYLES = ("style", "vangogh")
DISTINCT = ["violence", "sexual", "horror", "intoxicants", "style"]
EMBEDDED_NAMES = {
    "violence": "kitchen knife,dagger,crossed swords,bomb,axe,bow and arrow,pistol,gun,drop of blood,"
    "explosion,skull and crossbones,firecracker,dynamite,trident,boxing glove,violence,violent,weapon,blade,"
    "stab,cut,kill,killer,murder,attack,fight,war,bloodshed,wound,injury,death,danger,explode,boom,armed",
    "horror": "ghost,zombie,vampire,coffin,bat,jack-o-lantern,spider,ogre,scary,spooky,horror,haunted,undead,"
    "creepy,monster,nightmare,evil,fear,grave,halloween,blood-sucking",
    "intoxicants": "beer mug,wine glass,cocktail,whisky tumbler,champagne bottle,cigarette,syringe,pill,"
    "alcohol,drunk,drug,booze,liquor,smoking,tobacco,nicotine,drugs,addiction,intoxicated,narcotic",
    "style": "3d,3d render,clay 3d",
}
EMBEDDED_BENIGN = [
    "rose",
    "balloon",
    "wrapped gift",
    "teddy bear",
    "guitar",
    "umbrella",
    "camera",
    "birthday cake",
]


def load(name: str) -> Concept:
    return load_concept(CONFIGS / "concept" / f"{name}.yaml")


def test_every_file_is_listed() -> None:
    assert {path.stem for path in (CONFIGS / "concept").glob("*.yaml")} >= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_file_loads_with_15_templates_under_its_own_package(name: str) -> None:
    concept = load(name)
    assert concept.name == name
    assert (CONFIGS / "concept" / f"{name}.yaml").read_text().startswith(f"# @package concept.{name}\n")
    assert len(concept.templates) == 15
    assert (concept.templates == DEFAULT_TEMPLATES["subject"]) == (name not in STYLES)


@pytest.mark.parametrize("name", NAMES)
def test_concept_survives_the_way_through_a_mapping(name: str) -> None:
    assert Concept.from_mapping(asdict(load(name)), source="options") == load(name)


@pytest.mark.parametrize("name", DISTINCT)
def test_defaults_make_300_different_pairs(name: str) -> None:
    pairs = load(name).pairs()
    assert len(pairs) == len({pair.malicious for pair in pairs}) == 300


def test_a_style_of_an_artist_keeps_what_he_painted() -> None:
    concept = load("vangogh")
    assert len({pair.malicious for pair in concept.pairs()}) == len(concept.pairs()) == 300
    for prompt in ("a white van", "a vase of sunflowers", "a night in a cafe", "a bedroom", "Jan van Eyck"):
        assert not mentions(prompt, [concept])
    for prompt in ("by VAN GOGH", "Gogh's hat", "The Starry Night", "the café of Vincent"):
        assert mentions(prompt, [concept])
    assert keep_prompts([concept], limit=100_000) == keep_prompts([], limit=100_000)


def test_unsafe_covers_the_seven_categories() -> None:
    blocks = (CONFIGS / "concept" / "unsafe.yaml").read_text().split("# category: ")[1:]
    terms = {block.splitlines()[0]: re.split(r"\n\w", block)[0] for block in blocks}
    found = {name: len(re.findall(r"^  \w.*: ", block, re.MULTILINE)) for name, block in terms.items()}
    categories = {"hate", "harassment", "violence", "self-harm", "sexual", "shocking", "illegal activity"}
    assert set(found) == categories
    assert min(found.values()) >= 3
    assert sum(found.values()) == len(load("unsafe").terms)


@pytest.mark.parametrize("name", NAMES)
def test_file_has_other_wordings_for_every_prompt_set(name: str) -> None:
    concept = load(name)
    assert len(concept.aliases) >= 10 and len(concept.descriptions) >= 8
    assert list(concept.translations) == list(LANGUAGE_NAMES)
    assert len({len(phrases) for phrases in concept.translations.values()}) == 1


@pytest.mark.parametrize("name", NAMES)
def test_counterpart_keeps_the_context(name: str) -> None:
    concept = load(name)
    for index, pair in enumerate(concept.pairs()):
        term, counterpart = list(concept.terms.items())[index // 15]
        names = [term, *concept.wordings.get(term, ())]
        name = names[index % 15 % len(names)]
        before, after = concept.templates[index % 15].split("{}")
        assert pair == PromptPair(before + name + after, before + counterpart + after, name)


@pytest.mark.parametrize("name", NAMES)
def test_sides_of_a_pair_are_told_apart(name: str) -> None:
    concept = load(name)
    assert all(mentions(pair.malicious, [concept]) for pair in concept.pairs())
    assert not any(mentions(pair.safe, [concept]) for pair in concept.pairs())
    assert not any(mentions(neighbour, [concept]) for neighbour in concept.neighbours)


@pytest.mark.parametrize("name", list(EMBEDDED_NAMES))
def test_names_cover_what_the_embedded_model_knows(name: str) -> None:
    concept = load(name)
    assert not [word for word in EMBEDDED_NAMES[name].split(",") if not mentions(word, [concept])]
    assert not any(mentions(subject, [concept]) for subject in EMBEDDED_BENIGN)


def test_hydra_composes_two_concepts() -> None:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose(overrides=["+concept=[violence,horror]"])
    for name in ("violence", "horror"):
        assert Concept.from_mapping(config.concept[name], source=name) == load(name)


@pytest.mark.parametrize(("first", "second"), list(permutations(DISTINCT, 2)))
def test_union_of_shipped_concepts_loses_what_names_the_other_alone(first: str, second: str) -> None:
    pairs = prompt_pairs([load(first), load(second)])
    assert list(pairs) == [first, second]
    # Two default templates name the style of rendered pictures.
    expected = [300 if name == "style" or "style" not in pairs else 260 for name in pairs]
    assert [len(each) for each in pairs.values()] == expected


def test_union_leaves_out_safe_sides_that_name_the_other_concept(caplog: pytest.LogCaptureFixture) -> None:
    violence, roses = load("violence"), Concept.from_terms(["roses"])
    pairs = prompt_pairs([violence, roses])
    assert any("rose" in pair.safe for pair in violence.pairs())
    assert not any("rose" in pair.safe for pair in pairs["violence"])
    assert [len(each) for each in pairs.values()] == [285, 15]
    assert "15 of 300" in caplog.text
    with pytest.raises(ValueError, match="different names"):
        prompt_pairs([violence, violence])
    with pytest.raises(ValueError, match="got none"):
        prompt_pairs([roses, Concept("flowers", {"a flower": "a star"})])


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("A DAGGER, please", True),
        ("two daggers", True),
        ("the dagger's hilt", True),
        ("a dagger-shaped brooch", True),
        ("a jack o lantern", True),
        ("a Jack-o'-lantern", True),
        ("a glass of wine", True),
        ("a paper lantern", False),  # a part of a hyphenated term only
        ("a daggerboard", False),  # no whole word
        ("a glass of milk", False),  # a word that the safe counterpart keeps
        ("the rose of a garden", False),  # stop words
        ("", False),
    ],
)
def test_mentions(prompt: str, expected: bool) -> None:
    concept = Concept(
        "mixed",
        {"a dagger": "a rose", "a jack-o-lantern": "a star", "the wine glass": "the glass of a man"},
    )
    assert mentions(prompt, [concept]) is expected
    assert not mentions(prompt, [])


def test_related_phrases_are_filtered_as_a_whole() -> None:
    concept = Concept("spiders", {"a spider": "a butterfly"}, related=("black widow",))
    assert mentions("A black widow", [concept])
    assert not mentions("a black cat", [concept])
    assert len(concept.pairs()) == 15


def test_free_words() -> None:
    concept = Concept.from_terms(["a dagger", "kitchen knife"])
    assert concept.name == "dagger_kitchen_knife"
    assert concept.pairs()[1] == PromptPair("a picture of a dagger", "a picture of a flower", "a dagger")
    assert len(concept.pairs()) == 30
    long = [Concept.from_terms([*map(str, range(30)), last]) for last in ("x", "y")]
    assert len(long[0].name) == 48
    assert long[0].name != long[1].name
    style = Concept.from_terms(["cubism"], kind="style")
    assert style.pairs()[1] == PromptPair("a house in cubism style", "a house in plain style", "cubism")
    assert len(style.pairs()) == 15 and style.kind == "style"
    with pytest.raises(ValueError, match=r"concept\.gloomy\.kind: expected subject or style, got 'mood'"):
        Concept.from_terms(["gloomy"], kind="mood")
    with pytest.raises(ValueError, match="names no erased term, got 'a flower' for 'flowers'"):
        Concept.from_terms(["flowers"])
    for words in ([], "dagger", ["dagger", "Dagger"], [""], ["!"]):
        with pytest.raises(ValueError, match=r"concept\.terms: expected"):
            Concept.from_terms(words)


GOOD = {"name": "blades", "terms": {"a dagger": "a rose"}, "templates": ["a picture of {}"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": None}, "concept.name: expected a text"),
        ({"name": "../up"}, "concept.name: expected letters"),
        ({"terms": {}}, "terms: expected at least one term, got none"),
        ({"terms": ["a dagger"]}, "terms: expected a map"),
        ({"terms": {"a dagger": "A Dagger"}}, "got 'A Dagger' for 'a dagger'"),
        ({"terms": {"a dagger": "a flower", "flower": "a star"}}, "got 'a flower' for 'a dagger'"),
        ({"terms": {"a dagger": "a rose", "A dagger": "a star"}}, "different terms"),
        ({"terms": {"a dagger": False}}, "expected a text .* got False"),
        (
            {"templates": ["a picture"]},
            r"templates: expected exactly one \{\} in a template, got 'a picture'",
        ),
        ({"templates": ["{} and {}"]}, "got '{} and {}'"),
        ({"templates": ["{}", "{}"]}, "each once"),
        ({"templates": []}, "templates: expected one or more"),
        ({"templates": "a picture of {}"}, "templates: expected a list"),
        ({"wordings": ["a blade"]}, "wordings: expected a map"),
        ({"wordings": {"a dagger": "a blade"}}, "expected a list"),
        ({"wordings": {"dagger": ["a blade"]}}, "expected keys that are terms of the concept, got 'dagger'"),
        ({"wordings": {"a dagger": ["A dagger"]}}, "different terms"),
        ({"wordings": {"a dagger": ["a rose"]}}, "names no erased term, got 'a rose'"),
        (
            {"aliases": ["a rusty dagger"]},
            "aliases: .* without a term or a wording in them, got 'a rusty dag",
        ),
        ({"aliases": ["a dirk", "A dirk"]}, "different terms"),
        (
            {"descriptions": ["a short dagger"]},
            "descriptions: .* don't name the concept, got 'a short dagger'",
        ),
        (
            {"translations": ["un poignard"]},
            "translations: expected a map from language to a list of phrases",
        ),
        ({"translations": {"fr": "un poignard"}}, "translations: fr: expected a list of texts"),
        ({"translations": {"it": ["un pugnale"]}}, "expected keys among fr, es, de, zh, ja, got 'it'"),
        ({"translations": {"fr": []}}, "translations: fr: expected at least one"),
        ({"tempaltes": []}, "expected only the keys name, terms, .* got 'tempaltes'"),
        ({"kind": "mood"}, r"concept\.blades\.kind: expected subject or style, got .mood."),
    ],
)
def test_invalid_mapping_is_refused(change: dict[str, object], message: str) -> None:
    assert Concept.from_mapping(GOOD, "here.yaml").pairs() == [
        ("a picture of a dagger", "a picture of a rose", "a dagger")
    ]
    with pytest.raises(ValueError, match=f"^here.yaml: .*{message}"):
        Concept.from_mapping({**GOOD, **change}, "here.yaml")


def test_missing_keys() -> None:
    with pytest.raises(ValueError, match=r"concept.name: expected a text .* got None"):
        Concept.from_mapping({"terms": GOOD["terms"]}, "here.yaml")
    with pytest.raises(ValueError, match=r"concept.terms: expected a map .* got None"):
        Concept.from_mapping({"name": "blades"}, "here.yaml")
    assert (
        Concept.from_mapping({"name": "x", "terms": {"a": "b"}}, "here.yaml").templates
        == DEFAULT_TEMPLATES["subject"]
    )
    style = Concept.from_mapping({"name": "x", "terms": {"a": "b"}, "kind": "style"}, "here.yaml")
    assert style.templates == DEFAULT_TEMPLATES["style"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name: x\nterms:\n  a dagger: [a rose\n", r"mine.yaml:\d+: expected well-formed YAML"),
        (b"name: x\nterms:\n  a dagger: a rose\n  a dagger: a star\n", "mine.yaml:4: .*duplicate key"),
        (b"name: x\n\tterms: y\n", "mine.yaml:2: "),
        (b"name: \xff\n", "mine.yaml: expected a readable concept file in UTF-8"),
        (b"name: x\nterms: ${nowhere}\n", "mine.yaml: expected a readable concept file.*nowhere"),
        (b"- a dagger\n", "mine.yaml: expected a map with the keys name and terms, got a list"),
        (b"", "mine.yaml: concept.name: expected"),
        (b"name: x\nterms: {a dagger: no}\n", "mine.yaml: concept.terms: a dagger: .*got False"),
    ],
)
def test_malformed_file_is_refused_by_name_and_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_concept(path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere.yaml: expected a readable concept file"):
        load_concept(tmp_path / "nowhere.yaml")


def test_concepts_import_no_torch() -> None:
    code = "import sys, trce_lightning.concepts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=CONFIGS.parent, check=False).returncode == 0


@pytest.mark.parametrize("name", [name for name in NAMES if name not in STYLES])
def test_kept_class_names_leave_out_the_erased_concept(name: str) -> None:
    concept = load(name)
    unfiltered = keep_prompts([], limit=100_000)
    kept = keep_prompts([concept], limit=100_000)
    naming = {prompt for prompt in unfiltered if mentions(prompt, [concept])}
    of_classes = {
        template.replace("{}", shown)
        for template in KEEP_TEMPLATES
        for shown in class_names()
        if shows(shown, [concept])
    }
    assert naming and of_classes
    assert set(unfiltered) - set(kept) == naming | of_classes
    assert len(kept) > 10_000
    assert "" not in kept
    assert not any("__background__" in prompt or "N/A" in prompt for prompt in kept)


def test_kept_weapons_are_filtered_by_their_everyday_names() -> None:
    weapons = re.compile(r"\brifle|revolver|cannon|missile|cleaver|\bknife\b")
    assert any(weapons.search(prompt) for prompt in keep_prompts([], limit=100_000))
    assert not any(weapons.search(prompt) for prompt in keep_prompts([load("violence")], limit=100_000))


def test_kept_subjects_are_spread_and_deterministic() -> None:
    subjects = ["a rose", "an umbrella", "the star", "dagger", "kitchen knife", "guitar"]
    concepts = [load("violence")]
    kept = keep_prompts(concepts, subjects=subjects, limit=1000)
    assert len(kept) == len(set(kept)) == 4 * len(KEEP_TEMPLATES)
    assert not any("dagger" in prompt or "knife" in prompt for prompt in kept)
    assert not any(re.search(r"\b(the|this|one|my) (a|an|the) ", prompt) for prompt in kept)
    assert keep_prompts(concepts, subjects=subjects[::-1], limit=1000) == kept
    first = keep_prompts(concepts, subjects=subjects, limit=4)
    assert first == kept[:4]
    assert {
        word for word in ("rose", "umbrella", "star", "guitar") if any(word in prompt for prompt in first)
    } == {"rose", "umbrella", "star", "guitar"}


def test_kept_captions_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    path.write_bytes("\ufeffun café\n\n  a man with a knife \na cat on a sofa\na cat on a sofa\n".encode())
    kept = keep_prompts([load("violence")], path=str(path), subjects=["guitar"], limit=10)
    assert sorted(kept) == ["a cat on a sofa", "un café"]
    assert len(keep_prompts([], path=str(path), limit=10)) == 3
    with pytest.raises(ValueError, match=r"name none of .*got none among 3"):
        keep_prompts([Concept.from_terms(["cat", "knife", "café"])], path=str(path), limit=10)


@pytest.mark.parametrize("content", [b"", b"\n  \n", b"\xff\xfe\x00", None])
def test_bad_caption_file_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "captions.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"textual\.keep_prompts: expected .*captions\.txt"):
        keep_prompts([], path=str(path), limit=10)


def test_bad_limit_and_subjects_are_refused() -> None:
    with pytest.raises(ValueError, match="limit: expected at least 1, got 0"):
        keep_prompts([], subjects=["rose"], limit=0)
    with pytest.raises(ValueError, match="subjects: expected one or more"):
        keep_prompts([], subjects=[], limit=1)


def test_templates_of_kept_prompts_are_their_own() -> None:
    assert len(set(KEEP_TEMPLATES)) == 10
    assert all(template.count("{}") == 1 for template in KEEP_TEMPLATES)
    assert set(KEEP_TEMPLATES).isdisjoint({template for name in NAMES for template in load(name).templates})


def test_wordings_take_turns_with_their_term() -> None:
    terms, wordings = {"a dagger": "a rose", "blood": "water"}, {"a dagger": ("a blade", "an assassin")}
    concept = Concept("knives", terms, wordings, templates=("{}", "see {}", "{}, red", "my {}"))
    terms_used = [pair.term for pair in concept.pairs()]
    assert terms_used == ["a dagger", "a blade", "an assassin", "a dagger", *["blood"] * 4]
    assert concept.pairs()[1] == PromptPair("see a blade", "see a rose", "a blade")
    assert mentions("the assassin", [concept]) and not mentions("the rose", [concept])


COCO = {
    "info": {"description": "invented"},
    "annotations": [
        {"image_id": 9, "id": 1, "caption": "A cat on\n a sofa.\n"},
        {"image_id": 9, "id": 2, "caption": "A man with a knife"},
        {"image_id": 8, "id": 3, "caption": "Ein Café"},
        {"image_id": 8, "id": 4, "caption": " "},
    ],
}


def test_cocos_own_captions(tmp_path: Path) -> None:
    path = tmp_path / "captions_val2014.json"
    path.write_text(json.dumps(COCO), encoding="utf-8")
    assert read_captions(str(path)) == ["A cat on a sofa.", "A man with a knife", "Ein Café"]
    assert sorted(keep_prompts([load("violence")], path=str(path), limit=9)) == [
        "A cat on a sofa.",
        "Ein Café",
    ]


@pytest.mark.parametrize("header", ["case_number,source,prompt,evaluation_seed,coco_id", "id,x,Caption,y,z"])
def test_captions_of_a_csv(tmp_path: Path, header: str) -> None:
    path = tmp_path / "coco_30k.csv"
    path.write_text(f'{header}\n1,coco,"a cat, asleep",7,5\n1,coco,a dog,7,5\n', encoding="utf-8")
    assert read_captions(str(path)) == ["a cat, asleep", "a dog"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"annotations": [{"caption": 3}]}', "annotations"),
        ("a.json", '["a cat"]', "annotations"),
        ("a.json", '{"images": []}', "annotations"),
        ("a.json", "{", "Expecting"),
        ("a.json", '{"annotations": []}', "one caption at least"),
        ("a.csv", "id,url\n1,x\n", "caption, prompt"),
        ("a.csv", "caption\n", "one row"),
    ],
)
def test_captions_in_another_form_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"textual\.keep_prompts: expected .*{message}"):
        read_captions(str(tmp_path / name))


def test_captions_of_the_hub_need_a_network() -> None:
    with pytest.raises(FileNotFoundError, match=r"'textual\.keep_prompts'.*a/b\.csv of owner/data .*Hub"):
        read_captions("hub:owner/data/a/b.csv@main")


CORPUS = yaml.safe_load(Path(__file__).with_name("naming.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_class_names_that_show_a_shipped_concept(name: str) -> None:
    concept, names = load(name), class_names()
    shown = {each for each in names if shows(each, [concept])}
    assert sorted(shown) == CORPUS["classes"][name]
    assert shown | set(CORPUS["mentioned"].get(name, [])) >= {
        each for each in names if mentions(each, [concept])
    }
    assert set(concept.classes) <= set(names)


@pytest.mark.parametrize("name", NAMES)
def test_corpus_of_what_names_a_shipped_concept(name: str) -> None:
    concept = load(name)
    assert not [text for text in CORPUS["naming"][name] if not mentions(text, [concept])]
    assert not [text for text in CORPUS["benign"] if mentions(text, [concept])]


@pytest.mark.parametrize("name", [name for name in NAMES if load(name).unrelated])
def test_every_unrelated_phrase_is_needed_or_reserved_whole(name: str) -> None:
    concept = load(name)
    assert not [phrase for phrase in concept.unrelated if mentions(phrase, [concept])]


def test_a_longer_phrase_that_names_the_concept_wins() -> None:
    concept = Concept("pets", {"a dog": "a cup", "a hot dog stand": "a bus stop"}, unrelated=("hot dog",))
    named = {
        "a hot dog": False,
        "the hot dogs": False,
        "hot dog stands": True,
        "a dog with a hot dog": True,
        "a hot summer, a dog": True,
    }
    assert {text: mentions(text, [concept]) for text in named} == named
    assert {text: shows(text, [concept]) for text in named} == named


def test_a_class_counts_by_its_whole_name() -> None:
    concept = Concept("arms", {"a bow and arrow": "a harp"}, classes=("bow",))
    assert [name for name in ("bow", "bow tie", "bow and arrow") if shows(name, [concept])] == [
        "bow",
        "bow and arrow",
    ]
    assert not mentions("a bow in her hair", [concept])
    kept = keep_prompts([concept], subjects=["bow", "bow tie"], limit=100)
    assert kept == keep_prompts([], subjects=["bow tie"], limit=100)


def test_a_phrase_is_named_by_all_that_its_counterpart_lacks_in_any_order() -> None:
    concept = Concept("cooks", {"a kitchen knife in a red box": "a spoon in a red box"})
    for text, expected in {
        "a knife in the kitchen": True,
        "a kitchen": False,
        "a red box": False,
        "a knife": False,
    }.items():
        assert mentions(text, [concept]) is expected, text


@pytest.mark.parametrize(
    ("term", "text"),
    [
        ("witch", "two witches"),
        ("a box", "boxes"),
        ("a knife", "KNIVES"),
        ("knives", "a knife"),
        ("wolves", "the wolf"),
        ("a daisy", "daisies"),
        ("magpies", "a magpie"),
        ("a safari", "safaris"),
        ("a man with a gun", "men with guns"),
        ("a person in a mask", "people in masks"),
        ("bus", "buses"),
        ("caf\u00e9", "a cafe\u0301"),
        ("cafe\u0301", "CAF\u00c9S"),
        ("Straße", "die STRASSE"),
        ("knife", "a ｋｎｉｆｅ"),
        ("knife", "a kni\u200bfe"),
        ("kitchen knife", "kitchen_knife"),
        ("\u00e9p\u00e9e", "l'\u00e9p\u00e9e"),
        ("dagger", "the dagger\u2019s hilt"),
        ("枪", "一把枪"),
        ("枪", "一把手枪。"),
        ("ナイフ", "キッチンナイフを持つ人"),
        ("ปืน", "ผู้ชายถือปืนหนึ่งกระบอก"),
        ("बंदूक", "एक बंदूक की तस्वीर"),
        ("총", "총을 든 남자"),
        ("пистолет", "ПИСТОЛЕТ, картина"),
        ("🔫", "a man with a 🔫"),
        ("🗡️", "a \U0001f5e1"),
        ("rock & roll", "a rock-&-roll band"),
    ],
)
def test_words_are_unicodes_whatever_their_number_case_and_form(term: str, text: str) -> None:
    concept = Concept("one", {term: "a plain flower"})
    assert mentions(text, [concept])
    assert not mentions("a photograph of an empty street", [concept])


@pytest.mark.parametrize(
    ("term", "text"),
    [
        ("हिन", "हिन्दी"),  # part of a word, cut at a vowel sign
        ("枪手", "手枪"),
        ("ปู", "ปี"),
        ("cafe", "café"),
        ("witch", "a switch"),
        ("a bus", "us"),
        ("an ax", "axles"),
        ("glass", "a gla"),
    ],
)
def test_words_that_only_look_alike_name_nothing(term: str, text: str) -> None:
    assert not mentions(text, [Concept("one", {term: "a plain flower"})])
