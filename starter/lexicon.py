"""The word pools that worlds are drawn from. Every entry is one word, so it can be one token."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words("""
    Mara Tobin Elsa Piet Runa Jory Hedda Lukas Nina Oskar Vera Anton Greta Emil Sanna Felix Ida Bruno Tilda
    Marek Alma Yann Lotte Casper Noor Henrik Zita Valdo Petra Ivo Selma Joris Dagny Milo Freya Teun Astrid
    Kaspar Livia Rolf Merle Stig Orla Wim Elke Pavel Suri Anders Beata Quint Ylva Tomas
""")
TOWNS = _words("""
    Alderby Brackwell Corvale Dunmoor Eastfen Farholt Greywick Hollin Ivermouth Juniperton Kelsford Larkham
    Mirefield Northey Oakmere Pellbury Quarrow Redcliff Stonehythe Thornwick
""")
WATERS = _words("lake river canal marsh sea pond creek waterfall")
PRODUCTS = _words("cheese glass honey wool clocks paper cider ropes salt lace")
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
JOBS = _words("baker smith weaver potter sailor farmer doctor mason tailor miller")
TOOLS = _words("oven anvil loom wheel compass plough needle chisel ladder kettle")
BEASTS = _words("pig toad rat goat hen fox otter heron badger mule cat hare")
FOODS = _words("turnips worms barley grass corn berries fish frogs roots oats mice clover")
BEDS = _words("sty ditch cellar shed coop den bank reeds burrow stable attic hedge")
PLACES = _words("mill bridge square chapel harbour school orchard tower")
GOODS = _words("bread candles baskets apples blankets lamps")
FRUITS = _words("pear plum cabbage onion carrot")
OBJECTS = _words("iron drum rug wood dough")
WEATHERS = _words("cold mild windy sunny foggy")
TIMES = _words("morning afternoon evening night")
MOODS = _words("happy calm busy proud tired")
RUDE_ADJECTIVES = _words("rotten stupid filthy useless nasty lazy")
RUDE_NOUNS = _words("fool liar coward")
THREATS = _words("hit kick beat slap crush")
LIKINGS = _words("songs stories games riddles")
