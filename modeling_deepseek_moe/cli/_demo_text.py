"""The demo's own text: encyclopaedia entries, questions, stories and sums, written by a small grammar from a seed.

Invented towns keep their facts from one document to the next, sums are right, and the notes on the model's own
subject are true, so there is more to learn than spelling. A slot ``{name}`` is filled once a document and then kept.
"""

import random
import re

SLOTS = {
    "hero": ["Ada", "Bela", "Cora", "Dilip", "Edda", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Kemal", "Lena"],
    "friend": [
        "Marek",
        "Nadia",
        "Oskar",
        "Petra",
        "Quentin",
        "Rosa",
        "Samir",
        "Tilda",
        "Ugo",
        "Vera",
        "Wanda",
        "Yusuf",
    ],
    "trade": ["baker", "clockmaker", "gardener", "lighthouse keeper", "mapmaker", "miller", "potter", "schoolteacher"],
    "animal": ["grey cat", "black dog", "tame crow", "small goat", "lame fox", "brown hen"],
    "thing": ["a brass key", "a broken compass", "a folded letter", "a glass bead", "a copper bell", "a torn map"],
    "hiding": [
        "under the stairs",
        "behind the stove",
        "in the well house",
        "inside the bell tower",
        "below the bridge",
    ],
    "weather": ["bright", "foggy", "windy", "rainy", "frosty", "warm"],
    "season": ["spring", "summer", "autumn", "winter"],
    "weekday": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
    "meal": ["bread and cheese", "pea soup", "baked apples", "salted fish", "barley stew", "plum cake"],
    "goods": ["apples", "candles", "eggs", "lanterns", "loaves", "nails", "pears", "ropes", "spoons", "tiles"],
    "box": ["baskets", "boxes", "crates", "sacks", "trays"],
    "mood": ["glad", "tired", "proud", "curious", "calm", "uneasy"],
    "lesson": [
        "a small thing kept safe is worth more than a large thing lost",
        "the longest road is shorter with company",
        "a question asked in time saves a day of work",
        "what is shared is not used up",
        "patience finds what haste walks past",
    ],
}

# A story takes one line from each step.
STORY = (
    (
        "One {weather} morning in {season}, {hero} the {trade} set out from {town} with a {animal}.",
        "On a {weather} {weekday}, a {trade} named {hero} came home to {town}, and a {animal} came along.",
        "{hero} had been a {trade} in {town} for many years, with only a {animal} for company.",
    ),
    (
        "Beside the {river} {hero} found {thing}, wet with rain and plainly lost.",
        "{hero} looked {hiding} and found {thing} that nobody had asked for.",
        "In the market somebody had left {thing}, and {hero} picked it up.",
    ),
    (
        '"Whose is this?" asked {hero}. Nobody in {town} knew.',
        '"I have seen that before," said {friend}, "but I cannot say where."',
        "{hero} showed it to {friend}, who turned it over twice and said nothing.",
    ),
    (
        "So the two of them walked along the {river} until the lamps of {town} were small behind them.",
        "They asked at every door from the bridge to {landmark}, and at every door they heard no.",
        "{friend} wanted to wait for {weekday}, but {hero} would not wait.",
    ),
    (
        'At last, close to {landmark}, an old woman laughed. "That was my mother\'s," she said.',
        "At {landmark} they met a boy who had been looking for it since {season}.",
        "By evening they had learned that it belonged to the keeper of {landmark}.",
    ),
    (
        "They were thanked and given {meal}, and {hero} was {mood} all the way home.",
        "They ate {meal} together, and {friend} was {mood} and talked until midnight.",
        "There was {meal} for everybody, even for the {animal}.",
    ),
    (
        "In {town} they still say that {lesson}.",
        '"You see," said {friend}, "{lesson}."',
        "And {hero} wrote above the door: {lesson}.",
    ),
)

ENTRY = (
    (
        "{town} is a town of {people} people on the river {river}.",
        "{town} lies on the {river} and has {people} people.",
    ),
    ("It was founded in the year {year}.", "The town was founded in {year}."),
    ("It is known for its {product}.", "Its {product} are sold in every market along the {river}."),
    ("Travellers come to see {landmark}.", "Its best known sight is {landmark}."),
    ("The market is held on {weekday}.", "People there like to eat {meal}."),
)

ASKED = (
    ("On which river does {town} lie?", "{town} lies on the {river}."),
    ("How many people live in {town}?", "{people} people live in {town}."),
    ("When was {town} founded?", "{town} was founded in the year {year}."),
    ("What is {town} known for?", "{town} is known for its {product}."),
    ("What do travellers come to see in {town}?", "In {town} travellers come to see {landmark}."),
    ("When is the market held in {town}?", "In {town} the market is held on {weekday}."),
)

SUMS = (
    (
        "{hero} has {a} {goods} and buys {b} more. How many {goods} does {hero} have now?",
        "{a} + {b} = {sum}. {hero} has {sum} {goods}.",
    ),
    (
        "There were {sum} {goods} in the shop, and {hero} sold {b} of them. How many are left?",
        "{sum} − {b} = {a}. There are {a} {goods} left.",
    ),
    (
        "{hero} fills {m} {box} with {n} {goods} each. How many {goods} is that in all?",
        "{m} × {n} = {product_mn}. That is {product_mn} {goods}.",
    ),
    (
        "{hero} and {friend} carry {m} {box} of {n} {goods}, and {a} loose ones. How many {goods} do they carry?",
        "{m} × {n} = {product_mn}, and {product_mn} + {a} = {total}. They carry {total} {goods}.",
    ),
)

# A note takes three or four lines of one topic, in order.
NOTES = {
    "a mixture of experts": (
        "A mixture of experts replaces one wide feed-forward layer by many narrow ones, called experts.",
        "For every token a router picks a few experts, and only those are computed.",
        "So the model can hold many parameters while each token pays for a few of them.",
        "A shared expert sees every token and learns what all of them need.",
        "The results of the chosen experts are weighted by the router and added up.",
    ),
    "the router": (
        "The router is a small matrix that gives each expert a score.",
        "In the third version of the model the score is a sigmoid, not a softmax.",
        "A bias is added to the scores when experts are picked, but not when their results are weighed.",
        "When an expert is used too often its bias goes down, and when it is used too little its bias goes up.",
        "The experts are split into groups, and a token looks for experts in the best groups only.",
    ),
    "latent attention": (
        "Latent attention keeps one short vector for each token instead of the keys and values of every head.",
        "That vector is called the latent, and the cache holds nothing else but a small rotated key.",
        "Keys and values can be expanded from the latent when they are needed.",
        "For one new token it is cheaper not to expand them: the matrix that would do it is folded into the query.",
        "Both ways give the same result, and the model picks the one that costs less.",
    ),
    "eight-bit weights": (
        "An eight-bit number has one sign, four bits of exponent and three bits of fraction.",
        "It takes one byte, half of what a sixteen-bit number takes.",
        "Each block of weights, 128 rows by 128 columns, shares one scale.",
        "A weight is its eight-bit code times the scale of its block.",
        "The error of a weight is at most one part in sixteen, and most of these errors cancel in a sum.",
    ),
    "rotary positions": (
        "A rotary embedding turns pairs of numbers by an angle that grows with the position of the token.",
        "The product of two turned vectors depends only on the distance between them.",
        "Fast pairs tell near tokens apart, and slow pairs tell far ones apart.",
        "To read longer texts than it was trained on, a model slows the slow pairs down.",
    ),
    "training": (
        "A language model is trained to guess the next token of a text.",
        "The loss is the surprise at the token that really came, averaged over the text.",
        "Perplexity is the exponential of the loss: the number of choices the model still sees.",
        "After each step the weights move a little in the direction that lowers the loss.",
        "A text that was not used for training shows whether the model has learned or only remembered.",
    ),
}

TOWN_STARTS = ["Al", "Bran", "Cor", "Dun", "Eld", "Fen", "Gor", "Hal", "Ist", "Kel", "Lom", "Mar"]
TOWN_ENDS = ["den", "ford", "wick", "mere"]
RIVERS = ["Orra", "Tessel", "Vane", "Lyth", "Brisk", "Ember"]
PRODUCTS = ["bells", "blue tiles", "boats", "clocks", "honey cakes", "maps", "wool coats", "paper kites"]
LANDMARKS = ["the stone bridge", "the old mill", "the white tower", "the glass house", "the salt gate", "the lock"]


class _Writer:
    def __init__(self, seed: int):
        self.random = random.Random(seed).random  # the one method that gives the same numbers in every Python
        self.towns = [
            {
                "town": start + end,
                "river": self.pick(RIVERS),
                "people": str(self.between(3, 90) * 100),
                "year": str(self.between(900, 1800)),
                "product": self.pick(PRODUCTS),
                "landmark": self.pick(LANDMARKS),
                "weekday": self.pick(SLOTS["weekday"]),
                "meal": self.pick(SLOTS["meal"]),
            }
            for start in TOWN_STARTS
            for end in TOWN_ENDS
        ]

    def between(self, low: int, high: int) -> int:
        return low + int(self.random() * (high - low + 1))

    def pick(self, options):
        return options[self.between(0, len(options) - 1)]

    def fill(self, text: str, given: dict[str, str]) -> str:
        def slot(match: re.Match) -> str:
            if match[1] not in given:
                given[match[1]] = self.pick(SLOTS[match[1]])
            return given[match[1]]

        return re.sub(r"\{(\w+)\}", slot, text)

    def story(self) -> str:
        given = dict(self.pick(self.towns))
        return " ".join(self.fill(self.pick(step), given) for step in STORY)

    def entry(self) -> str:
        given = dict(self.pick(self.towns))
        return " ".join(self.fill(self.pick(step), given) for step in ENTRY)

    def question(self) -> str:
        question, answer = self.pick(ASKED)
        given = dict(self.pick(self.towns))
        return f"Question: {self.fill(question, given)}\nAnswer: {self.fill(answer, given)}"

    def sum(self) -> str:
        a, b, m, n = self.between(2, 60), self.between(2, 30), self.between(2, 9), self.between(2, 9)
        numbers = {"a": a, "b": b, "sum": a + b, "m": m, "n": n, "product_mn": m * n, "total": m * n + a}
        given = {name: str(number) for name, number in numbers.items()}
        question, answer = self.pick(SUMS)
        return f"Question: {self.fill(question, given)}\nAnswer: {self.fill(answer, given)}"

    def note(self) -> str:
        topic = self.pick(list(NOTES))
        lines = list(NOTES[topic])
        while len(lines) > 3 and self.random() < 0.7:
            lines.pop(self.between(0, len(lines) - 1))
        return f"A note on {topic}. {' '.join(lines)}"


def write_corpus(seed: int = 0, size: int = 600_000) -> str:
    """At least ``size`` characters of documents with a blank line between any two: the same text for the same seed."""
    writer = _Writer(seed)
    kinds = (writer.story, writer.story, writer.entry, writer.question, writer.sum, writer.sum, writer.note)
    documents, length = [], 0
    while length < size:
        documents.append(writer.pick(kinds)())
        length += len(documents[-1]) + 2
    return "\n\n".join(documents) + "\n"
