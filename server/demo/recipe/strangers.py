"""Names for things the demo knows nothing about, real and invented, so that a model learns to say so."""

from __future__ import annotations

import random

REAL = (
    "Paris", "London", "Berlin", "Japan", "Africa", "Einstein", "Mozart", "Shakespeare", "Python", "gravity",
    "the capital of France", "the capital of Spain", "the theory of relativity", "quantum physics", "photosynthesis",
    "the president", "the population of China", "football", "the world cup", "bitcoin", "inflation", "democracy",
    "philosophy", "a volcano", "a rocket", "a guitar", "a dragon", "a robot", "a black hole", "the big bang",
    "a neural network", "machine learning", "a database", "a kernel", "a transformer", "an airplane", "an elephant",
    "chocolate", "pizza", "history", "the stock market", "electricity", "a magnet", "a violin", "yoga", "evolution",
)  # fmt: skip
ONSETS = (
    "b",
    "br",
    "c",
    "ch",
    "d",
    "f",
    "fl",
    "g",
    "h",
    "j",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "sh",
    "t",
    "tr",
    "v",
    "z",
)
VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "oo", "ou")
CODAS = ("", "", "", "n", "r", "l", "s", "t", "m", "nd", "ck", "x", "th", "ng")
FRAMES = ("{}", "{}", "{}", "a {}", "the {}", "the {} of {}", "the {} {}", "{} {}")


def invented_word(rng: random.Random) -> str:
    """A word that looks like English and means nothing."""
    word = "".join(rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(rng.choice((1, 2, 2, 3))))
    return word.capitalize() if rng.random() < 0.2 else word


def stranger(rng: random.Random) -> str:
    """A noun phrase that is not among the demo's topics."""
    if rng.random() < 0.35:
        return rng.choice(REAL)
    return rng.choice(FRAMES).format(invented_word(rng), invented_word(rng))
