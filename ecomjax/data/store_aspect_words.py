"""What the customers of the synthetic shop judge a product by, and in which words.

A product type has traits, a trait has aspects. Of an aspect the table lists what it is called,
its two judgements as a summary puts them, and what reviews say of it when it is good or bad.
The last name and the last saying of each kind are kept for validation or test.
"""

from __future__ import annotations

TRAITS: tuple[tuple[str, str], ...] = (
    ("size garment sole", "size garment sole"),
    ("size garment weather", "size garment soft"),
    ("size garment life", "size garment clasp"),
    ("size garment clean", "carry clasp life"),
    ("pot clean skill", "electric clean life"),
    ("blade handheld clean", "blade life clean"),
    ("pot clean life", "handheld clean life"),
    ("pot clean life", "handheld clean life"),
    ("soft life clean", "soft size garment"),
    ("furniture clean life", "size garment clean"),
    ("size garment clean", "furniture gear life"),
    ("furniture electric life", "electric life"),
    ("battery device image", "size garment clean"),
    ("battery device image electric", "furniture gear life"),
    ("battery sound device", "gear sound life"),
    ("device image electric", "ink image life"),
    ("skin dispenser scent", "handheld clean life"),
    ("skin scent life", "furniture image life"),
    ("scent craft life", "furniture craft clean"),
    ("blade handheld clean", "skin dispenser scent"),
    ("food loose bag", "food loose bag"),
    ("food loose bag", "food dispenser"),
    ("food bag", "food dispenser"),
    ("food bag", "food dispenser"),
    ("soft clean life", "soft garment clean"),
    ("clasp gear weather life", "clasp size garment weather"),
    ("loose bag scent", "box clean life"),
    ("furniture clean life", "loose bag clean"),
    ("gear weather furniture", "soft weather life"),
    ("gear weather furniture", "clasp gear weather"),
    ("gear weather handheld", "craft weather life"),
    ("gear weather life", "furniture gear weather"),
    ("ink handheld life", "paper craft"),
    ("sound skill fun life", "carry weather life"),
    ("craft fun skill", "box clean life"),
    ("craft fun skill", "furniture craft life"),
    ("clasp jewel life", "box craft life"),
    ("clasp jewel life weather", "box craft life"),
    ("clasp jewel life", "scent clean life"),
    ("jewel size life", "box craft life"),
)
"""Traits of the types of each aisle and of its accessories, in the order of the aisles."""

EVERY_TRAIT = "general"
"""The trait that all products have."""

