"""Word lists of the notebook corpus.

``names.txt`` beside this file holds the first names, ``words.txt`` 2,048 English words: the list
of BIP 39, from the package mnemonic (MIT).
"""

from pathlib import Path

NAMES, WORDS = (
    Path(__file__).with_name(f"{name}.txt").read_text(encoding="utf-8").split()
    for name in ("names", "words")
)

# What a person can have, by the kind of the value.
ATTRIBUTES = {
    "number": "locker room seat desk code badge ticket phone gate shelf box page flight table key "
    "card pin lane floor extension bed cabin order platform bus account meter parcel invoice "
    "license",
    "label": "gate seat row locker room shelf platform dock berth stall bay",
    "time": "train meeting dentist lesson call bus ferry flight",
    "color": "car bike coat door umbrella hat bag tent kite scarf boat mug chair folder lamp",
    "city": "city office hotel school home shop",
    "item": "pet gift lunch prize",
    "word": "password codeword secret motto",
    "person": "boss doctor teacher partner driver",
}
ATTRIBUTES = {kind: words.split() for kind, words in ATTRIBUTES.items()}

COLORS = (
    "red blue green black white yellow purple orange brown pink gray silver gold violet cream"
).split()
CITIES = (
    "Paris Tokyo Cairo Lima Oslo Rome Delhi Quito Berlin Lagos Madrid Vienna Dublin Athens "
    "Prague Boston Seoul Sydney Nairobi Havana Lisbon Warsaw Toronto Geneva Milan"
).split()
ITEMS = (
    "cat dog horse rabbit parrot turtle goat fish clock book ring map soup bread apple cheese "
    "rice cake pizza salad lamp guitar drum knife bottle"
).split()

# Things that have a number of their own: "the north garage".
PLACES = (
    "garage cellar attic gate safe shed kitchen library tower barn studio garden tent boat van "
    "truck office lab hall pool"
).split()
ADJECTIVES = "north south east west old new big small main back front upper lower".split()
THINGS = (
    "router wifi car bike house laptop printer server alarm door bag suitcase dishwasher camera "
    "piano heater freezer company bank club hotel meeting party project school cat dog bakery"
).split()
NUMBERED = "room locker house box bus flight apartment Room Box Gate".split()
PLACE_ATTRIBUTES = "code key pin phone alarm number extension".split()

# Attributes that any value fits, and things too.
FREE_ATTRIBUTES = (
    "code password pin key number address birthday name date price size model plate color login "
    "email nickname username phone appointment account id serial weight height age job team song "
    "country language hobby capital owner time day deadline budget version word sign"
).split()

# Prose between the notes: a subject, what it did, and often a circumstance.
SUBJECTS = (
    "The weather|A light rain|The old clock|Somebody|The neighbour|A small dog|The coffee|"
    "The morning train|Nobody|The team|A tall man|The soup|The paper|The river|The market|"
    "My sister|Two children|The teacher|A young woman|The driver|The cook|Our guests|"
    "The first bus|A letter|The radio|The moon|The printer|The new plan|The garden|"
    "A friend from work|The shop|They|We|She|He|I|It|The long list|Everyone"
).split("|")
VERBS = (
    "was quiet|came late|stayed near the bridge|looked at the window|moved slowly|"
    "made a strange noise|seemed fine|waited outside|was cold again|ran past the mill|"
    "did not mind|turned around|was there all day|asked for more time|found a better way|"
    "bought some bread|forgot the umbrella|talked about the trip|needed a new battery|"
    "closed early|wrote a short answer|liked the idea|had to start again|missed the last train|"
    "sat down and read|opened the door|took the stairs|smiled|was easy to find|cost too much|"
    "went home|fell on the floor|called twice|looked almost new|will be ready soon"
).split("|")
CIRCUMSTANCES = (
    "before lunch|after the storm|for a while|in the evening|as usual|near the station|"
    "with no reason|until nine|on the hill|and then left|during the break|all summer|at home|"
    "last week|on Monday|because of the rain|without a word|next to the school|in the kitchen|"
    "for the third time|from the other side|with a smile|early in the morning|this time|"
    "and nobody knew why"
).split("|")
COUNTED = [
    "There were {} people there",
    "It took {} days",
    "We counted {} of them",
    "{} steps lead down",
    "Page {} is missing",
]
COMMON = (
    "the a of and to in is was it that for on with as at by this but not are from or have an "
    "they which one you were all her she there would their we him been has when who will no "
    "more if out so up said what its about than into them can only other time new some could "
    "these two may first then do any like my now over such our man me even most made after "
    "also did many off before must well back through years where much your way down should "
    "because long each just state those people too mr how little good world make very year "
    "still see own work men day get here old between both life being under three never know "
    "same last another while us might great go come since against right came take used himself "
    "few house use place during high without again home around small however found part school "
    "thought went say general once upon war every does got united left number course until "
    "always away something fact water less public put think almost hand enough far took head "
    "yet better set told nothing night end why find going look point knew next city give group "
    "toward young let room side social given present order often turn morning window table "
    "paper door letter music garden winter summer river stone bridge market money story answer "
    "question voice light glass field road train station island forest mountain color sound "
    "picture doctor teacher family mother father brother sister child friend company office "
    "letter hour minute week month spring north south east west blue green red white black "
    "silver gold orange apple coffee sugar butter dinner lunch kitchen chair wall floor roof "
    "corner street bottle"
).split()

# Value words for "The password of Maria is …": one of these, or any item or color.
PASSWORDS = sorted({w for w in COMMON if len(w) >= 5} | set(ITEMS) | set(COLORS))

# Ordinary words of at most 10 letters that training never shows, and the list has not: what a user
# is likely to write down.
ORDINARY = (
    "swordfish butterfly sunflower blueberry waterfall moonlight rainbow starfish pineapple "
    "strawberry lighthouse snowflake dragonfly goldfish jellyfish keyboard notebook backpack "
    "firewall sandstorm hurricane peppermint chocolate vanilla espresso penguin octopus "
    "superman sunshine princess football baseball freedom whatever ninja mustang cupcake "
    "raspberry watermelon toothbrush bookshelf armchair asparagus bathtub bedroom birthday "
    "bookcase breakfast candle cathedral cheesecake crocodile cucumber daffodil doorbell "
    "earthquake eggplant fireplace flamingo flashlight footprint fountain grapefruit "
    "greenhouse honeymoon horseshoe icecream jukebox ladybird lavender lemonade necklace "
    "newspaper nightmare overcoat pancake paperclip passport peacock pillow porcupine "
    "postcard quicksand raincoat rosemary sailboat sandwich scarecrow seahorse skateboard "
    "spaceship spaghetti submarine teapot telescope toadstool tulip turquoise typewriter "
    "wallpaper wardrobe windmill woodpecker yesterday zeppelin"
).split()
