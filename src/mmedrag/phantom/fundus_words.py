"""What fundus reports, questions and attributes say; :mod:`mmedrag.phantom.fundus` draws it."""

from __future__ import annotations

from mmedrag.phantom.grammar import AttributeSpec, FindingSpec

GRADES = ("mild", "moderate", "severe")

FINDINGS = (
    FindingSpec(
        "cup_to_disc",
        "cup enlargement",
        grades=GRADES,
        positive=(
            "{grade} cup enlargement.",
            "There is {grade} cup enlargement.",
            "The optic cup is enlarged.",
            "{grade} enlargement of the optic cup.",
        ),
        negative=(
            "The optic cup is normal in size.",
            "No cup enlargement.",
            "The cup to disc ratio is normal.",
            "The optic cup is not enlarged.",
        ),
        hedged=(
            "Possible {grade} cup enlargement.",
            "The optic cup may be enlarged.",
            "Cup enlargement cannot be excluded.",
            "Questionable cup enlargement.",
        ),
        questions=(
            "Is there cup enlargement?",
            "Is the optic cup enlarged?",
            "Does the image show an enlarged optic cup?",
        ),
    ),
    FindingSpec(
        "haemorrhage",
        "haemorrhage",
        sided=True,
        most=4,
        positive=(
            "{count} haemorrhage{s} {at}.",
            "{count} {side} haemorrhage{s}.",
            "There is bleeding, {count} haemorrhage{s} {at}.",
            "{count} retinal haemorrhage{s} {at}.",
        ),
        negative=(
            "No haemorrhage.",
            "There is no haemorrhage.",
            "No retinal bleeding.",
            "No haemorrhage is seen.",
        ),
        hedged=(
            "Possible {side} haemorrhage.",
            "A haemorrhage {at} cannot be excluded.",
            "Questionable haemorrhage {at}.",
            "There may be a haemorrhage {at}.",
        ),
        questions=(
            "Is there {side} haemorrhage?",
            "Is there a haemorrhage {at}?",
            "Does the image show {side} haemorrhage?",
        ),
    ),
    FindingSpec(
        "hard_exudates",
        "hard exudate",
        sided=True,
        grades=GRADES,
        positive=(
            "{grade} {side} hard exudates.",
            "There are {grade} hard exudates {at}.",
            "{side} hard exudates.",
            "Lipid deposits {at}.",
        ),
        negative=(
            "No hard exudates.",
            "There are no hard exudates.",
            "No lipid deposits.",
            "Hard exudates are absent.",
        ),
        hedged=(
            "Possible {side} hard exudates.",
            "{side} hard exudates cannot be excluded.",
            "Questionable {side} hard exudates.",
            "There may be lipid deposits {at}.",
        ),
        questions=(
            "Are there {side} hard exudates?",
            "Are there hard exudates {at}?",
            "Does the image show {side} hard exudates?",
        ),
    ),
    FindingSpec(
        "drusen",
        "drusen",
        grades=GRADES,
        positive=(
            "{grade} drusen.",
            "There are {grade} drusen.",
            "Drusen at the macula.",
            "{grade} macular drusen.",
        ),
        negative=("No drusen.", "There are no drusen.", "No macular drusen.", "Drusen are absent."),
        hedged=(
            "Possible {grade} drusen.",
            "Drusen cannot be excluded.",
            "Questionable drusen.",
            "There may be drusen.",
        ),
        questions=("Are there drusen?", "Does the image show drusen?", "Are drusen present?"),
    ),
    FindingSpec(
        "neovascularisation",
        "neovascularisation",
        sided=True,
        positive=(
            "{side} neovascularisation.",
            "There is neovascularisation {at}.",
            "New vessels {at}.",
            "Abnormal new vessels {at}.",
        ),
        negative=(
            "No neovascularisation.",
            "There is no neovascularisation.",
            "No new vessels.",
            "New vessels are absent.",
        ),
        hedged=(
            "Possible {side} neovascularisation.",
            "{side} neovascularisation cannot be excluded.",
            "Questionable {side} neovascularisation.",
            "There may be new vessels {at}.",
        ),
        questions=(
            "Is there {side} neovascularisation?",
            "Are there new vessels {at}?",
            "Does the image show {side} neovascularisation?",
        ),
    ),
    FindingSpec(
        "cotton_wool_spots",
        "cotton wool spot",
        sided=True,
        most=3,
        positive=(
            "{count} cotton wool spot{s} {at}.",
            "{count} {side} cotton wool spot{s}.",
            "There is ischaemia, {count} cotton wool spot{s} {at}.",
            "{count} soft exudate{s} {at}.",
        ),
        negative=(
            "No cotton wool spots.",
            "There is no cotton wool spot.",
            "No soft exudates.",
            "No cotton wool spot is seen.",
        ),
        hedged=(
            "Possible {side} cotton wool spots.",
            "A cotton wool spot {at} cannot be excluded.",
            "Questionable cotton wool spot {at}.",
            "There may be a cotton wool spot {at}.",
        ),
        questions=(
            "Are there {side} cotton wool spots?",
            "Is there a cotton wool spot {at}?",
            "Does the image show {side} cotton wool spots?",
        ),
    ),
    FindingSpec(
        "peripapillary_atrophy",
        "peripapillary atrophy",
        grades=GRADES,
        positive=(
            "{grade} peripapillary atrophy.",
            "There is {grade} peripapillary atrophy.",
            "Pale atrophy around the disc.",
            "{grade} atrophy around the disc.",
        ),
        negative=(
            "No peripapillary atrophy.",
            "There is no peripapillary atrophy.",
            "No atrophy around the disc.",
            "The disc has no pale rim.",
        ),
        hedged=(
            "Possible {grade} peripapillary atrophy.",
            "Peripapillary atrophy cannot be excluded.",
            "Questionable peripapillary atrophy.",
            "There may be atrophy around the disc.",
        ),
        questions=(
            "Is there peripapillary atrophy?",
            "Is there atrophy around the disc?",
            "Does the image show peripapillary atrophy?",
        ),
    ),
    FindingSpec(
        "tortuous_veins",
        "venous tortuosity",
        positive=(
            "Venous tortuosity.",
            "There is venous tortuosity.",
            "The veins are tortuous.",
            "Wide and tortuous veins.",
        ),
        negative=(
            "No venous tortuosity.",
            "The veins are normal.",
            "There is no venous tortuosity.",
            "The veins are not tortuous.",
        ),
        hedged=(
            "Possible venous tortuosity.",
            "The veins may be tortuous.",
            "Questionable venous tortuosity.",
            "Venous tortuosity cannot be excluded.",
        ),
        questions=(
            "Is there venous tortuosity?",
            "Are the veins tortuous?",
            "Does the image show tortuous veins?",
        ),
    ),
    FindingSpec(
        "macular_scar",
        "macular scar",
        positive=(
            "Macular scar.",
            "There is a macular scar.",
            "A scar is present at the macula.",
            "The macula is scarred.",
        ),
        negative=(
            "No macular scar.",
            "There is no macular scar.",
            "No scar at the macula.",
            "The macula is not scarred.",
        ),
        hedged=(
            "Possible macular scar.",
            "A macular scar cannot be excluded.",
            "Questionable macular scar.",
            "There may be a macular scar.",
        ),
        questions=(
            "Is there a macular scar?",
            "Is the macula scarred?",
            "Does the image show a macular scar?",
        ),
    ),
    FindingSpec(
        "laser_scars",
        "laser scarring",
        sided=True,
        positive=(
            "{side} laser scars.",
            "There are laser scars {at}.",
            "Laser burns {at}.",
            "Old laser scars {at}.",
        ),
        negative=(
            "No laser scars.",
            "There are no laser scars.",
            "No laser burns.",
            "Laser scars are absent.",
        ),
        hedged=(
            "Possible {side} laser scars.",
            "Laser scars {at} cannot be excluded.",
            "Questionable laser scars {at}.",
            "There may be laser scars {at}.",
        ),
        questions=(
            "Are there {side} laser scars?",
            "Are there laser scars {at}?",
            "Does the image show {side} laser scars?",
        ),
    ),
)

ATTRIBUTES = (
    AttributeSpec(
        "eye",
        {
            "right": ("Right eye.", "Fundus of the right eye."),
            "left": ("Left eye.", "Fundus of the left eye."),
        },
    ),
    AttributeSpec(
        "pigmentation",
        {
            "light": ("Light pigmentation.", "Lightly pigmented fundus."),
            "medium": ("Medium pigmentation.", "Average pigmentation."),
            "dark": ("Dark pigmentation.", "Darkly pigmented fundus."),
        },
    ),
    AttributeSpec(
        "media",
        {
            "clear": ("Clear media.", "The media are clear."),
            "hazy": ("Hazy media.", "The media are hazy."),
        },
    ),
    AttributeSpec(
        "field",
        {
            "macula": ("Macula centred.", "The field is centred on the macula."),
            "disc": ("Disc centred.", "The field is centred on the disc."),
        },
    ),
    AttributeSpec(
        "reflex",
        {
            "no": ("No light reflex.",),
            "yes": ("Light reflex at the edge.", "A bright reflex at the edge."),
        },
    ),
)

NORMAL = ("No retinal abnormality.", "Unremarkable fundus photograph.", "Normal fundus.")
