"""The words of pages, and the names of rows, columns, bars and places."""

from __future__ import annotations

_WORDS = """
able above acid across actor after again agree alarm album alone along amber among anchor angle
animal answer apple april arrow artist autumn award basket battle beach beacon bench berry
beyond bitter blanket blossom border bottle branch bread breeze bridge bright broken brother
bucket button cabin camera candle canvas carbon carpet castle cattle celery cellar center chain
chalk change cheese cherry choice circle citizen clever cliff climb cloud coast coffee collar
comet common copper coral corner cotton country cousin cradle cricket crystal curtain custom
daily damage dance danger daring debate decade degree desert design detail dinner doctor dollar
double dragon drawer dream driver during early eastern easy echo edge eight elbow eleven empty
engine enough entire equal escape evening event exact expert fabric factor family famous farmer
father feather fence fiction field figure filter final finger flame flavor flight floor flower
forest forget formal fortune fossil frame freedom fresh friend frozen future galaxy garden
gather gentle giant ginger glass globe golden gossip grain grape gravel green ground guitar
hammer handle harbor harvest hazel heart heavy helmet hidden history hollow honest honey
horizon hotel humble hunter iceberg image income indoor inner insect iron island ivory jacket
jewel journey judge jungle junior kettle kitchen knight ladder lantern large later latin leader
legend lemon letter level light linen liquid little lively local lonely magnet major mango
maple marble margin market meadow medal melody memory method middle minute mirror modern moment
monkey morning mother motor mountain muscle museum music narrow nation native nature needle
nephew nickel noble normal north notice number object ocean office olive onion orange orbit
orchard order origin outdoor oxygen paddle palace panel paper parade parent patient pattern
peach pebble pencil pepper period person piano picnic pilot pirate planet plastic pocket poem
polite pollen pony portal potato powder prairie prince profit public puzzle quarter quick quiet
rabbit radar radio rapid raven reason record region remote rescue ribbon river rocket rough
round royal rubber saddle safety salad salmon sample school season secret senior seven shadow
shelter shore short signal silent silver simple singer sister slender smooth social solid
spider spirit spring square stable station steady stone storm street strong sugar summer
sunset supper surface symbol tablet talent target temple tender theory thread thunder ticket
timber tomato tongue travel treaty triple trumpet tunnel turtle twelve uncle under unique
upper urban useful valley vanilla velvet vessel village violet visit volume voyage wagon walnut
water weather weekend western whale wheat whisper widow wild window winter wisdom wonder wooden
writer yellow young zebra
"""
_NAMES = """
Ada Ben Cora Dan Emma Finn Gina Hugo Iris Jack Kira Leo Mona Nils Olga Paul Rosa Sam Tina Uwe
Vera Walt Yara Zeno
"""
_PLACES = """
Abo Bern Cork Dole Ely Fano Graz Hof Ivry Jena Kiel Lund Metz Nice Oslo Pisa Quito Riga Sion
Turin Ulm Vigo Wels York Zug
"""
_ICONS = """
apple ball banana bee bell bicycle bird book bus cactus car carrot cat clock crown dog drum fish
flower frog guitar hat house key lamp lemon moon mushroom pig pizza rocket shoe snail star tree
turtle
"""
_ORDINALS = """
first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth
fourteenth fifteenth sixteenth
"""

WORDS: tuple[str, ...] = tuple(_WORDS.split())
"""Words of pages, in lower case, of 4 to 8 letters."""

NAMES: tuple[str, ...] = tuple(_NAMES.split())
"""Row names of tables."""

PLACES: tuple[str, ...] = tuple(_PLACES.split())
"""Names of places on maps."""

COLUMNS: tuple[str, ...] = ("age", "cost", "goals", "height", "price", "score", "speed", "weight")
"""Column names of tables."""

SERIES: tuple[str, ...] = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct")
"""Labels of bars and points in charts."""

ICONS: tuple[str, ...] = tuple(_ICONS.split())
"""Names of icons."""

ORDINALS: tuple[str, ...] = tuple(_ORDINALS.split())
"""Ordinal numbers for words and lines."""
