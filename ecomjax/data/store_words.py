"""The words of the synthetic shop: what it sells, under which invented brands, and how people ask.

Words mean different things in different sections on purpose: gold is a colour of phones and a
material of rings, cedar a brand of cameras and a scent of candles, red a colour and a part of
the brand red thimble. Which one is meant follows from the product type alone.
"""

from __future__ import annotations

SPLITS = ("train", "validation", "test")

HELD_OUT_AXES = (
    "creator",
    "product_name",
    "color",
    "material",
    "modifier",
    "shape",
    "content",
    "occasion",
)
"""Axes some of whose words are kept for validation and test; the others are closed classes."""

SECTIONS: dict[str, dict[str, str]] = {
    "apparel": {
        "creator": "nortavo, belkara, maple, linen crow, red thimble, tessavine, quillon, "
        "brindle & co, ovando, silver wren, marrowick, jutland mill, pelorra, fennimore",
        "product_name": "drift, lark, tundra, puddle, harvest 7, willow, breeze 2, cobble",
        "color": "black, white, red, blue, navy, pink, gray, brown, olive, mint, orange, coral, "
        "lavender, rose, cream, chocolate, teal, burgundy",
        "material": "cotton, linen, leather, wool, denim, suede, fleece, canvas, silk, corduroy",
        "department": "men, women, girls, boys, kids",
        "UoM": "size 6, size 7, size 8, size 9, size 10, small, medium, large, xl",
        "modifier": "waterproof, quilted, slim fit, breathable, lightweight, stretch, hooded, "
        "reversible, padded, casual",
        "content": "dinosaur, unicorn, sunflower, space robot, pirate, tiger, mushroom, galaxy",
        "occasion": "wedding, winter, summer, hiking, work, travel, party, halloween",
        "quantity": "2, 3",
    },
    "kitchen": {
        "creator": "amber, copper otter, hearthwell, ladrano, velvet moose, broadspoon, umbrian, "
        "sootherly, glass harbor, tindrel, marl & rye, okomura, castellow, piperin",
        "product_name": "ember, summit 4, lark, forge, harvest 7, orchard, cinder, cobble",
        "color": "black, white, red, blue, gray, green, teal, yellow, cream, turquoise",
        "material": "stainless steel, copper, glass, ceramic, cast iron, bamboo, marble, "
        "enamel, titanium, stoneware",
        "UoM": "8 inch, 10 inch, 12 inch, 2 quart, 4 quart, 1 liter, large, small",
        "modifier": "nonstick, dishwasher safe, stackable, cordless, heavy duty, insulated, "
        "handmade, foldable, programmable",
        "shape": "round, square, oval, rectangular, flat, curved",
        "occasion": "christmas, camping, wedding, travel, brunch, picnic, thanksgiving",
        "quantity": "2, 4, 6",
    },
    "home": {
        "creator": "walnut fox, dovemoor, ashgrave, plinthe, blue ladder, harrowby, sundal, "
        "cotton anvil, ostrevik, bramblehurst, nettle & dean, yellow kite, tolvanen, furlow",
        "product_name": "haven, willow, drift, summit 4, meadow, orchard, breeze 2, solace",
        "color": "black, white, gray, beige, amber, charcoal, slate, sage, navy, green, ivory, "
        "teal, burgundy, mustard",
        "material": "walnut, oak, cherry, maple, bamboo, linen, cotton, velvet, marble, rattan, "
        "glass, pine",
        "UoM": "queen, king, twin, full, 36 inch, 48 inch, 60 inch, 72 inch",
        "modifier": "adjustable, foldable, blackout, washable, rustic, modern, farmhouse, "
        "cordless, insulated, minimalist",
        "shape": "round, square, oval, rectangular, narrow, curved",
        "content": "sunflower, palm leaf, galaxy, butterfly, lighthouse, tiger, mushroom",
        "occasion": "christmas, outdoor, nursery, living room, bedroom, halloween, patio",
        "quantity": "2, 4",
    },
    "electronics": {
        "creator": "cedar, zentrix, amperon, orange lantern, kodavo, volterra, pixelmoor, "
        "silver badger, nuvolink, datchet, lumeris, obrecht, gold finch labs, trennix",
        "product_name": "comet 5, summit 4, pulse, ember, orbit 300, echoic, quasar 12, lark",
        "color": "black, white, gold, silver, copper, rose, blue, red, graphite, marble, mint, "
        "purple",
        "UoM": "64 gb, 128 gb, 256 gb, 6 inch, 8 inch, 3 foot, 6 foot",
        "modifier": "wireless, waterproof, compact, foldable, noise cancelling, heavy duty, "
        "shockproof, rechargeable, universal, lightweight",
        "department": "kids, seniors, beginners",
        "occasion": "travel, gaming, work, school, vlogging, studio, wedding",
        "quantity": "2, 3",
    },
    "beauty": {
        "creator": "ivory spoon, sablette, oleandra, charcoal swan, mirelle, petalune, "
        "dulcinari, plum thistle, aurelisse, novaderm, heather fable, wispwood, ostara lane",
        "product_name": "halo, dew, velour 9, willow, meadow, solace, blossom 3, haven",
        "color": "red, pink, nude, plum, coral, black, cherry, berry, bronze, white",
        "department": "men, women, teens",
        "UoM": "1 ounce, 2 ounce, 4 ounce, 50 ml, 100 ml, travel size",
        "modifier": "lavender, rose, cedar, mint, charcoal, sage, juniper, unscented, vegan, "
        "moisturizing, hypoallergenic, jasmine, sandalwood",
        "shape": "round, square, oval, slim, curved",
        "occasion": "wedding, christmas, party, travel, valentine, birthday",
        "quantity": "2, 3, 4",
    },
    "grocery": {
        "creator": "golden turnip, parsnip & daughter, old bellows, marzano hill, green barrow, "
        "tumbledown, hollowell, casa brevia, nutmeg lane, oatfield mews, pemberly farm, canto bay",
        "product_name": "harvest 7, sunrise, hearth, orchard, farmstead, prairie, cinder",
        "UoM": "8 ounce, 12 ounce, 16 ounce, 32 ounce, 1 pound, 2 pound",
        "modifier": "organic, gluten free, mint, orange, cherry, walnut, olive, maple, spicy, "
        "low sodium, vegan, ginger, sugar free, whole grain",
        "department": "kids, toddlers",
        "occasion": "christmas, party, brunch, camping, thanksgiving, picnic",
        "quantity": "2, 3, 6, 12",
    },
    "pets": {
        "creator": "coral, waggleton, mossy paw, purrington, barkwise, blue burrow, tuftery, "
        "snoutly, whiskford, amber hound, furrowdale, nibbleby, collarino",
        "product_name": "puddle, scamper, cobble, tundra, pounce 2, burrow, drift, ramble",
        "color": "black, red, blue, gray, brown, green, teal, pink, orange, purple, beige",
        "material": "canvas, nylon, leather, fleece, bamboo, hemp, rope, memory foam",
        "UoM": "small, medium, large, xl, 5 gallon, 10 gallon, 10 pound, 20 pound",
        "modifier": "washable, reflective, heavy duty, waterproof, odor free, adjustable, "
        "chew proof, orthopedic, padded",
        "department": "puppies, kittens, senior pets",
        "occasion": "travel, winter, outdoor, training, camping, halloween",
        "quantity": "2, 3",
    },
    "outdoors": {
        "creator": "slate, torrentia, pine lantern, fjordane, cragmont, black heron, ridgewell, "
        "steel acorn, wayfolk, boulderby, trellisade, kestrelle, summerholt",
        "product_name": "summit 4, tundra, ramble, comet 5, ridge, breeze 2, delta 8, cobble",
        "color": "green, orange, red, blue, black, olive, yellow, camo, gray, tan, white",
        "material": "nylon, canvas, titanium, stainless steel, rubber, carbon fiber, aluminum, "
        "brass",
        "UoM": "6 foot, 25 foot, 50 foot, 100 foot, 24 inch, 26 inch, large, small",
        "modifier": "ultralight, foldable, waterproof, heavy duty, retractable, insulated, "
        "collapsible, compact, rustproof",
        "department": "men, women, kids, beginners",
        "occasion": "camping, backpacking, beach, winter, racing, travel",
        "quantity": "2, 4",
    },
    "play": {
        "creator": "plum, inkberry, marble owl, plucky, tomblin, violet compass, fableton, "
        "wooden whale, strumwell, jotter & finch, merrivane, papyrine, bungalow toys",
        "product_name": "doodle, comet 5, echoic, sunrise, orbit 300, lark, melody, blossom 3",
        "color": "black, blue, red, green, purple, yellow, gold, silver, rose, pink, white",
        "material": "walnut, maple, cherry, leather, cardboard, bamboo, felt, mahogany",
        "UoM": "small, large, 12 inch, 24 inch, 36 inch, full size, a5",
        "modifier": "magnetic, portable, personalized, refillable, foldable, educational, "
        "handmade, washable, vintage style",
        "department": "kids, toddlers, girls, boys, adults, beginners",
        "content": "dinosaur, unicorn, space robot, pirate, galaxy, lighthouse, butterfly",
        "occasion": "birthday, christmas, school, travel, party, classroom",
        "quantity": "2, 4, 6",
    },
    "jewelry": {
        "creator": "pearl & pike, orsolina, copper lark, gemmaro, vintner row, opaline, "
        "rose gable, cellandine, maribeau, thornbury gold, jasper moth, lunetta",
        "product_name": "halo, lark, meadow, velour 9, solace, dew, comet 5",
        "material": "gold, silver, copper, pearl, jade, titanium, leather, velvet, walnut, brass",
        "department": "men, women, girls, teens",
        "UoM": "16 inch, 18 inch, 20 inch, size 6, size 7, size 8, small, large",
        "modifier": "engraved, handmade, adjustable, minimalist, personalized, tarnish free, "
        "waterproof, vintage style",
        "shape": "round, square, oval, curved, flat",
        "content": "butterfly, sunflower, moon, compass rose, mushroom, tiger",
        "occasion": "wedding, birthday, valentine, party, graduation, anniversary",
        "quantity": "2, 3",
    },
}
"""Values of each axis that the products of a section have."""

