"""Words that the prompt families are filled with; each family keeps those that its tokenizer can use.

>>> len(set(NAMES)) == len(NAMES), "France" in CITIES
(True, True)

Sharp edges: English, and chosen for being one token in many vocabularies, not for standing for anything.

Source: interp_jax.
"""

from __future__ import annotations

NAMES = (
    *("Adam", "Alex", "Alice", "Amy", "Andrew", "Anna", "Anne", "Anthony", "Ben", "Brian", "Carl", "Charles", "Chris"),
    *("Claire", "Daniel", "David", "Edward", "Elizabeth", "Emily", "Emma", "Eric", "Frank", "George", "Grace", "Henry"),
    *("Jack", "Jacob", "James", "Jane", "Jason", "Jim", "Joe", "John", "Joseph", "Julia", "Kate", "Kevin", "Laura"),
    *(
        "Lisa",
        "Louis",
        "Lucy",
        "Maria",
        "Mark",
        "Martin",
        "Mary",
        "Matthew",
        "Max",
        "Michael",
        "Mike",
        "Nick",
        "Oliver",
    ),
    *("Paul", "Peter", "Rachel", "Richard", "Robert", "Rose", "Ryan", "Sam", "Sarah", "Scott", "Simon", "Sophie"),
    *("Stephen", "Steve", "Susan", "Thomas", "Tim", "Tom", "Tony", "Victoria", "Walter", "William"),
)
PLACES = ("bank", "beach", "farm", "garden", "hospital", "hotel", "library", "market", "museum", "office", "park")
PLACES += ("restaurant", "school", "station", "store", "theater")
OBJECTS = ("apple", "bag", "ball", "basket", "book", "bottle", "box", "camera", "card", "coat", "coin", "cup", "gift")
OBJECTS += ("hat", "key", "lamp", "letter", "map", "paper", "pen", "phone", "ring", "ticket", "watch")

CITIES = {
    "Australia": ("Sydney", "Melbourne", "Brisbane", "Perth"),
    "Austria": ("Vienna", "Graz", "Salzburg", "Linz"),
    "Brazil": ("Brasilia", "Salvador", "Recife", "Fortaleza"),
    "Canada": ("Toronto", "Ottawa", "Montreal", "Vancouver"),
    "China": ("Beijing", "Shanghai", "Wuhan", "Nanjing"),
    "Egypt": ("Cairo", "Alexandria", "Luxor", "Aswan"),
    "England": ("London", "Manchester", "Liverpool", "Leeds"),
    "France": ("Paris", "Lyon", "Marseille", "Bordeaux", "Nice"),
    "Germany": ("Berlin", "Munich", "Hamburg", "Frankfurt", "Dresden"),
    "Greece": ("Athens", "Patras", "Corinth", "Sparta"),
    "India": ("Delhi", "Mumbai", "Chennai", "Pune"),
    "Iran": ("Tehran", "Isfahan", "Shiraz", "Tabriz"),
    "Ireland": ("Dublin", "Cork", "Galway", "Limerick"),
    "Italy": ("Rome", "Milan", "Venice", "Florence", "Naples"),
    "Japan": ("Tokyo", "Osaka", "Kyoto", "Nagoya"),
    "Mexico": ("Monterrey", "Tijuana", "Oaxaca", "Cancun"),
    "Norway": ("Oslo", "Bergen", "Trondheim", "Stavanger"),
    "Poland": ("Warsaw", "Krakow", "Gdansk", "Lublin"),
    "Portugal": ("Lisbon", "Porto", "Braga", "Coimbra"),
    "Russia": ("Moscow", "Kazan", "Omsk", "Samara"),
    "Scotland": ("Edinburgh", "Glasgow", "Aberdeen", "Dundee"),
    "Spain": ("Madrid", "Barcelona", "Seville", "Valencia", "Granada"),
    "Sweden": ("Stockholm", "Gothenburg", "Uppsala", "Lund"),
    "Turkey": ("Istanbul", "Ankara", "Izmir", "Antalya"),
}

EVENTS = (
    "war",
    "voyage",
    "reign",
    "strike",
    "project",
    "expedition",
    "campaign",
    "siege",
    "famine",
    "journey",
    "trial",
)

# By the article they take.
NOUNS = {
    "a": ("ball", "banana", "bird", "boat", "book", "cat", "chair", "cup", "dog", "door", "fish", "flower", "garden"),
    "an": ("ant", "apple", "arm", "arrow", "eagle", "ear", "egg", "elephant", "engine", "island", "onion", "orange"),
}
NOUNS["a"] += ("hat", "horse", "king", "lemon", "letter", "lion", "map", "pear", "pen", "road", "ship", "table", "tree")
NOUNS["an"] += ("apron", "axe", "elbow", "icon", "inn", "insect", "oak", "ocean", "olive", "organ", "oven", "owl")

# Of these random sentences are made.
ADJECTIVES = (
    "old",
    "small",
    "quiet",
    "bright",
    "heavy",
    "green",
    "famous",
    "empty",
    "narrow",
    "gentle",
    "broken",
    "tall",
)
VERBS = ("watched", "followed", "found", "carried", "painted", "visited", "forgot", "repaired", "described", "sold")
TIMES = (
    "in the morning",
    "after the storm",
    "before winter",
    "on Sunday",
    "many years ago",
    "during the night",
    "at noon",
)
