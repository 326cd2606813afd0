r"""Ways to say COCO's eighty categories, and which words of an answer name one.

CHAIR asks so (Rohrbach et al., Object hallucination in image captioning, 2018). The list is ours,
in the manner of theirs, so figures are near to theirs and not the same. Plurals are found by the
lemmatizer, and the longest name wins: a "hot dog" is no dog.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from captum_dcam.model.tagging import tag
from captum_dcam.model.words import match_words_to_masks

_SAID = """
person: man woman boy girl child kid baby toddler guy lady adult human people men women children
  player skier snowboarder surfer skateboarder rider cyclist driver pedestrian worker
  chef waiter officer policeman passenger spectator tourist gentleman couple crowd umpire batter
  pitcher catcher
bicycle: bike
car: automobile sedan minivan suv taxi cab hatchback
motorcycle: motorbike moped scooter
airplane: plane aeroplane jet aircraft airliner
bus: minibus trolleybus
train: locomotive tram streetcar
truck: pickup lorry firetruck
boat: ship canoe kayak sailboat ferry yacht rowboat raft gondola
traffic light: stoplight
fire hydrant: hydrant
stop sign:
parking meter:
bench: pew
bird: pigeon seagull gull duck goose owl parrot sparrow eagle peacock swan rooster hen chicken
  ostrich pelican
cat: kitten kitty
dog: puppy pup
horse: pony foal colt
sheep: lamb ram ewe
cow: cattle calf bull ox steer
elephant:
bear: panda cub
zebra:
giraffe:
backpack: rucksack knapsack
umbrella: parasol
handbag: purse
tie: necktie
suitcase: luggage
frisbee:
skis: ski
snowboard:
sports ball: ball baseball basketball football
kite:
baseball bat: bat
baseball glove: glove mitt
skateboard:
surfboard:
tennis racket: racket racquet
bottle:
wine glass: wineglass
cup: mug
fork:
knife:
spoon:
bowl:
banana:
apple:
sandwich: burger hamburger cheeseburger sub
orange: tangerine clementine
broccoli:
carrot:
hot dog: hotdog
pizza:
donut: doughnut
cake: cupcake cheesecake
chair: stool armchair
couch: sofa loveseat
potted plant: houseplant
bed: bunk
dining table: table
toilet: urinal
tv: television
laptop: notebook
mouse:
remote: remote-control
keyboard:
cell phone: cellphone smartphone phone telephone
microwave:
oven: stove
toaster:
sink: basin
refrigerator: fridge freezer
book: novel
clock:
vase:
scissors:
teddy bear: teddy
hair drier: hairdryer
toothbrush:
"""
#: names of several words that hold a category's name and are none of it
_OTHERS = ("bow tie", "bat mobile", "train track", "train station", "bus stop", "bus station")


def _table() -> dict[str, str]:
    """A way to say it → the category."""
    whole = re.sub(r"\n  +", " ", _SAID).strip()
    lines = (line.partition(":") for line in whole.splitlines())
    return {one: category for category, _, said in lines for one in (category, *said.split())}


#: a way to say it → the category
CATEGORY_OF = _table()


def named_categories(text: str) -> list[tuple[int, int, str]]:
    r"""The categories that a text names.

    Returns:
        list: (start, stop, category) of every name, in order; characters of the text.
    """
    words = list(re.finditer(r"[\w-]+", text))
    texts = [word[0] for word in words]
    names = [*CATEGORY_OF, *_OTHERS]
    heads = {name.split()[-1] for name in names if " " in name}
    # a word that ends a name of several is a noun, whatever the tagger says ("hot dog")
    ends = [{t.lower(), t.lower().removesuffix("s")} & heads for t in texts]
    tags = ["NN" if end else own for end, own in zip(ends, tag(texts), strict=True)]
    found = match_words_to_masks(texts, tags, names).matches
    return [
        (words[m.words[0]].start(), words[m.words[-1]].end(), CATEGORY_OF[m.name])
        for m in found
        if m.name in CATEGORY_OF
    ]


def categories_in(texts: Iterable[str]) -> Collection[str]:
    """The categories that some texts name."""
    return {category for text in texts for _, _, category in named_categories(text)}