AISLES: tuple[tuple[str, str, str], ...] = (
    (
        "apparel",
        "running shoes, hiking boots, canvas sneakers",
        "shoe insoles, heel cushions, arch supports",
    ),
    ("apparel", "rain jacket, windbreaker, parka", "scarf, neck warmer, shawl"),
    ("apparel", "jeans, chinos, cargo trousers", "belt, suspenders, waist sash"),
    ("apparel", "evening dress, sundress, jumpsuit", "clutch purse, handbag, shoulder bag"),
    (
        "kitchen",
        "coffee maker, espresso machine, french press",
        "coffee grinder, bean mill, burr grinder",
    ),
    ("kitchen", "chef knife, bread knife, cleaver", "knife sharpener, whetstone, honing rod"),
    ("kitchen", "frying pan, wok, saucepan", "spatula, pan turner, ladle"),
    (
        "kitchen",
        "stovetop kettle, electric kettle, teapot",
        "leaf infuser, mesh strainer, steeping basket",
    ),
    ("home", "mattress, futon, air bed", "bed sheet, duvet cover, bedspread"),
    ("home", "coffee table, side table, console table", "table runner, tablecloth, placemat"),
    ("home", "curtains, window blinds, roller shade", "curtain rod, curtain rail, tension rod"),
    ("home", "desk lamp, floor lamp, table lamp", "light bulb, led tube, filament bulb"),
    (
        "electronics",
        "smartphone, flip phone, feature phone",
        "phone case, phone sleeve, phone pouch",
    ),
    ("electronics", "photo camera, camcorder, action camera", "tripod, monopod, gimbal"),
    (
        "electronics",
        "headphones, earbuds, headset",
        "audio cable, headphone adapter, extension cord",
    ),
    (
        "electronics",
        "inkjet printer, laser printer, photo printer",
        "ink cartridge, toner, ink refill",
    ),
    ("beauty", "face cream, face serum, face oil", "facial brush, jade roller, cleansing sponge"),
    ("beauty", "lipstick, lip gloss, lip tint", "makeup mirror, vanity mirror, compact mirror"),
    (
        "beauty",
        "scented candle, incense sticks, wax melts",
        "candle holder, incense burner, wax warmer",
    ),
    ("beauty", "razor, electric shaver, beard trimmer", "shaving foam, shaving gel, aftershave"),
    ("grocery", "black tea, green tea, herbal tea", "sugar cubes, honey, stevia drops"),
    (
        "grocery",
        "pancake mix, waffle mix, crepe mix",
        "maple syrup, fruit jam, chocolate spread",
    ),
    ("grocery", "potato chips, tortilla chips, pretzels", "salsa, guacamole, cheese dip"),
    ("grocery", "spaghetti, penne, egg noodles", "tomato sauce, pesto, marinara sauce"),
    ("pets", "dog bed, dog mat, dog sofa", "dog blanket, pet throw, pet quilt"),
    ("pets", "dog leash, leather lead, rope lead", "dog collar, dog harness, dog vest"),
    (
        "pets",
        "cat litter, litter pellets, litter crystals",
        "litter box, litter tray, cat toilet",
    ),
    ("pets", "fish tank, fish bowl, terrarium", "aquarium gravel, tank pebbles, river sand"),
    ("outdoors", "tent, hammock, bivy shelter", "sleeping bag, bedroll, camp quilt"),
    ("outdoors", "mountain bike, road bike, electric bike", "bike lock, chain lock, cable lock"),
    ("outdoors", "fishing rod, fishing pole, casting rod", "fishing lure, bait hooks, fly lure"),
    ("outdoors", "garden hose, sprinkler, soaker hose", "hose reel, hose hanger, hose cart"),
    ("play", "ballpoint pen, fountain pen, gel pen", "notebook, journal, sketch pad"),
    ("play", "acoustic guitar, ukulele, banjo", "guitar case, gig bag, instrument bag"),
    ("play", "building blocks, train set, marble run", "toy box, storage bin, toy chest"),
    ("play", "jigsaw puzzle, board game, card game", "game table, puzzle board, puzzle mat"),
    ("jewelry", "necklace, pendant, locket", "jewelry box, trinket dish, jewelry tray"),
    ("jewelry", "wristwatch, pocket watch, bracelet watch", "watch winder, watch box, watch stand"),
    (
        "jewelry",
        "earrings, ear cuffs, hoop earrings",
        "polishing cloth, silver polish, dip cleaner",
    ),
    ("jewelry", "signet ring, band ring, stacking ring", "ring box, ring dish, ring holder"),
)
"""Section, types that can stand in for one another, and the types used together with those."""

