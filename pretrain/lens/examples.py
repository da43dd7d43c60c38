"""Example prompts, after those of the post, in our own words."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """A prompt. only: show only positions whose token has this text, without its spaces; "" shows all."""

    about: str
    text: str
    only: str = ""


EXAMPLES = {
    "rare_word": Example(
        "a rare word repeats: up to which layer is it preserved, and is it copied the second time?",
        "The lamp is filled with plasma. A spark turns the gas into plasma, and the plasma glows. When the spark"
        " ends, the plasma",
    ),
    "repetition": Example(
        "extreme repetition: from which layer on is the guess settled?",
        "one two three one two three one two three one two three one two three one two three one two three one two",
    ),
    "commas": Example(
        "the commas of one passage: the same token before different words",
        "In the morning, before the market opened, the baker, who had slept badly, counted the loaves, the rolls, and"
        " the cakes, found one missing, and, since nobody else had a key, looked at the cat, which, as always, looked"
        " away.",
        only=",",
    ),
}
