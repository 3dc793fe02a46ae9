"""Sentences, names and words of the questions: two splits that share none of them.

Whoever trains on "train" measures with "test".
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Pattern:
    """How a fact is written, asked for, and how its answer begins; the value follows after a blank.

    {a} stands for an attribute, {n} for a name, {v} for a value.
    """

    fact: str
    question: str
    begin: str


@dataclass(frozen=True)
class Split:
    """What texts are made of.

    names: whom facts are about. words: values, and what is counted. attributes, word_attributes:
    what a pattern's {a} is, where it has one. digits, word: facts with one value a name; values:
    with several. assign, copy, holding: of variables, which `letters` name. listed, counted: of
    common words. subjects, verbs, circumstances: of sentences between the facts.
    """

    names: list[str]
    words: list[str]
    attributes: list[str]
    word_attributes: list[str]
    digits: list[Pattern]
    word: list[Pattern]
    values: Pattern
    assign: str
    copy: str
    holding: Pattern
    letters: str
    listed: str
    counted: Pattern
    subjects: list[str]
    verbs: list[str]
    circumstances: list[str]


_THE = Pattern("The {a} of {n} is {v}.", "What is the {a} of {n}?", "The {a} of {n} is")

TEST = Split(
    names="Maria James Olivia Peter Sofia Daniel Laura Victor Emma Lucas Nina Oscar Paula Simon "
    "Clara Felix Ruth Hugo Alice Martin Julia Robert Diana Thomas Helen Bruno Irene Samuel Grace "
    "Leo Anna Paul Eva David Sarah Frank Linda George Rosa Henry Carla Adam Vera Ivan Lucy Mark "
    "Ellen Jack Nora Louis Tanya Brian Marta Kevin".split(),
    words="anchor basket candle dragon engine feather hammer island jacket kettle ladder mirror "
    "needle orange pencil quarter ribbon saddle turtle violin walnut balloon carpet diamond eagle "
    "falcon guitar helmet insect jungle kitten lemon magnet napkin oyster parrot rabbit salmon "
    "tomato umbrella valley whale yogurt bottle camera dolphin elbow forest garlic honey ivory "
    "jewel knife lizard marble noodle onion pepper rocket sponge tunnel velvet window zebra "
    "branch cherry desert button finger planet oven temple silver thunder wagon wizard arrow "
    "barrel copper donkey".split(),
    attributes="code badge locker ticket gate desk phone box key seat room shelf".split(),
    word_attributes="password codeword secret motto".split(),
    digits=[_THE],
    word=[_THE],
    values=Pattern(
        "One of the numbers of {n} is {v}.",
        "Which are the numbers of {n}, in the order of the text?",
        "The numbers of {n}, in the order of the text, are",
    ),
    assign="VAR {n} = {v}",
    copy="VAR {n} = VAR {v}",
    holding=Pattern("", "Which variables are equal to {v}?", "The variables equal to {v} are"),
    letters="BCDFGHJKLM",
    listed="Words: {v}.",
    counted=Pattern(
        "",
        "Which three words come most often in the list, the most frequent first?",
        "The three words that come most often in the list, the most frequent first, are",
    ),
    subjects="The weather|A light rain|The old clock|Somebody|The neighbour|A small dog|The "
    "coffee|The morning train|The soup|The river|The market|Two children|The cook|The first bus|"
    "The radio|The garden|A tall man|The letter|The moon|The team".split("|"),
    verbs="was quiet|came late|stayed near the bridge|moved slowly|made a strange noise|seemed "
    "fine|waited outside|was cold again|ran past the mill|turned around|was there all day|looked "
    "almost new|went home|fell on the floor|will be ready soon|could not be seen".split("|"),
    circumstances="before lunch|after the storm|for a while|in the evening|as usual|near the "
    "station|until nine|on the hill|during the break|all summer|last week|on Monday|in the "
    "kitchen|for the third time|from the other side|early in the morning".split("|"),
)

TRAIN = Split(
    names="Aaron Beatrice Cedric Dolores Edgar Fiona Gavin Harriet Isaac Janet Karl Lydia Miles "
    "Nadine Otto Philippa Quentin Ramona Stefan Teresa Ulrich Viola Walter Xenia Yusuf Zelda "
    "Arthur Bianca Conrad Dorothy Ernest Flora Gilbert Hannah Igor Josephine Kenneth Lorena "
    "Magnus Naomi Orlando Priscilla Reuben Sylvia Trevor Ursula Vincent Wanda Boston Cairo "
    "Geneva Havana Lagos Milan Oslo Prague Seoul Tokyo Vienna Zurich".split(),
    words="acorn bamboo cactus dagger ember fossil goblet harbor icicle jigsaw kayak lantern "
    "meadow nectar otter pebble quilt raven scarf trumpet urchin vessel willow yacht almond "
    "beacon cobweb dynamo easel fiddle gravel hermit igloo juniper kernel locket mammoth nutmeg "
    "orchid pigeon quarry radish satin teapot unicorn vinegar wreath biscuit canyon dove "
    "emerald flute glacier hazel ink jasmine koala lobster maple nickel oasis plum raft shovel "
    "tulip vulture whistle cradle drum envelope fern goose hinge iris jelly kiwi lark mitten "
    "nest opal".split(),
    attributes="account extension invoice parcel meter bus flight order".split(),
    word_attributes="nickname answer colour team".split(),
    digits=[
        Pattern("{n}'s {a}: {v}", "{n}'s {a}?", "{n}'s {a}:"),
        Pattern(
            "Note that room {v} was assigned to {n}.",
            "Which room was assigned to {n}?",
            "As noted, the room assigned to {n} was room",
        ),
        Pattern("key[{n}] = {v}", "Print key[{n}].", "key[{n}] ="),
        Pattern(
            "Please remember that {n} lives at {v} Oak Street.",
            "Where in Oak Street does {n} live?",
            "As stated above, {n} lives at",
        ),
        Pattern(
            "In order to reach the office, {n} dialled {v} twice.",
            "What did {n} dial in order to reach the office?",
            "In order to reach the office, {n} dialled",
        ),
        Pattern("({n}: ref. {v})", "Which reference has {n}?", "({n}: ref."),
        Pattern(
            "Together with its box, what {n} sent weighs {v} grams.",
            "How many grams weighs what {n} sent?",
            "Together with its box, what {n} sent weighs",
        ),
        Pattern("| {n} | {a} | {v} |", "The row of {n}?", "| {n} | {a} |"),
    ],
    word=[
        Pattern("{n}'s {a}: {v}", "{n}'s {a}?", "{n}'s {a}:"),
        Pattern(
            "When they asked {n}, the reply was {v}.",
            "What was the reply of {n}?",
            "When they asked {n}, the reply was",
        ),
        Pattern("label[{n}] = {v}", "Print label[{n}].", "label[{n}] ="),
        Pattern(
            "On the door of {n} somebody had painted a {v}.",
            "What was painted on the door of {n}?",
            "On the door of {n} somebody had painted a",
        ),
    ],
    values=Pattern(
        "At the lottery {n} drew {v}.",
        "What did {n} draw at the lottery, from first to last?",
        "At the lottery {n} drew, from first to last,",
    ),
    assign="let {n} be {v};",
    copy="let {n} be the same as {v};",
    holding=Pattern("", "Who holds {v}?", "{v} is held by"),
    letters="QRSTVWXYZP",
    listed="Inventory: {v}.",
    counted=Pattern("", "The top three of the inventory?", "The top three of the inventory:"),
    subjects="Every visitor|The carpenter|An empty chair|The committee|One of the lamps|The "
    "ferry|Their cousin|The museum|A black cat|The engine|This road|The choir|Our landlord|The "
    "harvest|An engineer|The library|Most of them|A heavy door".split("|"),
    verbs="needed more paint|was sold at once|kept everybody awake|arrived by bicycle|changed "
    "colour|was closed for repairs|had little to say|smelled of smoke|won a small prize|was "
    "seldom mentioned|lost its way|broke down|stood in the shade|grew quickly|paid for the "
    "damage|did not answer".split("|"),
    circumstances="since the war|by accident|in spite of the heat|under the arch|at midnight|for "
    "no money|with great care|across the square|on a Sunday|without any doubt|behind the "
    "church|every winter|once more|next to a fountain|since March|by the sea".split("|"),
)

SPLITS = {"test": TEST, "train": TRAIN}
