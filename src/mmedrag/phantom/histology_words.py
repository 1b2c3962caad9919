"""What H&E reports, questions and attributes say; :mod:`mmedrag.phantom.histology` draws it."""

from __future__ import annotations

from mmedrag.phantom.grammar import AttributeSpec, FindingSpec

GRADES = ("mild", "moderate", "severe")

FINDINGS = (
    FindingSpec(
        "gland_loss",
        "gland loss",
        grades=GRADES,
        positive=(
            "{grade} gland loss.",
            "There is {grade} loss of glands.",
            "The glands are reduced in number.",
            "{grade} glandular atrophy.",
        ),
        negative=(
            "No gland loss.",
            "There is no loss of glands.",
            "The glands are preserved.",
            "No glandular atrophy.",
        ),
        hedged=(
            "Possible {grade} gland loss.",
            "Some glands may be lost.",
            "Gland loss cannot be excluded.",
            "Questionable gland loss.",
        ),
        questions=("Is there gland loss?", "Are glands lost?", "Does the image show gland loss?"),
    ),
    FindingSpec(
        "necrosis",
        "necrosis",
        sided=True,
        grades=GRADES,
        positive=(
            "{grade} {side} necrosis.",
            "There is {grade} necrosis {at}.",
            "{side} necrosis.",
            "Dead tissue {at}.",
        ),
        negative=(
            "No necrosis.",
            "There is no necrosis.",
            "No dead tissue.",
            "Necrosis is absent.",
        ),
        hedged=(
            "Possible {side} necrosis.",
            "{side} necrosis cannot be excluded.",
            "Questionable {side} necrosis.",
            "There may be dead tissue {at}.",
        ),
        questions=(
            "Is there {side} necrosis?",
            "Is there necrosis {at}?",
            "Does the image show {side} necrosis?",
        ),
    ),
    FindingSpec(
        "mitoses",
        "mitotic figure",
        most=4,
        positive=(
            "{count} mitotic figure{s}.",
            "{count} mitotic figure{s} seen.",
            "There is mitotic activity, {count} figure{s}.",
            "{count} dividing cell{s}.",
        ),
        negative=(
            "No mitotic figure.",
            "There is no mitotic activity.",
            "No dividing cells.",
            "No mitotic figure is seen.",
        ),
        hedged=(
            "Possible mitotic figure.",
            "A mitotic figure cannot be excluded.",
            "Questionable mitotic figure.",
            "There may be a mitotic figure.",
        ),
        questions=(
            "Is there a mitotic figure?",
            "Is a mitotic figure present?",
            "Does the image show a mitotic figure?",
        ),
    ),
    FindingSpec(
        "lymphocytes",
        "lymphocytic infiltrate",
        sided=True,
        grades=GRADES,
        positive=(
            "{grade} {side} lymphocytic infiltrate.",
            "There is a {grade} lymphocytic infiltrate {at}.",
            "{side} lymphocytic infiltrate.",
            "Dense lymphocytes {at}.",
        ),
        negative=(
            "No lymphocytic infiltrate.",
            "There is no lymphocytic infiltrate.",
            "No dense lymphocytes.",
            "Lymphocytes are sparse.",
        ),
        hedged=(
            "Possible {side} lymphocytic infiltrate.",
            "A lymphocytic infiltrate {at} cannot be excluded.",
            "Questionable {side} lymphocytic infiltrate.",
            "There may be lymphocytes {at}.",
        ),
        questions=(
            "Is there a {side} lymphocytic infiltrate?",
            "Is there a lymphocytic infiltrate {at}?",
            "Does the image show a {side} lymphocytic infiltrate?",
        ),
    ),
    FindingSpec(
        "fibrosis",
        "fibrosis",
        grades=GRADES,
        positive=(
            "{grade} fibrosis.",
            "There is {grade} fibrosis.",
            "Dense collagen bands.",
            "{grade} fibrous scarring.",
        ),
        negative=(
            "No fibrosis.",
            "There is no fibrosis.",
            "No collagen bands.",
            "No fibrous scarring.",
        ),
        hedged=(
            "Possible {grade} fibrosis.",
            "Fibrosis cannot be excluded.",
            "Questionable fibrosis.",
            "There may be fibrosis.",
        ),
        questions=("Is there fibrosis?", "Is fibrosis present?", "Does the image show fibrosis?"),
    ),
    FindingSpec(
        "haemorrhage",
        "haemorrhage",
        sided=True,
        positive=(
            "{side} haemorrhage.",
            "There is haemorrhage {at}.",
            "Red blood cells {at}.",
            "Fresh bleeding {at}.",
        ),
        negative=(
            "No haemorrhage.",
            "There is no haemorrhage.",
            "No red blood cells.",
            "No fresh bleeding.",
        ),
        hedged=(
            "Possible {side} haemorrhage.",
            "{side} haemorrhage cannot be excluded.",
            "Questionable {side} haemorrhage.",
            "There may be bleeding {at}.",
        ),
        questions=(
            "Is there {side} haemorrhage?",
            "Is there haemorrhage {at}?",
            "Does the image show {side} haemorrhage?",
        ),
    ),
    FindingSpec(
        "mucin",
        "mucin pool",
        sided=True,
        positive=(
            "{side} mucin pool.",
            "There is a mucin pool {at}.",
            "Mucin pools {at}.",
            "Extracellular mucin {at}.",
        ),
        negative=(
            "No mucin pool.",
            "There is no mucin pool.",
            "No extracellular mucin.",
            "Mucin is absent.",
        ),
        hedged=(
            "Possible {side} mucin pool.",
            "A mucin pool {at} cannot be excluded.",
            "Questionable {side} mucin pool.",
            "There may be mucin {at}.",
        ),
        questions=(
            "Is there a {side} mucin pool?",
            "Is there a mucin pool {at}?",
            "Does the image show a {side} mucin pool?",
        ),
    ),
    FindingSpec(
        "nuclear_atypia",
        "nuclear atypia",
        grades=GRADES,
        positive=(
            "{grade} nuclear atypia.",
            "There is {grade} nuclear atypia.",
            "The nuclei are large and irregular.",
            "{grade} atypia of the nuclei.",
        ),
        negative=(
            "No nuclear atypia.",
            "There is no nuclear atypia.",
            "The nuclei are regular.",
            "No atypia of the nuclei.",
        ),
        hedged=(
            "Possible {grade} nuclear atypia.",
            "Nuclear atypia cannot be excluded.",
            "Questionable nuclear atypia.",
            "The nuclei may be irregular.",
        ),
        questions=(
            "Is there nuclear atypia?",
            "Are the nuclei atypical?",
            "Does the image show nuclear atypia?",
        ),
    ),
    FindingSpec(
        "calcification",
        "calcification",
        sided=True,
        positive=(
            "{side} calcification.",
            "There is calcification {at}.",
            "Calcium grains {at}.",
            "Calcified bodies {at}.",
        ),
        negative=(
            "No calcification.",
            "There is no calcification.",
            "No calcium grains.",
            "No calcified bodies.",
        ),
        hedged=(
            "Possible {side} calcification.",
            "{side} calcification cannot be excluded.",
            "Questionable {side} calcification.",
            "There may be calcium {at}.",
        ),
        questions=(
            "Is there {side} calcification?",
            "Is there calcification {at}?",
            "Does the image show {side} calcification?",
        ),
    ),
    FindingSpec(
        "fat",
        "fat infiltration",
        sided=True,
        positive=(
            "{side} fat infiltration.",
            "There is fat infiltration {at}.",
            "Fat cells {at}.",
            "Mature adipose tissue {at}.",
        ),
        negative=(
            "No fat infiltration.",
            "There is no fat infiltration.",
            "No fat cells.",
            "No adipose tissue.",
        ),
        hedged=(
            "Possible {side} fat infiltration.",
            "Fat infiltration {at} cannot be excluded.",
            "Questionable {side} fat infiltration.",
            "There may be fat {at}.",
        ),
        questions=(
            "Is there {side} fat infiltration?",
            "Is there fat infiltration {at}?",
            "Does the image show {side} fat infiltration?",
        ),
    ),
)

ATTRIBUTES = (
    AttributeSpec(
        "stain",
        {
            "pale": ("Pale stain.", "The section is stained lightly."),
            "dark": ("Dark stain.", "The section is stained deeply."),
        },
    ),
    AttributeSpec(
        "hue",
        {
            "pink": ("Pink hue.", "Eosin dominates."),
            "purple": ("Purple hue.", "Haematoxylin dominates."),
        },
    ),
    AttributeSpec(
        "architecture",
        {
            "acinar": ("Acinar glands.", "Small round glands."),
            "tubular": ("Tubular glands.", "Long parallel glands."),
            "cystic": ("Cystic glands.", "Wide dilated glands."),
        },
    ),
    AttributeSpec(
        "magnification",
        {
            "low": ("Low magnification.", "Low power field."),
            "high": ("High magnification.", "High power field."),
        },
    ),
    AttributeSpec(
        "edge",
        {
            "no": ("Tissue fills the field.", "No tissue edge."),
            "yes": ("Tissue edge in the field.", "Empty glass at one side."),
        },
    ),
)

NORMAL = ("No significant abnormality.", "Unremarkable tissue.", "Normal histology.")
