"""What chest X-ray reports, questions and attributes say; :mod:`mmedrag.phantom.chest` draws it."""

from __future__ import annotations

from mmedrag.phantom.grammar import AttributeSpec, FindingSpec

GRADES = ("mild", "moderate", "severe")

FINDINGS = (
    FindingSpec(
        "cardiomegaly",
        "cardiomegaly",
        grades=GRADES,
        positive=(
            "{grade} cardiomegaly.",
            "There is {grade} cardiomegaly.",
            "The heart is enlarged.",
            "{grade} enlargement of the heart.",
        ),
        negative=(
            "The heart is normal in size.",
            "Heart size is normal.",
            "No cardiomegaly.",
            "The heart is not enlarged.",
        ),
        hedged=(
            "Possible {grade} cardiomegaly.",
            "The heart may be enlarged.",
            "Cardiomegaly cannot be excluded.",
            "Questionable cardiomegaly.",
        ),
        questions=(
            "Is there cardiomegaly?",
            "Is the heart enlarged?",
            "Does the image show cardiomegaly?",
        ),
    ),
    FindingSpec(
        "pleural_effusion",
        "pleural effusion",
        sided=True,
        grades=GRADES,
        positive=(
            "{grade} {side} pleural effusion.",
            "There is a {grade} pleural effusion {at}.",
            "{side} pleural effusion.",
            "Pleural fluid {at}.",
        ),
        negative=(
            "No pleural effusion.",
            "There is no pleural effusion.",
            "No pleural fluid.",
            "The costophrenic angles are sharp.",
        ),
        hedged=(
            "Possible {side} pleural effusion.",
            "{side} pleural effusion cannot be excluded.",
            "Questionable {side} pleural effusion.",
            "There may be pleural fluid {at}.",
        ),
        questions=(
            "Is there a {side} pleural effusion?",
            "Is there a pleural effusion {at}?",
            "Does the image show {side} pleural effusion?",
        ),
    ),
    FindingSpec(
        "pneumothorax",
        "pneumothorax",
        sided=True,
        grades=GRADES,
        positive=(
            "{grade} {side} pneumothorax.",
            "There is a {grade} pneumothorax {at}.",
            "{side} pneumothorax.",
            "Pleural air {at}.",
        ),
        negative=(
            "No pneumothorax.",
            "There is no pneumothorax.",
            "No pleural air.",
            "Pneumothorax is absent.",
        ),
        hedged=(
            "Possible {side} pneumothorax.",
            "{side} pneumothorax cannot be excluded.",
            "Questionable {side} pneumothorax.",
            "There may be pleural air {at}.",
        ),
        questions=(
            "Is there a {side} pneumothorax?",
            "Is there a pneumothorax {at}?",
            "Does the image show {side} pneumothorax?",
        ),
    ),
    FindingSpec(
        "consolidation",
        "consolidation",
        sided=True,
        grades=GRADES,
        positive=(
            "{grade} {side} consolidation.",
            "There is {grade} consolidation {at}.",
            "{side} consolidation.",
            "Airspace opacity {at}.",
        ),
        negative=(
            "No consolidation.",
            "There is no consolidation.",
            "No airspace opacity.",
            "No focal airspace disease.",
        ),
        hedged=(
            "Possible {side} consolidation.",
            "{side} consolidation cannot be excluded.",
            "Questionable {side} consolidation.",
            "There may be airspace opacity {at}.",
        ),
        questions=(
            "Is there {side} consolidation?",
            "Is there consolidation {at}?",
            "Does the image show {side} consolidation?",
        ),
    ),
    FindingSpec(
        "nodule",
        "pulmonary nodule",
        sided=True,
        most=3,
        positive=(
            "{count} pulmonary nodule{s} {at}.",
            "There is pulmonary nodular disease, {count} nodule{s} {at}.",  # noqa: E501
            "{count} {side} lung nodule{s}.",
            "{count} nodule{s} seen {at}.",
        ),
        negative=(
            "No pulmonary nodule.",
            "There is no lung nodule.",
            "No nodules.",
            "No nodule is seen.",
        ),
        hedged=(
            "Possible {side} lung nodule.",
            "A nodule {at} cannot be excluded.",
            "Questionable pulmonary nodule {at}.",
            "There may be a nodule {at}.",
        ),
        questions=(
            "Is there a {side} pulmonary nodule?",
            "Is there a pulmonary nodule {at}?",
            "Does the image show a {side} pulmonary nodule?",
        ),
    ),
    FindingSpec(
        "atelectasis",
        "atelectasis",
        sided=True,
        positive=(
            "{side} basal atelectasis.",
            "There is atelectasis {at}.",
            "Linear atelectasis {at}.",
            "Plate atelectasis {at}.",
        ),
        negative=(
            "No atelectasis.",
            "There is no atelectasis.",
            "No linear atelectasis.",
            "No volume loss.",
        ),
        hedged=(
            "Possible {side} atelectasis.",
            "{side} atelectasis cannot be excluded.",
            "Questionable {side} atelectasis.",
            "There may be atelectasis {at}.",
        ),
        questions=(
            "Is there {side} atelectasis?",
            "Is there atelectasis {at}?",
            "Does the image show {side} atelectasis?",
        ),
    ),
    FindingSpec(
        "pulmonary_edema",
        "pulmonary edema",
        grades=GRADES,
        positive=(
            "{grade} pulmonary edema.",
            "There is {grade} pulmonary edema.",
            "Perihilar haze of pulmonary edema.",
            "{grade} interstitial edema.",
        ),
        negative=(
            "No pulmonary edema.",
            "There is no pulmonary edema.",
            "No interstitial edema.",
            "No vascular congestion.",
        ),
        hedged=(
            "Possible {grade} pulmonary edema.",
            "Pulmonary edema cannot be excluded.",
            "Questionable pulmonary edema.",
            "There may be pulmonary edema.",
        ),
        questions=(
            "Is there pulmonary edema?",
            "Does the image show pulmonary edema?",
            "Is pulmonary edema present?",
        ),
    ),
    FindingSpec(
        "rib_fracture",
        "rib fracture",
        sided=True,
        most=3,
        positive=(
            "{count} rib fracture{s} {at}.",
            "{count} {side} rib fracture{s}.",
            "There is rib trauma, {count} fracture{s} {at}.",
            "{count} fractured rib{s} {at}.",
        ),  # noqa: E501
        negative=(
            "No rib fracture.",
            "There is no rib fracture.",
            "The ribs are intact.",
            "No fractured rib.",
        ),
        hedged=(
            "Possible {side} rib fracture.",
            "A rib fracture {at} cannot be excluded.",
            "Questionable {side} rib fracture.",
            "There may be a rib fracture {at}.",
        ),
        questions=(
            "Is there a {side} rib fracture?",
            "Is there a rib fracture {at}?",
            "Does the image show a {side} rib fracture?",
        ),
    ),
    FindingSpec(
        "elevated_hemidiaphragm",
        "elevated hemidiaphragm",
        sided=True,
        positive=(
            "Elevated {side} hemidiaphragm.",
            "There is an elevated hemidiaphragm {at}.",
            "The hemidiaphragm is raised {at}.",
            "High hemidiaphragm {at}.",
        ),
        negative=(
            "No elevated hemidiaphragm.",
            "The hemidiaphragms are normal.",
            "No hemidiaphragm elevation.",
            "The hemidiaphragms are level.",
        ),
        hedged=(
            "Possible elevated {side} hemidiaphragm.",
            "The hemidiaphragm may be raised {at}.",
            "Questionable elevated hemidiaphragm {at}.",
            "An elevated hemidiaphragm {at} cannot be excluded.",
        ),
        questions=(
            "Is there an elevated {side} hemidiaphragm?",
            "Is the hemidiaphragm elevated {at}?",
            "Does the image show an elevated {side} hemidiaphragm?",
        ),
    ),
    FindingSpec(
        "hiatal_hernia",
        "hiatal hernia",
        positive=(
            "Hiatal hernia.",
            "There is a hiatal hernia.",
            "Retrocardiac lucency of a hiatal hernia.",
            "A hiatal hernia is present.",
        ),
        negative=(
            "No hiatal hernia.",
            "There is no hiatal hernia.",
            "No retrocardiac lucency.",
            "Hiatal hernia is absent.",
        ),
        hedged=(
            "Possible hiatal hernia.",
            "A hiatal hernia cannot be excluded.",
            "Questionable hiatal hernia.",
            "There may be a hiatal hernia.",
        ),
        questions=(
            "Is there a hiatal hernia?",
            "Does the image show a hiatal hernia?",
            "Is a hiatal hernia present?",
        ),
    ),
    FindingSpec(
        "central_line",
        "central line",
        sided=True,
        positive=(
            "{side} central line.",
            "There is a central line {at}.",
            "Central venous catheter {at}.",
            "A central line enters {at}.",
        ),
        negative=(
            "No central line.",
            "There is no central line.",
            "No central venous catheter.",
            "A central line is not seen.",
        ),
        hedged=(
            "Possible {side} central line.",
            "A central line {at} cannot be excluded.",
            "Questionable central line {at}.",
            "There may be a central line {at}.",
        ),
        questions=(
            "Is there a {side} central line?",
            "Is there a central line {at}?",
            "Does the image show a {side} central line?",
        ),
    ),
    FindingSpec(
        "pacemaker",
        "pacemaker",
        sided=True,
        positive=(
            "{side} pacemaker.",
            "There is a pacemaker {at}.",
            "Pacemaker generator {at}.",
            "A pacemaker is implanted {at}.",
        ),
        negative=(
            "No pacemaker.",
            "There is no pacemaker.",
            "No pacemaker generator.",
            "A pacemaker is not seen.",
        ),
        hedged=(
            "Possible {side} pacemaker.",
            "A pacemaker {at} cannot be excluded.",
            "Questionable pacemaker {at}.",
            "There may be a pacemaker {at}.",
        ),
        questions=(
            "Is there a {side} pacemaker?",
            "Is there a pacemaker {at}?",
            "Does the image show a {side} pacemaker?",
        ),
    ),
)

ATTRIBUTES = (
    AttributeSpec(
        "view",
        {
            "PA": ("PA view.", "Upright PA radiograph.", "Posteroanterior projection."),
            "AP": ("AP view.", "Portable AP radiograph.", "Anteroposterior projection."),
        },
    ),
    AttributeSpec(
        "habitus",
        {
            "slim": ("Slim habitus.", "Thin patient."),
            "average": ("Average habitus.", "Average build."),
            "large": ("Large habitus.", "Large body habitus."),
        },
    ),
    AttributeSpec(
        "volumes",
        {
            "normal": ("Normal lung volumes.", "Good inspiration."),
            "low": ("Low lung volumes.", "Poor inspiration."),
        },
    ),
    AttributeSpec(
        "position",
        {
            "straight": ("Well centred.", "No rotation."),
            "rotated": ("Rotated film.", "The patient is rotated."),
        },
    ),
    AttributeSpec(
        "leads",
        {
            "no": ("No monitoring leads.",),
            "yes": ("Monitoring leads overlie the chest.", "ECG leads in place."),
        },
    ),
)

NORMAL = (
    "No acute cardiopulmonary abnormality.",
    "Unremarkable chest radiograph.",
    "Normal chest.",
)
