"""How the sellers of the synthetic shop write bullet points, and the style of its descriptions."""

from __future__ import annotations

LABELS: dict[str, str] = {
    "product_name": "Series:, Line:, Collection:, Edition:",
    "material": "Material:, Made from, Built of, Crafted in",
    "department": "Intended, Meant especially, Designed, Thought out",
    "UoM": "Size:, Measure:, Dimension:, Format:",
    "modifier": "Feature:, Quality:, Strength:, Property:",
    "content": "Motif:, Theme:, Subject:, Artwork:",
    "occasion": "Ideal, Perfect, Excellent, Great",
    "shape": "Shape:, Form:, Outline:, Contour:",
    "quantity": "Sold as, Comes as, Shipped as, Offered as",
    "fits": "Accessory, Extra, Companion, Supplement",
}
"""What stands before a value in a bullet point; the third is for validation, the fourth for
test."""

CLAIMS: dict[str, tuple[str, ...]] = {
    "train": ("Count on {}", "Comes with {}", "Now with {}", "Guaranteed: {}"),
    "validation": ("Known for {}", "Customers tell us about the {}"),
    "test": ("Look forward to {}", "We promise {}", "It is all about {}"),
}
"""Bullet points around the good judgement of an aspect."""

NOISE: dict[str, tuple[str, ...]] = {
    "train": (
        "Questions are welcome at any hour",
        "Makes a thoughtful present",
        "Checked by hand before it leaves us",
        "Please compare with the drawing",
    ),
    "validation": ("You have thirty days to change your mind", "Recommended by the trade press"),
    "test": (
        "From a family business in its third generation",
        "Our team replies on weekends too",
        "Read all about us on the last page",
    ),
}
"""Bullet points that a description leaves out."""

OPENINGS: dict[str, str] = {
    "apparel": "Dress for the day with",
    "kitchen": "Cook and serve with",
    "home": "Feel at home with",
    "electronics": "Stay in touch thanks to",
    "beauty": "Take a moment for yourself and",
    "grocery": "Fill the larder with",
    "pets": "Spoil your companion with",
    "outdoors": "Leave the house with",
    "play": "Spend a rainy afternoon with",
    "jewelry": "Add some sparkle through",
}
"""How a description opens in each section."""

DETAILS: dict[str, str] = {
    "modifier": "{}",
    "material": "made of {}",
    "shape": "{} in outline",
    "content": "decorated with a {} motif",
    "occasion": "at its best for {}",
    "department": "created with {} in mind",
    "fits": "a match for your {}",
}
"""How a description puts a value, in its order."""

UNITS: dict[str, tuple[str, str, str]] = {
    "inch": ("measures", "inch", "inches"),
    "foot": ("measures", "foot", "feet"),
    "quart": ("holds", "quart", "quarts"),
    "liter": ("holds", "liter", "liters"),
    "gallon": ("holds", "gallon", "gallons"),
    "ml": ("holds", "milliliter", "milliliters"),
    "ounce": ("weighs", "ounce", "ounces"),
    "pound": ("weighs", "pound", "pounds"),
    "gb": ("stores", "gigabyte", "gigabytes"),
}
"""What a product does with a unit, and the unit in full for one and for more."""

NUMBERS = "no, one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve".split(
    ", "
)
"""A description spells these out."""
