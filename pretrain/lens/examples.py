"""Texts to look at first, after those of the post, in words of our own."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """only: the columns to show are those of tokens with this text, spaces around it aside; "" shows all."""

    about: str
    text: str
    only: str = ""


EXAMPLES = {
    "rare_word": Example(
        "a rare word comes again: how deep in the model does it stay itself, and is it copied the second time?",
        "The lamp is filled with plasma. A spark turns the gas into plasma, and the plasma glows. When the spark"
        " ends, the plasma",
    ),
    "repetition": Example(
        "extreme repetition: from which layer on is the next word settled?",
        "one two three one two three one two three one two three one two three one two three one two three one two",
    ),
    "commas": Example(
        "the commas of one passage: the same token, and other things to come",
        "In the morning, before the market opened, the baker, who had slept badly, counted the loaves, the rolls, and"
        " the cakes, found one missing, and, since nobody else had a key, looked at the cat, which, as always, looked"
        " away.",
        only=",",
    ),
}
