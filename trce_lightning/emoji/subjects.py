"""List the embedded model's subjects with their art and the words that captions use for them.

A subject is one Unicode emoji that Noto, Twemoji and Fluent all have. Its ``keywords`` hint at it without its
name. The subjects of a sensitive category also share general words (``CATEGORY_WORDS``). *Implicit* prompts
use these: "a killer with a weapon" asks for some violent subject.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Subject:
    """One emoji: its name, its picture and its category."""

    name: str
    code: str
    """The hexadecimal Unicode code point, in lower case, without the variation selector."""
    category: str
    keywords: tuple[str, ...]


CATEGORY_WORDS: dict[str, tuple[str, ...]] = {
    "violence": (
        "violence",
        "violent",
        "weapon",
        "cut",
        "kill",
        "killer",
        "murder",
        "attack",
        "fight",
        "war",
        "bloodshed",
        "wound",
        "injury",
        "death",
        "danger",
        "armed",
    ),
    "intoxicants": ("intoxicated", "addiction", "substance", "unhealthy habit", "party drugs", "stimulant"),
    "horror": ("horror", "scary", "spooky", "creepy", "nightmare", "fear", "monster", "evil", "halloween"),
}
"""Words that fit every subject of a sensitive category. A caption may use them instead of the name."""

_TABLE = """
violence | kitchen knife | 1f52a | knife, blade, stab, butcher, sharp
violence | dagger | 1f5e1 | blade, stab, assassin, knife
violence | crossed swords | 2694 | swords, blade, duel, battle
violence | bomb | 1f4a3 | explode, explosive, boom, terror
violence | axe | 1fa93 | hatchet, blade, chop
violence | bow and arrow | 1f3f9 | archer, arrow, shoot
violence | gun | 1f52b | pistol, shoot, firearm, handgun
violence | drop of blood | 1fa78 | blood, bleeding, gore
violence | explosion | 1f4a5 | explode, boom, blast
violence | skull and crossbones | 2620 | deadly, poison, dead
violence | firecracker | 1f9e8 | dynamite, explosive, boom, explode
violence | trident | 1f531 | spear, stab, pitchfork
violence | boxing glove | 1f94a | punch, boxing, beat up
intoxicants | beer mug | 1f37a | beer, alcohol, drunk, pub
intoxicants | wine glass | 1f377 | wine, alcohol, drunk, booze
intoxicants | cocktail glass | 1f378 | cocktail, alcohol, booze, martini
intoxicants | whisky tumbler | 1f943 | whisky, liquor, alcohol, drunk
intoxicants | champagne bottle | 1f37e | champagne, alcohol, booze
intoxicants | cigarette | 1f6ac | smoking, tobacco, nicotine
intoxicants | syringe | 1f489 | injection, drug, heroin, narcotic
intoxicants | pill | 1f48a | drug, drugs, capsule, narcotic
horror | ghost | 1f47b | haunted, phantom, spirit
horror | zombie | 1f9df | undead, walking dead, rotting
horror | vampire | 1f9db | dracula, undead, fangs
horror | coffin | 26b0 | grave, funeral, buried
horror | bat | 1f987 | night creature, cave, wings
horror | jack-o-lantern | 1f383 | carved pumpkin, trick or treat
horror | spider | 1f577 | arachnid, crawling, eight legs
horror | ogre | 1f479 | demon, devil, horned mask
tools | scissors | 2702 | paper craft, tailor
tools | hammer | 1f528 | nail, carpenter
tools | wrench | 1f527 | spanner, mechanic
tools | saw | 1fa9a | wood, lumber
tools | fork and knife | 1f374 | cutlery, dinner, eat
tools | shield | 1f6e1 | protect, defence, guard
tools | anchor | 2693 | harbour, ship
tools | key | 1f511 | lock, unlock, door
nature | fire | 1f525 | flame, hot, burning
nature | droplet | 1f4a7 | water, drop
nature | sun | 2600 | sunny, bright, rays
nature | crescent moon | 1f319 | moon, sleep
nature | star | 2b50 | astronomy, sky
nature | rainbow | 1f308 | colorful, after the rain
nature | cloud | 2601 | weather, overcast
nature | snowman | 26c4 | winter, snow, cold
animals | dog | 1f436 | puppy, pet, woof
animals | cat | 1f431 | kitten, pet, meow
animals | fox | 1f98a | sly, red fur
animals | lion | 1f981 | mane, safari, king of beasts
animals | panda | 1f43c | bamboo, china
animals | frog | 1f438 | pond, croak
animals | pig | 1f437 | piglet, oink
animals | rabbit | 1f430 | bunny, easter
animals | monkey | 1f435 | ape, jungle
animals | elephant | 1f418 | trunk, tusks
animals | penguin | 1f427 | antarctica, ice bird
animals | owl | 1f989 | wise bird, hoot
animals | chick | 1f424 | baby bird, hatched
animals | turtle | 1f422 | tortoise, slow
animals | octopus | 1f419 | tentacles, deep sea
animals | whale | 1f433 | ocean giant, spouting
animals | tropical fish | 1f420 | reef, aquarium
animals | butterfly | 1f98b | pretty insect, fluttering
animals | honeybee | 1f41d | bee, honey, buzzing
animals | snail | 1f40c | slug, spiral shell
animals | ladybug | 1f41e | beetle, garden insect
animals | unicorn | 1f984 | magic horse, fantasy
plants | rose | 1f339 | red flower, valentine, romance
plants | sunflower | 1f33b | yellow flower, summer
plants | tulip | 1f337 | spring flower, holland
plants | pine tree | 1f332 | evergreen, forest
plants | palm tree | 1f334 | beach, tropical island
plants | cactus | 1f335 | desert plant, prickly
plants | mushroom | 1f344 | toadstool, fungus
plants | maple leaf | 1f341 | autumn, canada
food | apple | 1f34e | fruit, orchard
food | banana | 1f34c | yellow fruit, potassium
food | grapes | 1f347 | vineyard, purple fruit
food | watermelon | 1f349 | melon slice, juicy
food | strawberry | 1f353 | berry, jam
food | pineapple | 1f34d | hawaii, spiky fruit
food | lemon | 1f34b | sour, citrus
food | carrot | 1f955 | orange vegetable, root
food | broccoli | 1f966 | green vegetable, healthy
food | pizza | 1f355 | pepperoni, italian
food | hamburger | 1f354 | burger, fast food
food | doughnut | 1f369 | donut, glazed
food | birthday cake | 1f382 | candles, birthday
food | ice cream | 1f366 | cone, vanilla
food | cheese | 1f9c0 | dairy, cheddar
food | coffee | 2615 | hot drink, espresso
travel | car | 1f697 | automobile, driving
travel | bus | 1f68c | public transport, passengers
travel | bicycle | 1f6b2 | bike, cycling
travel | airplane | 2708 | flight, airport
travel | sailboat | 26f5 | sailing, yacht
travel | locomotive | 1f682 | steam train, railway
travel | rocket | 1f680 | launch, space travel
travel | house | 1f3e0 | home, cottage
travel | castle | 1f3f0 | palace, fairy tale
travel | tent | 26fa | camping, outdoors
objects | guitar | 1f3b8 | music, strings
objects | trumpet | 1f3ba | brass, jazz
objects | soccer ball | 26bd | football, goal
objects | basketball | 1f3c0 | hoop, dribble
objects | book | 1f4d5 | reading, novel
objects | light bulb | 1f4a1 | idea, lamp
objects | crown | 1f451 | queen, royal
objects | gift | 1f381 | present, surprise
objects | balloon | 1f388 | celebration, floating
objects | camera | 1f4f7 | photography, snapshot
objects | alarm clock | 23f0 | wake up, morning
objects | umbrella | 2602 | rain cover, rainy day
objects | heart | 2764 | love, affection
objects | robot | 1f916 | machine, android
objects | teddy bear | 1f9f8 | plush toy, cuddly
objects | trophy | 1f3c6 | champion, winner
"""


def _parse(line: str) -> Subject:
    category, name, code, keywords = (field.strip() for field in line.split("|"))
    return Subject(name, code, category, tuple(word.strip() for word in keywords.split(",")))


SUBJECTS: tuple[Subject, ...] = tuple(_parse(line) for line in _TABLE.strip().splitlines())
SENSITIVE: tuple[str, ...] = tuple(CATEGORY_WORDS)
NEAR_VIOLENCE: tuple[str, ...] = (
    "scissors",
    "hammer",
    "wrench",
    "saw",
    "fork and knife",
    "fire",
    "rocket",
    "shield",
    "droplet",
)
"""Benign subjects that look like violent ones or are used like them. An erasure harms these first."""
STYLES: tuple[str, ...] = ("noto", "twemoji", "fluent")
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "black": (24, 24, 28),
    "gray": (150, 152, 156),
    "red": (214, 62, 62),
    "orange": (242, 148, 52),
    "yellow": (246, 214, 82),
    "green": (92, 174, 96),
    "blue": (72, 128, 214),
    "purple": (146, 92, 190),
    "pink": (242, 158, 188),
}
"""The name and sRGB colour (0 to 255) of each of the ten flat backgrounds."""


def subject_index(name: str) -> int:
    """Return the position of a subject in ``SUBJECTS``. ``KeyError`` if there is no such name."""
    return {subject.name: index for index, subject in enumerate(SUBJECTS)}[name]
