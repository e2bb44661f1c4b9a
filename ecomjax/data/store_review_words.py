"""How the customers of the synthetic shop write reviews; each split has sentences of its own."""

from __future__ import annotations

TITLES: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "liked": ("Glad I bought it", "Would buy again", "Thumbs up", "Happy with this"),
        "mixed": ("Good and bad", "It depends", "So so"),
        "disliked": ("Stay away", "Not again", "Sent it back", "Disappointed"),
    },
    "validation": {
        "liked": ("A find", "Five stars from me"),
        "mixed": ("Could go either way",),
        "disliked": ("Regret it", "Look elsewhere"),
    },
    "test": {
        "liked": ("Exactly what we needed", "Delighted", "Great choice"),
        "mixed": ("Neither here nor there", "Torn"),
        "disliked": ("What a shame", "Save your money", "Never more"),
    },
}
"""Review titles, by whether the rating is above, at or below 3."""

OPENERS: dict[str, tuple[str, ...]] = {
    "train": (
        "Bought the {brand} {type} in spring.",
        "We have used the {brand} {type} for half a year.",
        "Got the {brand} {type} as a present.",
        "Here is what I think of the {type} from {brand}.",
        "This is about the {brand} {type} I ordered last month.",
        "My sister talked me into the {brand} {type}.",
    ),
    "validation": (
        "A colleague told me to try the {brand} {type}.",
        "I looked at many before I chose the {brand} {type}.",
        "In june the {brand} {type} came into our house.",
    ),
    "test": (
        "My old one broke, hence the {type} by {brand}.",
        "For weeks now we live with the {brand} {type}.",
        "I am on my second purchase of the {brand} {type}.",
        "Yesterday I unpacked the {brand} {type}.",
    ),
}
"""First sentences of reviews."""

FRAMES: dict[str, tuple[str, ...]] = {
    "train": (
        "To me, {}.",
        "I can say that {}.",
        "All in all, {}.",
        "Honestly, {}.",
        "For our part, {}.",
        "I noticed that {}.",
    ),
    "validation": ("Let me add that {}.", "As far as I can tell, {}.", "In our case {}."),
    "test": (
        "My view is that {}.",
        "It has to be mentioned that {}.",
        "Over time I found that {}.",
        "No doubt about it: {}.",
    ),
}
"""Sentences around a judgement."""

ASIDES: dict[str, tuple[str, ...]] = {
    "train": (
        "I cannot judge the {} yet.",
        "Others write about the {}.",
        "I was asked about the {}.",
    ),
    "validation": ("Nothing to report on the {}.", "Do not ask me about the {}."),
    "test": ("On the {} I have no opinion.", "My brother wondered about the {}."),
}
"""Sentences that name an aspect and do not judge it."""

FORMS: dict[str, tuple[str, str]] = {
    "liked": ("{type} worth buying for {good}", ", despite {bad}"),
    "disliked": ("{type} to avoid because of {bad}", ", despite {good}"),
    "mixed": ("{type} with {good} on one side and {bad} on the other", ""),
}
"""Verdicts, by whether more is good than bad, and what is added where there is some of both."""
