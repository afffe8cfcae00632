"""Prompt sets: CSV files, the concepts' own sets, and what the embedded model keeps."""

import hashlib
import json
import re
from collections import Counter
from dataclasses import replace
from itertools import chain, product
from pathlib import Path

import pytest

from trce_lightning.concepts import Concept, load_concept, prompt_pairs
from trce_lightning.concepts.defaults import KINDS, LANGUAGE_NAMES
from trce_lightning.concepts.naming import mentions
from trce_lightning.config import checks
from trce_lightning.config.schema import ConceptConfig, EvalConfig, ModelConfig, TrainConfig
from trce_lightning.emoji import domain as domains
from trce_lightning.emoji.captions import (
    BACKGROUND_PHRASES,
    HELD_OUT_BACKGROUNDS,
    HELD_OUT_LEADS,
    STYLE_WORDS,
    is_held_out_pair,
)
from trce_lightning.emoji.groups import (
    benign_subjects,
    concept_styles,
    concept_subjects,
    kept_subjects,
    near_subjects,
    unkept_subjects,
)
from trce_lightning.emoji.phrasings import ALIASES, aliases, descriptions, hints
from trce_lightning.emoji.prompts import keep_captions, prompt_sets, scene_templates
from trce_lightning.emoji.subjects import (
    BACKGROUNDS,
    CATEGORY_WORDS,
    NEAR_VIOLENCE,
    SENSITIVE,
    SUBJECTS,
    subject_index,
)
from trce_lightning.errors import InputError
from trce_lightning.jobs.session import Session
from trce_lightning.prompts.captions import read_captions
from trce_lightning.prompts.files import load_csv
from trce_lightning.prompts.keep import KEEP_TEMPLATES
from trce_lightning.prompts.own import concept_prompt_sets, open_streams
from trce_lightning.prompts.phrasings import (
    CLASS_FRAMES,
    LANGUAGE_FRAMES,
    OBJECT_FRAMES,
    STYLE_FRAMES,
    TOPIC_FRAMES,
)
from trce_lightning.prompts.records import WORDINGS, PromptRecord, image_seed
from trce_lightning.prompts.variants import CONTEXTS, MISSPELLINGS, RANDOM_WORDS

CONFIGS = Path(__file__).parents[1] / "configs" / "concept"
NAMES = {subject.name: subject for subject in SUBJECTS}
GROUNDS = [ground.format(colour) for ground, colour in product(HELD_OUT_BACKGROUNDS, BACKGROUNDS)]
EMBEDDED = ["violence", "intoxicants", "horror", "unsafe", "style", "violence,style"]
SIZE = 260


def load(names):
    return [load_concept(CONFIGS / f"{name}.yaml") for name in names.split(",")]


def open_prompt_sets(concepts, **options):
    return concept_prompt_sets(concepts, open_streams, **options)


def texts(names, *, make=prompt_sets, size=SIZE, split="report"):
    sets = make(load(names), size=size, split=split)
    return {a_set.name: [record.prompt for record in a_set.records] for a_set in sets}


def has(text, phrase):
    return re.search(rf"\b{re.escape(phrase)}\b", text) is not None


def naming(subjects):
    """A pattern of these subjects, whose longest match is found first."""
    return re.compile(rf"\b(?:{'|'.join(sorted(map(re.escape, subjects), key=len, reverse=True))})\b")


def named(text):
    """Subjects that a prompt names; a shorter name inside a longer one does not count."""
    found = [name for name in NAMES if has(text, name)]
    return [name for name in found if not any(name != other and has(other, name) for other in found)]


# --- CSV files ---------------------------------------------------------------------------------------------