ASKED: dict[str, str] = {
    "condition": "used, refurbished, open box, without lid, without batteries, brand new",
    "price": "under 20 dollars, under 50 dollars, below 30, less than 15 dollars",
    "origin": "made in portugal, made in vermont, japanese, danish, made in peru, moroccan",
    "time": "1970s, 1920s, medieval, 2023, victorian, 90s",
    "product_number": "kx-204, b1180, tr-55e, 7740a, mz-9, qd-310, 40062, lp-18c",
}
"""Axes that people ask for and products do not state: only in queries to be tagged."""

DEPARTMENTS: dict[str, tuple[str, str]] = {
    "men": ("mens, men's, men", "for men"),
    "women": ("womens, women's, ladies", "for women"),
    "girls": ("girls", "for girls"),
    "boys": ("boys", "for boys"),
    "kids": ("kids, childrens", "for kids"),
    "teens": ("teen", "for teens"),
    "adults": ("adult", "for adults"),
    "toddlers": ("toddler", "for toddlers"),
    "seniors": ("senior", "for seniors"),
    "beginners": ("beginner", "for beginners"),
    "puppies": ("puppy", "for puppies"),
    "kittens": ("kitten", "for kittens"),
    "senior pets": ("senior pet", "for senior pets"),
}
"""How a department is written before and after the type."""

