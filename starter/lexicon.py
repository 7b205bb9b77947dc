"""The word pools that worlds are drawn from. Every entry is one word, so it can be one token."""

NAMES = tuple(
    "Mara Tobin Elsa Piet Runa Jory Hedda Lukas Nina Oskar Vera Anton Greta Emil Sanna Felix Ida Bruno "
    "Tilda Marek Alma Yann Lotte Casper Noor Henrik Zita Valdo Petra Ivo Selma Joris Dagny Milo Freya "
    "Teun Astrid Kaspar Livia Rolf Merle Stig Orla Wim Elke Pavel Suri Anders Beata Quint Ylva Tomas".split()
)
TOWNS = tuple(
    "Alderby Brackwell Corvale Dunmoor Eastfen Farholt Greywick Hollin Ivermouth Juniperton Kelsford "
    "Larkham Mirefield Northey Oakmere Pellbury Quarrow Redcliff Stonehythe Thornwick".split()
)
WATERS = tuple("lake river canal marsh sea pond creek waterfall".split())
PRODUCTS = tuple("cheese glass honey wool clocks paper cider ropes salt lace".split())
DAYS = tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split())
JOBS = tuple("baker smith weaver potter sailor farmer doctor mason tailor miller".split())
TOOLS = tuple("oven anvil loom wheel compass plough needle chisel ladder kettle".split())
BEASTS = tuple("pig toad rat goat hen fox otter heron badger mule cat hare".split())
FOODS = tuple("turnips worms barley grass corn berries fish frogs roots oats mice clover".split())
BEDS = tuple("sty ditch cellar shed coop den bank reeds burrow stable attic hedge".split())
PLACES = tuple("mill bridge square chapel harbour school orchard tower".split())
GOODS = tuple("bread candles baskets apples blankets lamps".split())
FRUITS = tuple("pear plum cabbage onion carrot".split())
OBJECTS = tuple("iron drum rug wood dough".split())
WEATHERS = tuple("cold mild windy sunny foggy".split())
TIMES = tuple("morning afternoon evening night".split())
MOODS = tuple("happy calm busy proud tired".split())
RUDE_ADJECTIVES = tuple("rotten stupid filthy useless nasty lazy".split())
RUDE_NOUNS = tuple("fool liar coward".split())
THREATS = tuple("hit kick beat slap crush".split())
LIKINGS = tuple("songs stories games riddles".split())