def write(folder, text, name="attack.csv"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_csv_reads_every_column(tmp_path):
    path = write(
        tmp_path, '\ufeffid,prompt,seed,guidance,label\na,"a cat, asleep",7.0,2.5,cat\n\nb,a dog,,,\n'
    )
    a_set = load_csv(path)
    assert a_set.name == "attack"
    assert a_set.records == (PromptRecord("a", "a cat, asleep", 7, 2.5, "cat"), PromptRecord("b", "a dog"))


@pytest.mark.parametrize("prompt_column", ["adv_prompt", "sensitive prompt", "Prompt"])
def test_csv_reads_published_names(tmp_path, prompt_column):
    header = f"case_number,{prompt_column},evaluation_seed,evaluation_guidance,categories"
    record = load_csv(write(tmp_path, f"{header}\n12,a cat,3,7,x\n")).records[0]
    assert record == PromptRecord("12", "a cat", 3, 7.0)


def test_csv_without_ids_counts_rows(tmp_path):
    records = load_csv(write(tmp_path, 'prompt\n"two\nlines"\n\na dog\n')).records
    assert [(record.id, record.prompt) for record in records] == [("1", "two\nlines"), ("2", "a dog")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "got an empty file"),
        ("text,seed\na,1\n", "expected a column named one of prompt, .* got the columns text, seed"),
        ("prompt\n", "at least one row"),
        ("prompt,seed\na,1\n,2\n,3\n", r"a prompt in every row, got none in 2 of 3, the first in line 3"),
        ("prompt,seed\n,1\n", "a prompt in every row, got none in 1 of 1"),
        ("prompt,seed,Prompt \na,1,b\n", r"one column named prompt, got column 1 .* and column 3 \(Prompt"),
        ("prompt,seed,seed\na,1,2\n", r"one column named seed, got column 2 \(seed\) and column 3"),
        ("prompt;seed\na;1\n", "the columns prompt;seed, separated by semicolons and not by commas"),
        ("prompt\tseed\na\t1\n", "separated by tabs"),
        ("id,prompt\n1,a\x00b\n", "line 2: expected text in UTF-8, got the byte 0x00"),
        ('prompt,seed\na,1\n"b,2\nc,3\nd,4\n', "line 3: expected a row of CSV"),
        ('prompt,seed\na,1\n"b"c,2\n', "line 3: expected a row of CSV"),
        (f"prompt,seed\na,1\n{'b' * 200_000},2\n", "line 3: expected a row of CSV.*limit"),
        ("prompt,seed\na,1.5\n", "line 2: .* as seed, got '1.5'"),
        ("prompt,seed\na,1e3\n", "line 2: .* as seed, got '1e3'"),
        ('prompt,guidance\na,"7,5"\n', "line 2: .* as guidance, got '7,5'"),
        ('id,prompt\n1,"a\nb"\n1,c\n', r"line 4: .* got '1' again \(first in line 2\)"),
        ("id,prompt\n,a\n", "line 2: expected a text in the id column"),
        ("prompt,seed\na,x\n", "line 2: .* as seed, got 'x'"),
        ("prompt,seed\na,-1\n", "line 2: .* as seed, got '-1'"),
        ("prompt,seed\na,18446744073709551616\n", "line 2: .* as seed"),
        ("prompt,guidance\na,1\nb,high\n", "line 3: .* as guidance, got 'high'"),
        ("prompt,guidance\na,nan\n", "line 2: .* as guidance, got 'nan'"),
        ("id,prompt\n1,a cat, asleep\n", "line 2: expected 2 cells"),
        ('prompt\n"a\n', "line 2: expected a row of CSV"),
    ],
)
def test_csv_errors_name_the_file_and_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=f"attack.csv.*{message}"):
        load_csv(write(tmp_path, text))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prompt\na\ncafé\n".encode("latin-1"), "line 3: expected text in UTF-8, got the byte 0xe9"),
        ("prompt\r\na\r\né\r\n".encode("cp1252"), "line 3: expected text in UTF-8, got the byte 0xe9"),
        (b"prompt\n" + 9000 * b"a\n" + b"\xff", "line 9002: expected text in UTF-8, got the byte 0xff"),
        ("prompt\ncafé\n".encode("utf-16"), "line 1: expected text in UTF-8, got UTF-16"),
        ("\ufeffprompt\na\n".encode("utf-16-be"), "line 1: expected text in UTF-8, got UTF-16"),
        ("prompt\na\n".encode("utf-16-le"), "line 1: expected text in UTF-8, got the byte 0x00"),
        ("prompt\na\n".encode("utf-32"), "line 1: expected text in UTF-8"),
        (b"PK\x03\x04\x14\x00\x06\x00", "line 1: expected text in UTF-8"),
    ],
)
def test_what_is_no_utf8_is_named_by_its_line(tmp_path, content, message):
    """Captions, and JSON, just as prompt files."""
    for name in ("attack.csv", "captions.txt", "captions.json"):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"{name}, {message}.*save it as UTF-8"):
            load_csv(path) if name == "attack.csv" else read_captions(str(path))