ASPECTS: dict[str, tuple[tuple[str, str, str, str, str], ...]] = {
    "general": (
        (
            "price, cost, asking price",
            "fair price",
            "steep price",
            "is lower than elsewhere, asks little for so much, leaves room for a second one",
            "is far too high, asks a lot for so little, doubled since last year",
        ),
        (
            "delivery, shipping, courier",
            "quick delivery",
            "slow delivery",
            "took two days, was ahead of schedule, beat the promised date",
            "took three weeks, was late twice, missed the birthday",
        ),
        (
            "customer service, support line, help desk",
            "helpful support",
            "absent support",
            "answered within the hour, solved it at once, sent a replacement unasked",
            "never answered, passed me around, hung up twice",
        ),
        (
            "packaging, outer box, wrapping",
            "sturdy packaging",
            "poor packaging",
            "kept everything in place, opens without tools, would survive a fall",
            "arrived torn, was soaked, fell apart in the hallway",
        ),
    ),
    "size": (
        (
            "fit, cut, sizing",
            "accurate sizing",
            "unreliable sizing",
            "matches the chart, sits just right, needed no exchange",
            "runs two sizes off, pinches all over, forced me to send it back",
        ),
    ),
    "garment": (
        (
            "stitching, seam, thread",
            "firm seams",
            "loose seams",
            "holds after many washes, is neat inside and out, shows no loose end",
            "came undone in a week, unravels at the side, gave way at once",
        ),
        (
            "cloth, weave, fabric",
            "soft cloth",
            "scratchy cloth",
            "feels gentle on the skin, drapes well, softens with every wear",
            "itches, feels like sandpaper, pills after one wash",
        ),
    ),
    "sole": (
        (
            "cushioning, footbed, heel pad",
            "springy cushioning",
            "flat cushioning",
            "carries me through long shifts, takes the sting out of stairs, still bounces back",
            "went flat in days, lets every pebble through, gave me blisters",
        ),
        (
            "tread, traction, footing",
            "secure tread",
            "slippery tread",
            "bites on wet stone, stays put on ice, never lets go",
            "slides on wet tiles, skids in the rain, is worn smooth already",
        ),
    ),
    "carry": (
        (
            "zipper, zip, fastener",
            "smooth zipper",
            "stuck zipper",
            "glides with one finger, has never snagged, closes in one go",
            "jams halfway, split on the first trip, lost its teeth",
        ),
        (
            "strap, sling, shoulder strap",
            "tough strap",
            "weak strap",
            "takes any load, spreads the load well, stays where I put it",
            "snapped in the street, cuts into the shoulder, slides off all the time",
        ),
        (
            "inside pocket, main compartment, interior",
            "ample pockets",
            "cramped pockets",
            "swallows all I own, has a place for everything, takes more than it seems",
            "barely takes a wallet, is full at once, wastes half the volume",
        ),
    ),
    "pot": (
        (
            "lid, cover, top",
            "tight lid",
            "leaky lid",
            "shuts with a click, keeps every drop in, seals well",
            "rattles, pops off, never closes",
        ),
        (
            "handle, holder, hand hold",
            "cool handle",
            "hot handle",
            "stays cool over the flame, is safe without a cloth, never gets warm",
            "burned my fingers, gets scorching, needs a glove",
        ),
        (
            "heat, heating, warm up",
            "even heating",
            "uneven heating",
            "spreads to the very rim, is steady from side to side, leaves no cold spot",
            "scorches the middle, leaves the rim cold, comes and goes",
        ),
    ),
    "blade": (
        (
            "edge, cutting edge, sharp side",
            "keen edge",
            "dull edge",
            "glides through everything, stays keen for months, works at the first stroke",
            "was blunt from day one, tears more than it cuts, nicks at a touch",
        ),
    ),
    "handheld": (
        (
            "grip, handle, shaft",
            "firm grip",
            "slick grip",
            "sits well in wet hands, never slips, suits small hands too",
            "slithers in wet hands, is too thin to hold, came off in my hand",
        ),
        (
            "balance, poise, distribution of weight",
            "fine balance",
            "awkward balance",
            "makes long work light, feels right at once, tires nobody",
            "tips forward, strains the wrist, feels all wrong",
        ),
    ),
    "clean": (
        (
            "clean up, washing, rinse",
            "simple cleaning",
            "tedious cleaning",
            "takes a minute, needs only a wipe, is done in no time",
            "takes half an hour, needs a toothbrush, never ends",
        ),
        (
            "surface, outside, outer layer",
            "spotless surface",
            "stained surface",
            "shrugs off stains, looks new after a year, keeps no trace of use",
            "stained on the first day, holds every smudge, flakes off",
        ),
    ),
    "life": (
        (
            "endurance, durability, lifespan",
            "long life",
            "short life",
            "beats all before it, is measured in years, exceeds the promise",
            "was a week, ended with a crack, is a third of the promise",
        ),
    ),
    "soft": (
        (
            "touch, softness, feel",
            "plush feel",
            "coarse feel",
            "is like a cloud, invites a nap, has everyone stroking it",
            "is like cardboard, is rough all over, puts everyone off",
        ),
        (
            "warmth, insulation, cold protection",
            "cozy warmth",
            "little warmth",
            "keeps the frost at bay, lasts through a long night, is enough in january",
            "does nothing against a draft, left me shivering, is gone by midnight",
        ),
        (
            "filling, stuffing, padding",
            "lofty filling",
            "lumpy filling",
            "keeps its shape, fluffs up again, stays where it belongs",
            "clumps in the corners, leaks out, went thin in a month",
        ),
    ),
    "furniture": (
        (
            "assembly, setup, build",
            "easy assembly",
            "hard assembly",
            "took ten minutes, needs no tools, is child's play",
            "took a whole evening, ended in tears, needs three people",
        ),
        (
            "frame, base, stand",
            "stable frame",
            "wobbly frame",
            "does not budge, stands like a rock, carries more than it must",
            "wobbles at a touch, leans to one side, sways in a breeze",
        ),
        (
            "finish, varnish, lacquer",
            "smooth finish",
            "rough finish",
            "is even everywhere, catches the light nicely, hides every screw",
            "has splinters, shows scratches, bubbles near the bottom",
        ),
    ),
    "electric": (
        (
            "noise level, hum, operating noise",
            "quiet operation",
            "noisy operation",
            "is hardly noticeable, lets the baby sleep, fades into the background",
            "wakes the neighbors, drowns out the radio, reminds me of a tractor",
        ),
        (
            "temperature, housing, casing",
            "cool running",
            "overheated running",
            "stays moderate for hours, is fine to touch, never climbs",
            "climbs alarmingly, is too hot to touch, ends in a shutdown",
        ),
        (
            "power use, energy use, consumption",
            "modest power use",
            "wasteful power use",
            "barely shows on the bill, is next to nothing, is half of what I had feared",
            "doubled my bill, is shocking, trips the fuse",
        ),
    ),
    "battery": (
        (
            "battery, battery life, power cell",
            "lasting battery",
            "weak battery",
            "goes on for days, covers a weekend without a plug, outlives my patience",
            "dies by noon, drains within an hour, is flat again before dinner",
        ),
        (
            "charger, charging cable, charging port",
            "fast charging",
            "fickle charging",
            "fills it up over lunch, clicks right in, works with any plug",
            "comes loose, takes all night, stopped working in a week",
        ),
    ),
    "device": (
        (
            "screen, display, menu",
            "clear display",
            "dim display",
            "is readable in full sun, shows every detail, makes sense at once",
            "is too dark outdoors, flickers, hides half of the text",
        ),
        (
            "connection, pairing, wireless link",
            "stable connection",
            "shaky connection",
            "works on the first try, never drops, reaches the garden",
            "drops every few minutes, needs a restart daily, ends at the door",
        ),
    ),
    "image": (
        (
            "picture, image, color reproduction",
            "sharp pictures",
            "blurry pictures",
            "is crisp to the corners, looks true to life, holds up when enlarged",
            "is grainy, looks washed out, smears at the margin",
        ),
    ),
    "sound": (
        (
            "sound, tone, acoustics",
            "rich sound",
            "tinny sound",
            "fills the room, is full and warm, brings out every note",
            "crackles, disappears in a crowd, seems to come from a can",
        ),
        (
            "bass, low end, deep register",
            "deep bass",
            "muddy bass",
            "rumbles nicely, is tight and clear, carries the song",
            "booms over everything, is missing entirely, turns to mush",
        ),
    ),
    "skin": (
        (
            "texture, consistency, formula",
            "silky texture",
            "greasy texture",
            "spreads like butter, sinks in at once, leaves no film",
            "sits on top for hours, sticks to everything, crumbles on contact",
        ),
        (
            "skin reaction, effect on skin, after feel",
            "gentle effect",
            "harsh effect",
            "was calm all week, is soothing, surprised my doctor",
            "was a red rash, is a burning itch, sent me to the doctor",
        ),
    ),
    "dispenser": (
        (
            "opening, dispenser, nozzle",
            "handy dispenser",
            "messy dispenser",
            "gives just the right dose, works to the last drop, never drips",
            "squirts everywhere, clogged in a week, leaks in transit",
        ),
    ),
    "scent": (
        (
            "scent, smell, fragrance",
            "lovely scent",
            "odd scent",
            "reminds me of a garden, lingers all day, is never too much",
            "gave me a headache, is like cleaning fluid, drove us outdoors",
        ),
    ),
    "food": (
        (
            "flavor, taste, aroma",
            "full flavor",
            "bland flavor",
            "has depth, makes you want more, is just like grandmother's",
            "is like wet paper, has a chemical note, made the children complain",
        ),
        (
            "freshness, shelf life, expiry date",
            "reliable freshness",
            "poor freshness",
            "is good for another year, is beyond doubt, held to the last bite",
            "was past on arrival, is a gamble, ended within days",
        ),
        (
            "portion, amount, serving",
            "generous portions",
            "small portions",
            "feeds the whole family, is enough for a month, goes a long way",
            "is half air, is gone in two bites, shrank again",
        ),
    ),
    "loose": (
        (
            "grain, grind, particle size",
            "even grain",
            "uneven grain",
            "is the same throughout, runs freely, pours without lumps",
            "is all over the place, cakes together, is full of lumps",
        ),
        (
            "dust, residue, fine powder",
            "hardly any dust",
            "plenty of dust",
            "is barely there, settles at once, rinses off quickly",
            "gets everywhere, made me cough, clouds the air",
        ),
    ),
    "bag": (
        (
            "bag, pouch, sack",
            "resealable bag",
            "flimsy bag",
            "closes again, stands on its own, pours neatly",
            "ripped when lifted, has no seal, leaks from a corner",
        ),
    ),
    "ink": (
        (
            "ink flow, flow, stroke",
            "steady ink",
            "patchy ink",
            "never skips, starts at once, stays even to the end",
            "skips every other word, dries up overnight, blots",
        ),
        (
            "drying, drying time, smear resistance",
            "quick drying",
            "slow drying",
            "is over in a second, suits left handers, leaves clean hands",
            "takes forever, ruined my page, leaves black hands",
        ),
    ),
    "paper": (
        (
            "paper, page, sheet",
            "thick paper",
            "thin paper",
            "takes heavy ink, lies flat, hides what is behind it",
            "lets everything shine through, curls up, tears at the holes",
        ),
        (
            "binding, spine, outer cover",
            "strong binding",
            "weak binding",
            "opens fully, has held for a year, keeps it all together",
            "broke in a month, sheds leaves, cracks when opened",
        ),
    ),
    "gear": (
        (
            "weight, carrying weight, mass",
            "low weight",
            "excess weight",
            "is no burden, lets me carry it all day, surprised me on the scale",
            "is a burden, wore me out, is twice what they claim",
        ),
        (
            "joint, connector, coupling",
            "tight joints",
            "loose joints",
            "locks firmly, has no play, withstands every pull",
            "slips apart, has too much play, cracked under strain",
        ),
    ),
    "weather": (
        (
            "weather resistance, outer shell, rain protection",
            "weatherproof build",
            "leaky build",
            "laughs at the rain, spent a winter outside unharmed, shrugs off salt",
            "failed in a drizzle, gave up in the fog, faded in the sun",
        ),
    ),
    "clasp": (
        (
            "clasp, buckle, catch",
            "secure clasp",
            "unreliable clasp",
            "holds against any tug, closes with one hand, stays shut",
            "opens by itself, bent in a day, takes two people to close",
        ),
    ),
    "jewel": (
        (
            "plating, shine, luster",
            "lasting shine",
            "fading shine",
            "outlasts daily wear, still turns heads, needs no polish",
            "rubbed off in weeks, turned green, was dull on arrival",
        ),
        (
            "detail, workmanship, craftsmanship",
            "fine workmanship",
            "crude workmanship",
            "rewards a closer look, belongs in a museum, is crisp on every side",
            "is sloppy up close, is off center, seems stamped by a child",
        ),
    ),
    "box": (
        (
            "hinge, closing, flap",
            "solid hinge",
            "broken hinge",
            "moves without a sound, stays open by itself, shuts softly",
            "broke off, squeaks, pinched my finger",
        ),
        (
            "space inside, inner tray, capacity",
            "clever storage",
            "scant storage",
            "fits the whole collection, is well divided, takes more than expected",
            "fits next to nothing, is badly divided, is smaller than shown",
        ),
    ),
    "skill": (
        (
            "learning curve, first start, introduction",
            "easy start",
            "hard start",
            "is gentle, was over in an evening, encourages newcomers",
            "is brutal, took months, scares newcomers away",
        ),
        (
            "manual, instruction sheet, guide",
            "clear manual",
            "confusing manual",
            "explains every step, has large drawings, answers all questions",
            "leaves out half the steps, is a bad translation, has tiny letters",
        ),
    ),
    "craft": (
        (
            "print, paint, artwork",
            "vivid print",
            "pale print",
            "jumps out at you, is bright and even, delights the eye",
            "peels, looks faded, comes off on the fingers",
        ),
        (
            "cut edge, rim, corner",
            "clean edges",
            "ragged edges",
            "is nicely rounded, is cut to the millimeter, lines up perfectly",
            "is sharp enough to hurt, is frayed, never lines up",
        ),
    ),
    "fun": (
        (
            "play value, fun factor, entertainment",
            "lasting fun",
            "brief fun",
            "kept us busy all winter, brings the family together, grows with the child",
            "wore off in an hour, fell flat with everyone, ended in a drawer",
        ),
    ),
}
"""Names, good and bad judgement, good and bad sayings of each aspect of a trait."""

SAYINGS = {
    True: "is a joy, could not be better, is above reproach, won me over, "
    "deserves applause, beats my old one, is worth every cent, has no equal, exceeded my hopes, "
    "does its job, has my full praise, pleases me daily",
    False: "is a letdown, could be much better, is below par, spoiled it for me, "
    "deserves a complaint, loses to my old one, is not worth a cent, has no merit, "
    "fell short of my hopes, fails at its job, has my full contempt, annoys me daily",
}
"""What can be said of every aspect, when it is good and when it is bad; every fourth is for
test, every eighth for validation."""