UNITS = {"inch": "in", "ounce": "oz", "foot": "ft", "pound": "lb", "liter": "l", "gallon": "gal"}
"""Short forms that people type in place of the catalogue's units."""

TEMPLATES: dict[str, tuple[str, ...]] = {
    "train": (
        "type",
        "creator type",
        "color type",
        "material type",
        "creator color type",
        "creator type department",
        "department color type",
        "modifier type UoM",
        "type fits",
        "modifier type fits",
        "color material type",
        "type UoM",
        "type department UoM",
        "quantity type",
        "type quantity",
        "modifier color type department",
        "shape type",
        "shape material type",
        "content type",
        "content type department",
        "occasion type",
        "modifier type occasion",
        "creator product_name",
        "creator product_name type",
        "creator modifier type",
        "color type creator",
        "buy material type UoM",
        "looking for occasion type department",
        "where to find modifier material type",
        "type price",
        "condition creator type",
        "type origin",
        "time type",
        "creator type product_number",
        "creator material type UoM",
        "modifier occasion type",
    ),
    "validation": (
        "material color type",
        "creator type UoM",
        "type color",
        "department type occasion",
        "creator type fits",
        "modifier content type",
        "type modifier quantity",
        "shape color type",
        "i need creator modifier type",
        "need creator type price",
        "condition type",
        "origin material type",
        "time color type",
        "product_number type",
        "product_name type color",
    ),
    "test": (
        "type creator",
        "UoM color type",
        "department material type",
        "color modifier type UoM",
        "type material UoM",
        "color type fits",
        "type fits creator",
        "quantity modifier type",
        "creator color type department",
        "occasion type creator",
        "shape type color",
        "modifier material type",
        "product_name type UoM",
        "product_name creator color",
        "any good creator type UoM",
        "show me color content type",
        "condition product_name type",
        "modifier type price department",
        "origin type occasion",
        "creator product_number",
        "time type department",
    ),
}
"""Orders of axes in a query; words that name no axis stand for themselves."""

TITLES = (
    "creator product_name color material shape content type fits department occasion"
    " modifier UoM quantity",
    "creator department modifier content material shape type fits product_name occasion"
    " UoM color quantity",
    "creator modifier shape material type product_name fits occasion UoM content quantity"
    " department color",
    "quantity creator type product_name fits occasion color content modifier material shape"
    " UoM department",
)
"""Orders of axes in a product title."""

PRAISE = ("", "", "Gift Ready", "Everyday Quality", "Easy Care", "New Arrival", "Best Seller")
"""What sellers add to a title and no query asks for."""