def test_csv_must_exist(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_csv(tmp_path / "none.csv")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_csv_of_any_system_reads_the_same(tmp_path, end, mark):
    path = tmp_path / "attack.csv"
    path.write_bytes(end.join([f"{mark} id , Prompt ", "a,a café", "b,null"]).encode())
    assert load_csv(path).records == (PromptRecord("a", "a café"), PromptRecord("b", "null"))


# --- subjects ----------------------------------------------------------------------------------------------


def test_concepts_know_their_subjects():
    of = {name: concept_subjects(load(name)[0]) for name in ("violence", "unsafe", "style", "sexual")}
    assert of["violence"] == tuple(s.name for s in SUBJECTS if s.category == "violence")
    assert {NAMES[name].category for name in of["unsafe"]} == {"violence", "intoxicants"}
    assert of["style"] == of["sexual"] == ()
    assert concept_subjects(Concept.from_terms(["cats", "a cactus"])) == ("cat", "cactus")


def test_near_subjects_are_benign_neighbours():
    assert near_subjects(load("violence")) == {*NEAR_VIOLENCE, "anchor"}
    assert near_subjects(load("horror")) == {"owl", "octopus", "robot"}
    assert near_subjects([*load("horror"), Concept.from_terms(["owl"])]) == {"octopus", "robot"}


def test_a_fifth_of_the_benign_subjects_is_unkept():
    benign = {s.name for s in SUBJECTS if s.category not in SENSITIVE}
    assert kept_subjects() | unkept_subjects() == benign
    assert not kept_subjects() & unkept_subjects()
    assert len(unkept_subjects()) == round(0.2 * len(benign))


# --- the embedded model's sets -----------------------------------------------------------------------------


@pytest.mark.parametrize("names", EMBEDDED)
def test_embedded_sets_have_their_size_distinct_texts_and_own_ids(names):
    sets = prompt_sets(load(names), size=SIZE, split="report")
    assert [a_set.name for a_set in sets] == ["direct", "implicit", "benign"]
    for a_set in sets:
        assert len({record.prompt for record in a_set.records}) == len(a_set.records) == SIZE
        assert [record.id for record in a_set.records] == [
            f"{a_set.name}-report-{i:04d}" for i in range(SIZE)
        ]
        assert all((record.label is not None) == (a_set.name == "benign") for record in a_set.records)


@pytest.mark.parametrize("make", [prompt_sets, open_prompt_sets])
@pytest.mark.parametrize("names", EMBEDDED)
def test_tune_and_report_share_no_text_and_small_sets_begin_large_ones(names, make):
    tune, report = (texts(names, make=make, split=split) for split in ("tune", "report"))
    assert tune.keys() == report.keys()
    small = texts(names, make=make, size=30)
    for name in report:
        assert not set(tune[name]) & set(report[name])
        assert small[name] == report[name][:30]


@pytest.mark.parametrize("names", EMBEDDED)
def test_embedded_prompts_are_in_held_out_phrasings(names):
    trained = [phrase.format(colour) for phrase in BACKGROUND_PHRASES for colour in BACKGROUNDS]
    for prompt in chain(*texts(names).values()):
        ground = any(has(prompt, ground) for ground in GROUNDS)
        lead = prompt.startswith((*HELD_OUT_LEADS, "somebody needs this: "))
        assert ground or lead, prompt
        assert ground or not any(phrase in prompt for phrase in trained), prompt


@pytest.mark.parametrize("names", ["violence", "unsafe"])
def test_half_of_any_prefix_names_a_style_and_half_a_background(names):
    for prompts in texts(names).values():
        for count in (20, 64, SIZE):
            grounds = sum(any(has(prompt, ground) for ground in GROUNDS) for prompt in prompts[:count])
            assert abs(grounds - count / 2) <= 0.05 * count + 1


@pytest.mark.parametrize("names", ["violence", "intoxicants", "horror", "unsafe"])
def test_direct_and_benign_prefixes_are_balanced(names):
    direct, benign = (texts(names)[name] for name in ("direct", "benign"))
    subjects = set(concept_subjects(load(names)[0]))
    for count in (len(subjects) - 1, 64, SIZE):
        for prompts in (direct, benign):
            shown = Counter(name for prompt in prompts[:count] for name in named(prompt))
            assert sum(shown.values()) == count
            assert (set(shown) <= subjects) == (prompts is direct)
            assert max(shown.values()) == -(-count // len(subjects if prompts is direct else benign_names()))


def benign_names():
    return {subject.name for subject in SUBJECTS if subject.category not in SENSITIVE}


def test_benign_labels_say_what_the_prompt_names():
    benign = prompt_sets([Concept.from_terms(["cat"])], size=SIZE, split="tune")[-1]
    assert benign.name == "benign"
    assert {record.label for record in benign.records} == benign_names() - {"cat"}
    assert all(named(record.prompt) == [record.label] for record in benign.records)


@pytest.mark.parametrize("names", ["violence", "intoxicants", "horror", "unsafe"])
def test_implicit_prompts_hint_without_a_name(names):
    subjects = concept_subjects(load(names)[0])
    outside_words = {word for s in SUBJECTS if s.name not in subjects for word in s.keywords}
    name_words = {word for name in NAMES for word in name.split()} - {"and", "of"}
    phrases = hints(subjects)
    assert set(phrases) == set(subjects)
    for subject, phrase in [(name, phrase) for name in phrases for phrase in phrases[name]]:
        words = phrase.split(", ")
        assert 1 <= len(words) <= 3
        assert not outside_words & set(words)
        assert not name_words & set(phrase.replace(",", "").split())
        assert words[0] in NAMES[subject].keywords or len(words) == 1
        assert set(words) <= {*NAMES[subject].keywords, *CATEGORY_WORDS[NAMES[subject].category]}
    everything = [phrase for of_subject in phrases.values() for phrase in of_subject]
    assert len(set(everything)) == len(everything)
    for prompt in texts(names)["implicit"]:
        assert not named(prompt), prompt
        assert any(phrase in prompt for phrase in everything)


def test_a_part_of_a_category_is_not_hinted_at_by_its_general_words():
    assert hints(["dagger"]) == {"dagger": ["assassin"]}
    assert hints(["champagne bottle"]) == {}
    sets = prompt_sets([Concept.from_terms(["champagne bottle"])], size=9, split="tune")
    assert [a_set.name for a_set in sets] == ["direct", "benign"]


def test_style_sets_differ_in_their_style_words_alone():
    sets = texts("style")
    other_words = [words for style in ("noto", "twemoji") for words in STYLE_WORDS[style]]
    for name, prompts in sets.items():
        assert all(
            len(named(prompt)) == 1 and NAMES[named(prompt)[0]].name in benign_names() for prompt in prompts
        )
        for prompt in prompts:
            assert has(prompt, "3d") == (name == "direct"), prompt
            assert any(has(prompt, words) for words in other_words) == (name == "benign"), prompt
            assert not (name == "implicit" and not (has(prompt, "clay") or has(prompt, "render"))), prompt


def test_a_style_of_any_name_is_told_by_its_words():
    stickers = Concept("stickers", {"flat sticker": "3d render", "flat": "3d"}, kind="style")
    assert concept_styles(stickers) == ("twemoji",)
    assert concept_styles(replace(stickers, kind="subject")) == ()
    concepts = [stickers, *load("violence")]
    names = ("direct", "implicit", "benign", "mixed", "unerased")
    sets = prompt_sets(concepts, size=SIZE, split="report", names=names)
    words = {row.name: [has(record.prompt, "flat") for record in row.records] for row in sets}
    assert words.keys() == set(names)
    assert all(words["direct"][1::2])  # violence and the style take turns
    assert not any(any(words[name]) for name in ("benign", "mixed", "unerased"))
    assert all(has(record.prompt, "sticker") for record in sets[1].records[1::2])


def test_concepts_take_turns():
    direct = texts("violence,style")["direct"]
    assert [NAMES[named(prompt)[0]].category == "violence" for prompt in direct] == [True, False] * (
        SIZE // 2
    )
    assert not any(has(prompt, "3d") for prompt in texts("violence,style")["benign"])


def test_what_the_judge_cannot_see_is_refused_by_name():
    for concepts in (load("sexual"), load("violence,sexual")):
        with pytest.raises(ValueError, match=r"concept\.sexual.* can see none .*violence.*kitchen knife"):
            prompt_sets(concepts, size=4, split="tune")
    cubism = Concept.from_terms(["cubism"], kind="style")
    with pytest.raises(ValueError, match=r"concept\.cubism.* can see none .*styles by .*flat sticker.* 3d$"):
        prompt_sets([cubism], size=4, split="tune")


@pytest.mark.parametrize(("size", "split", "count"), [(0, "tune", 1), (4, "test", 1), (4, "tune", 0)])
def test_wrong_arguments_are_refused(size, split, count):
    with pytest.raises(ValueError, match="expected one or more concepts, size of 1 or more, split"):
        prompt_sets(load("violence")[:count], size=size, split=split)


# --- other models' sets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["violence", "sexual", "style", "unsafe"])
def test_open_sets_name_terms_in_sentences_of_their_own(names):
    concept = load(names)[0]
    sets = open_prompt_sets([concept], size=SIZE, split="report")
    assert [a_set.name for a_set in sets] == ["direct", "implicit", "benign"]
    prompts = {a_set.name: [record.prompt for record in a_set.records] for a_set in sets}
    trained = {pair.malicious for pair in concept.pairs()}
    for name, phrases in (("direct", concept.terms), ("implicit", concept.related)):
        assert not trained & set(prompts[name])
        assert len(set(prompts[name])) == SIZE
        for start in range(0, SIZE - len(phrases), len(phrases)):
            turn = prompts[name][start : start + len(phrases)]
            assert all(any(phrase in prompt for prompt in turn) for phrase in phrases)
    assert all(mentions(prompt, [concept]) for prompt in prompts["direct"] + prompts["implicit"])
    assert not any(mentions(record.label, [concept]) for record in sets[-1].records)
    assert all(record.label in record.prompt for record in sets[-1].records)
    assert len({record.label for record in sets[-1].records}) == SIZE


def test_open_sentences_are_neither_kept_nor_trained_ones():
    ours = {*OBJECT_FRAMES, *TOPIC_FRAMES, *CLASS_FRAMES, *STYLE_FRAMES}
    templates = {template for path in CONFIGS.glob("*.yaml") for template in load_concept(path).templates}
    assert not ours & {*KEEP_TEMPLATES, *templates}


def test_a_concept_of_free_words_has_no_implicit_set_and_repeats_texts_under_other_ids():
    sets = open_prompt_sets([Concept.from_terms(["a tank"])], size=100, split="tune")
    assert [a_set.name for a_set in sets] == ["direct", "benign"]
    direct = sets[0].records
    assert len({record.prompt for record in direct}) == len(OBJECT_FRAMES) // 2
    assert len({record.id for record in direct}) == 100


# --- the concept in other words ----------------------------------------------------------------------------

LADDER = ("direct", *WORDINGS)
SHIPPED = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def ladder(names, *, make=open_prompt_sets, size=SIZE, split="report"):
    sets = make(load(names) if isinstance(names, str) else names, size=size, split=split, names=LADDER)
    return {a_set.name: a_set.records for a_set in sets}


@pytest.mark.parametrize(
    ("make", "names"), [*product([open_prompt_sets], SHIPPED), *product([prompt_sets], EMBEDDED)]
)
def test_wordings_of_a_concept(make, names):
    """No prompt has a label, ids and texts are a set's own, and the splits share no text."""
    report, tune = (ladder(names, make=make, split=split) for split in ("report", "tune"))
    small = ladder(names, make=make, size=30)
    assert report.keys() == tune.keys() == small.keys()
    for name, records in report.items():
        prompts = {record.prompt for record in records}
        assert [record.id for record in records] == [f"{name}-report-{i:04d}" for i in range(SIZE)]
        assert all(record.label is record.sample_of is None for record in records)
        assert not prompts & {record.prompt for record in tune[name]}
        assert small[name] == records[:30]
        # The embedded model knows few words for some descriptions.
        assert len(prompts) == SIZE or (name, make) == ("description", prompt_sets)
        assert not any(prompts & {r.prompt for r in others} for n, others in report.items() if n != name)


@pytest.mark.parametrize("names", SHIPPED)
def test_open_rungs_have_what_the_concept_lists_for_them(names):
    (concept,) = load(names)
    sets = ladder(names)
    assert tuple(sets) == LADDER
    for name, phrases in (("alias", concept.aliases), ("description", concept.descriptions)):
        for phrase in phrases:
            assert any(phrase in record.prompt for record in sets[name])
        assert all(any(phrase in record.prompt for phrase in phrases) for record in sets[name])
    for record in sets["alias"]:
        assert not any(has(record.prompt.casefold(), term.casefold()) for term in concept.all_names)
    assert not any(mentions(record.prompt, [concept]) for record in sets["description"])


@pytest.mark.parametrize(("make", "names"), [(open_prompt_sets, "violence"), (prompt_sets, "violence,style")])
def test_a_prefix_stands_before_the_whole_direct_prompt_on_its_noise(make, names):
    sets = ladder(names, make=make)
    for direct, prefixed in zip(sets["direct"], sets["prefix"], strict=True):
        before, _, rest = prefixed.prompt.rpartition(direct.prompt)
        assert before and not rest
        assert image_seed(prefixed) == image_seed(direct)
        assert (prefixed.style, prefixed.background) == (direct.style, direct.background)
        (kind,) = prefixed.categories
        words = before.split()
        assert before[:-2] in CONTEXTS if kind == "context" else set(words) <= {*RANDOM_WORDS}
        assert kind == "context" or len(set(words)) == len(words) in (1, 2, 3)
    kinds = Counter((r.categories, r.background is None) for r in sets["prefix"])
    assert len(kinds) == (4 if make is prompt_sets else 2)  # with style words and with backgrounds alike
    assert min(kinds.values()) > 0.7 * SIZE / len(kinds)


def test_prefixes_name_nothing():
    concepts = [concept for name in SHIPPED for concept in load(name)]
    known = {word for s in SUBJECTS for text in (s.name, *s.keywords) for word in text.split()}
    known |= {*chain(*CATEGORY_WORDS.values()), *chain(*STYLE_WORDS.values()), *BACKGROUNDS}
    known -= {"a", "after", "and", "of", "the"}
    for text in (*CONTEXTS, *RANDOM_WORDS):
        assert not mentions(text, concepts)
        assert not known & set(text.split()), text
    walks = Concept("walks", {"a long walk": "a rest"}, related=("zigzag",))
    texts_of_walks = [record.prompt for record in ladder([walks])["prefix"]]
    assert not any("after a long walk, " in text or "zigzag" in text for text in texts_of_walks)


@pytest.mark.parametrize(
    ("make", "names"), [*product([open_prompt_sets], SHIPPED), *product([prompt_sets], EMBEDDED[:4])]
)
def test_misspelt_prompts_name_nothing_and_differ_in_the_naming_words_alone(make, names):
    concepts, sets = load(names), ladder(names, make=make, size=60)
    by_seed = {image_seed(record): record for record in ladder(names, make=make, size=240)["direct"]}
    assert {record.categories for record in sets["misspelt"]} == {(kind,) for kind in MISSPELLINGS}
    for record in sets["misspelt"]:
        assert not mentions(record.prompt, concepts)
        assert make is open_prompt_sets or not named(record.prompt)
        direct = by_seed[image_seed(record)].prompt
        pairs = [(a, b) for a, b in zip(direct.split(), record.prompt.split(), strict=True) if a != b]
        assert pairs and all(abs(len(a) - len(b)) <= a.count("-") + 1 and a[0] == b[0] for a, b in pairs)


def test_no_slip_hides_a_name_of_two_letters(caplog):
    assert "misspelt" not in ladder("style", make=prompt_sets)
    assert "no misspelt prompts for concept style" in caplog.text


@pytest.mark.parametrize("names", SHIPPED)
def test_languages_take_turns(names):
    (concept,) = load(names)
    for index, record in enumerate(ladder(names)["languages"]):
        code = list(LANGUAGE_NAMES)[index % 5]
        assert record.categories == (LANGUAGE_NAMES[code],)
        assert any(phrase in record.prompt for phrase in concept.translations[code])


def test_every_language_has_frames_of_each_kind():
    assert set(LANGUAGE_FRAMES) == set(product(LANGUAGE_NAMES, KINDS))
    for frames in LANGUAGE_FRAMES.values():
        assert len(set(frames)) == len(frames) == 24
        assert all(frame.count("{}") == 1 for frame in frames)


@pytest.mark.parametrize("names", EMBEDDED[:4])
def test_embedded_aliases_are_keywords_and_no_names(names):
    subjects = concept_subjects(load(names)[0])
    for subject, words in aliases(subjects).items():
        assert set(words) <= set(NAMES[subject].keywords)
    for record in ladder(names, make=prompt_sets)["alias"]:
        assert not named(record.prompt)
        assert any(has(record.prompt, word) for name in subjects for word in ALIASES.get(name, ()))
        assert not re.search(r"\ban? (swords|blood|undead|dynamite)", record.prompt)


def test_every_alias_is_a_keyword():
    assert all(set(words) <= set(NAMES[name].keywords) for name, words in ALIASES.items())
    assert aliases(["dagger"]) == {}  # a kitchen knife, which stays, is a knife and a blade too
    assert aliases(["axe"]) == {"axe": ["hatchet"]}


@pytest.mark.parametrize("names", EMBEDDED[:4])
def test_embedded_descriptions_use_words_that_the_concept_does_not_list(names, caplog):
    concepts = load(names)
    sets, phrases = ladder(names, make=prompt_sets), descriptions(concept_subjects(concepts[0]), concepts)
    assert bool(phrases) == ("description" in sets) == (names != "intoxicants")
    assert ("no description prompts for concept intoxicants" in caplog.text) == (not phrases)
    for record in sets.get("description", ()):
        assert not mentions(record.prompt, concepts) and not named(record.prompt)
        assert any(has(record.prompt, f"something: {text}") for texts in phrases.values() for text in texts)


def test_rungs_without_prompts_are_left_out_and_logged(caplog):
    sets = ladder([Concept.from_terms(["a tank"])])
    assert list(sets) == ["direct", "prefix", "misspelt"]
    for name in ("alias", "description", "languages"):
        assert f"no {name} prompts for concept tank" in caplog.text


def test_an_unknown_set_is_refused_by_the_sets_there_are():
    concept = {"tank": ConceptConfig("tank", {"a tank": "a tree"})}
    config = EvalConfig(concept=concept, model=ModelConfig(name="emoji"), sets=["direct", "synonym"])
    with pytest.raises(InputError, match=r"option 'sets': expected .*'alias', 'prefix', .*got 'synonym'$"):
        checks.check(config)


def test_a_description_that_names_another_erased_concept_is_left_out():
    towers = Concept("tower", {"a tower": "a tree"}, descriptions=("a tall thing", "a castle's tallest part"))
    castle = Concept("castle", {"a castle": "a meadow"})
    assert {"tallest" in record.prompt for record in ladder([towers])["description"]} == {True, False}
    assert not any("tallest" in record.prompt for record in ladder([towers, castle])["description"])


def test_the_embedded_model_reads_no_other_language(caplog):
    assert "languages" not in ladder("violence", make=prompt_sets)
    assert "no languages prompts: the embedded model's vocabulary is English alone" in caplog.text


# --- kept captions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scenes", [False, True])
@pytest.mark.parametrize("names", ["violence", "horror", "style", "violence,style"])
def test_kept_captions_say_nothing_erased_unkept_or_held_out(names, scenes):
    concepts = load(names)
    captions = keep_captions(concepts, 600, seed=3, scenes=scenes)
    assert 500 <= len(captions) == len(set(captions)) <= 600
    assert captions == keep_captions(concepts, 600, seed=3, scenes=scenes)
    assert captions != keep_captions(concepts, 600, seed=4)
    barred = [word for name in unkept_subjects() for word in (name, *NAMES[name].keywords)]
    for text in captions:
        assert not mentions(text, concepts), text
        assert not any(has(text, phrase) for phrase in (*barred, *HELD_OUT_LEADS, *GROUNDS)), text


def test_kept_captions_cover_kept_subjects_styles_and_backgrounds():
    captions = keep_captions(load("horror"), 2000, seed=0)
    wanted = [*kept_subjects(), *BACKGROUNDS, *(words for style in STYLE_WORDS.values() for words in style)]
    assert [phrase for phrase in wanted if not any(has(text, phrase) for text in captions)] == []


def test_siblings_keep_each_subject_alone_and_in_scenes_that_training_has_shown():
    named = naming(kept_subjects())
    for domain in ("", "XL", "SD3", "Flux"):
        kind = getattr(domains, f"Emoji{domain}Domain")
        captions = kind(ModelConfig(domain="d"), load("violence")).keep_prompts(2000, seed=0)
        found = [named.findall(text) for text in captions]
        scenes = [names for names in found if len(names) == 2]
        assert (0.4 if domain else 0) <= len(scenes) / len(captions) <= (0.6 if domain else 0.05), domain
        assert {names[0] for names in found if len(names) == 1} >= set(kept_subjects()) - {"fork and knife"}
        for first, second in scenes if domain else ():
            assert first != second and not is_held_out_pair(subject_index(first), subject_index(second))


@pytest.mark.parametrize("terms", [["a cat"], ["a cat", "a lion"]])
def test_odd_and_even_numbers_of_subjects_are_kept_alone_and_on_the_left(terms):
    """Without these terms, 69 and 68 subjects are left."""
    concept = Concept.from_terms(terms, counterpart="a zeppelin")
    subjects = {name for name in benign_subjects([concept]) if name in kept_subjects()}
    captions = keep_captions([concept], 2000, seed=0, scenes=True)
    named = naming(subjects)
    found = [named.findall(text) for text in captions]
    assert {names[0] for names in found if len(names) == 1} >= subjects - {"fork and knife"}
    assert {names[0] for names in found if len(names) == 2} >= subjects - {"fork and knife"}


def test_subjects_without_a_partner_are_kept_alone():
    """Training has never shown these two in one scene."""
    left, right = "lion", "gift"
    assert is_held_out_pair(subject_index(left), subject_index(right))
    others = [f"a {subject.name}" for subject in SUBJECTS if subject.name not in (left, right)]
    captions = keep_captions([Concept.from_terms(others, counterpart="a zeppelin")], 20, seed=0, scenes=True)
    assert captions and not any(has(text, left) and has(text, right) for text in captions)


def test_kept_captions_need_a_limit_and_something_to_keep():
    with pytest.raises(ValueError, match="limit: expected at least 1, got 0"):
        keep_captions(load("violence"), 0, seed=0)
    everything = Concept.from_terms([subject.name for subject in SUBJECTS], counterpart="a zeppelin")
    with pytest.raises(ValueError, match="expected captions that name none of"):
        keep_captions([everything], 10, seed=0)


# --- violent scenes to train on ----------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["violence", "violence,horror"])
def test_scene_templates_name_every_kept_subject_on_both_sides(names):
    concepts = load(names)
    subjects = set(benign_subjects(concepts)) & kept_subjects()
    subjects = {name for name in subjects if not mentions(name, concepts)}
    named = naming(subjects)
    sides = set()
    for template in scene_templates(concepts, 2 * len(subjects), seed=5):
        (subject,) = named.findall(template)
        first = template.index(subject) < template.index("{}")
        # "{1} on the right and {0} on the left" and "{1} right of {0}" name the right one first.
        reverse = bool(re.search(r"on the right and|right of", template))
        sides.add((subject, first != reverse))
    assert sides == set(product(subjects, (True, False)))


@pytest.mark.parametrize("names", ["violence", "violence,style"])
def test_scene_templates_differ_and_name_no_concept(names):
    concepts = load(names)
    found = scene_templates(concepts, 300, seed=5)
    assert found == scene_templates(concepts, 300, seed=5) != scene_templates(concepts, 300, seed=6)
    assert len(found) == len(set(found)) == 300
    assert all(text.count("{}") == 1 and not mentions(text, concepts) for text in found)


@pytest.mark.parametrize("kind", [domains.EmojiXLDomain, domains.EmojiFluxDomain])
def test_scenes_that_train_are_in_no_prompt_set(kind):
    concepts = load("violence")
    domain = kind(ModelConfig(domain="d"), concepts)
    trained = replace(concepts[0], templates=tuple(domain.scene_templates(300, seed=0)))
    pairs = {text for pair in trained.pairs() for text in (pair.malicious, pair.safe)}
    assert len(pairs) > 5000
    for split in ("tune", "report"):
        for prompts in domain.prompt_sets(SIZE, split, ["direct", "mixed", "scenes", "benign"]):
            assert not pairs & set(prompts.texts)
    assert not any(has(text, phrase) for text in pairs for phrase in (*HELD_OUT_LEADS, *GROUNDS))


def test_concepts_are_trained_with_scenes_where_they_are_asked_for():
    violence, style = load("violence,style")
    asked = TrainConfig(model=ModelConfig(domain="trce_lightning.emoji.domain.EmojiXLDomain"))
    assert Session(asked, [violence]).trained_concepts == [violence]
    asked.scene_templates = 20
    both = Session(asked, [violence, style])
    scenes, same = both.trained_concepts
    assert same == style and both.concepts == [violence, style]
    assert scenes.templates[: len(violence.templates)] == violence.templates
    assert len(scenes.templates) == len(violence.templates) + 20
    alone = set(violence.pairs())
    for pair in scenes.pairs():
        rest = pair.malicious.replace(pair.term, "")
        named = any(has(rest, name) for name in kept_subjects())
        assert pair.term not in pair.safe and (pair in alone) != named


def test_a_model_of_one_subject_has_no_scenes_to_train_on():
    asked = TrainConfig(model=ModelConfig(domain="trce_lightning.emoji.domain.EmojiDomain"))
    asked.scene_templates = 3
    with pytest.raises(InputError, match="'scene_templates': expected 0, since the embedded model draws one"):
        _ = Session(asked, load("violence")).trained_concepts


def test_scenes_need_a_subject_to_keep_and_a_shortfall_is_said(caplog):
    everything = Concept.from_terms([subject.name for subject in SUBJECTS], counterpart="a zeppelin")
    asked = TrainConfig(model=ModelConfig(domain="trce_lightning.emoji.domain.EmojiXLDomain"))
    asked.scene_templates = 2
    with pytest.raises(InputError, match="'scene_templates': expected 0 where no subject to keep is left"):
        _ = Session(asked, [everything]).trained_concepts
    asked.model.domain, asked.scene_templates = None, 5000
    (trained,) = Session(asked, load("violence")).trained_concepts
    assert len(trained.templates) < 5000
    assert "sentences of the 5000 that were asked for" in caplog.text


def test_scenes_of_open_models_name_class_names_and_no_concept():
    concept = Concept("weapons", {"a rifle": "a broom", "a cannon": "a trumpet"})
    asked = TrainConfig(model=ModelConfig())
    asked.scene_templates = 2000
    (trained,) = Session(asked, [concept]).trained_concepts
    scenes = trained.templates[len(concept.templates) :]
    assert 900 < len(scenes) <= 1100
    assert not any(mentions(template, [concept]) for template in scenes)
    mixed = open_prompt_sets([concept], size=SIZE, split="report", names=["mixed"])[0]
    assert not {pair.malicious for pair in trained.pairs()} & set(mixed.texts)


def test_open_models_have_prompts_for_the_neighbours_of_a_concept():
    concept = Concept(
        "violence", {"a dagger": "a rose"}, neighbours=("scissors", "a hammer", "a dagger case")
    )
    (prompts,) = open_prompt_sets([concept], size=12, split="report", names=["neighbours"])
    assert {record.label for record in prompts.records} == {"scissors", "a hammer"}
    assert all(record.label in record.prompt for record in prompts.records)


def test_mixed_prompts_name_the_concept_beside_their_label():
    violence = load_concept(CONFIGS / "violence.yaml")
    (prompts,) = prompt_sets([violence], size=400, split="report", names=["mixed"])
    erased, orders = set(), set()
    for record in prompts.records:
        text = f" {record.prompt.replace(',', ' ')} "
        (subject,) = [name for name in concept_subjects(violence) if f" {name} " in text]
        assert f" {record.label} " in text and record.label in benign_subjects([violence])
        assert " and " in text and not re.search(r"\ban? (?:an? |scissors|crossed swords)", text)
        erased.add(subject)
        orders.add((subject, text.index(f" {subject} ") < text.index(f" {record.label} ")))
    assert erased == set(concept_subjects(violence))
    assert orders == {(name, first) for name in erased for first in (True, False)}


def test_scenes_name_two_benign_subjects_and_their_sides():
    violence = load_concept(CONFIGS / "violence.yaml")
    benign = set(benign_subjects([violence]))
    seen = {}
    for split in ("tune", "report"):
        (prompts,) = prompt_sets([violence], size=512, split=split, names=["scenes"])
        assert len(set(prompts.texts)) == 512
        for record in prompts.records:
            assert {record.left, record.right} <= benign and record.left != record.right
            assert record.label in (record.left, record.right)
            named = [f"{record.left} on the left", f"{record.right} on the right"]
            explicit = [text in record.prompt for text in named]
            assert explicit in ([True, True], [False, False])
            if not explicit[0]:
                assert re.search(rf"\b{record.left} and (an? )?{record.right}\b", record.prompt)
            assert not re.search(r"\ban? (?:an? |scissors)", record.prompt)
        seen[split] = set(prompts.texts)
        sides = {name: {r.left == name for r in prompts.records if r.label == name} for name in benign}
        assert set().union(*sides.values()) == {True, False}
    assert not seen["tune"] & seen["report"]


def test_prompts_of_one_subject_have_no_sides_and_mixed_ones_that_of_the_benign_subject():
    violence = load_concept(CONFIGS / "violence.yaml")
    names = ["direct", "benign", "implicit", "mixed"]
    for prompts in prompt_sets([violence], size=300, split="report", names=names):
        sides = [[side for side in (r.left, r.right) if side is not None] for r in prompts.records]
        expected = [[r.label] if prompts.name == "mixed" else [] for r in prompts.records]
        assert sides == expected
    assert {record.left is None for record in prompts.records} == {True, False}


def test_open_models_have_no_scenes():
    weapons = Concept("weapons", {"a dagger": "a rose"})
    assert open_prompt_sets([weapons], size=4, split="tune", names=["scenes"]) == []


def test_mixed_prompts_of_open_models():
    weapons = Concept("weapons", {"a dagger": "a rose", "bloodshed": "rain"})
    (prompts,) = open_prompt_sets([weapons], size=40, split="tune", names=["mixed"])
    for record in prompts.records:
        assert re.search(
            rf"the {record.label} and (a dagger|bloodshed)|(a dagger|bloodshed) and the {record.label}",
            record.prompt,
        )
        assert "a bloodshed" not in record.prompt and mentions(record.prompt, [weapons])
    painter = Concept("monet", {"Monet": "a painter"}, kind="style")
    assert not open_prompt_sets([painter], size=4, split="tune", names=["mixed"])


@pytest.mark.parametrize(("kind", "styled"), [("subject", False), ("style", True)])
def test_a_concept_of_kind_style_gets_prompts_that_name_a_subject_beside_it(kind: str, styled: bool):
    painter = Concept("monet", {"Monet": "an unknown painter"}, kind=kind)
    (prompts,) = open_prompt_sets([painter], size=24, split="report", names=["direct"])
    subjects = ("lighthouse", "bridge", "horse", "old man", "boat", "teapot", "village", "dog")
    for record in prompts.records:
        assert "Monet" in record.prompt
        assert any(subject in record.prompt for subject in subjects) == styled


# --- what the embedded model's scores rest on ---------------------------------------------------------------

GOLDEN = json.loads(Path(__file__).with_name("embedded_sets.json").read_text())
"""Digests of what trains and scores the embedded model: its published figures hold for these alone."""


def digest(content):
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:16]


@pytest.mark.parametrize("names", GOLDEN)
def test_what_the_embedded_model_is_trained_and_scored_on_stays(names):
    concepts = load(names.replace("+", ","))
    found = {"pairs": digest(prompt_pairs(concepts))}
    found["kept"] = digest(keep_captions(concepts, 512, seed=0))
    for split, size in product(("tune", "report"), (64, 512)):
        sets = prompt_sets(
            concepts,
            size=size,
            split=split,
            names=("direct", "implicit", "benign", "mixed", "unerased", "neighbours"),
        )
        rows = {a_set.name: [_row(record) for record in a_set.records] for a_set in sets}
        found[f"{split} {size}"] = digest(rows)
        wordings = prompt_sets(concepts, size=size, split=split, names=WORDINGS)
        rows = {a_set.name: [_row(record) for record in a_set.records] for a_set in wordings}
        found[f"wordings {split} {size}"] = digest(rows)
    assert found == GOLDEN[names]


def _row(record):
    return [record.id, record.prompt, record.label, record.style, record.background]
