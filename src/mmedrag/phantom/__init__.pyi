from .build import build_benchmark as build_benchmark, questions_of as questions_of
from .canvas import Canvas as Canvas, Rng as Rng
from .grammar import (
    DOMAINS as DOMAINS,
    DomainSpec as DomainSpec,
    Findings as Findings,
    has as has,
    label_report as label_report,
    load_domain as load_domain,
    split_sentences as split_sentences,
    structured_report as structured_report,
    write_report as write_report,
)
from .questions import (
    Question as Question,
    ask_closed as ask_closed,
    ask_open as ask_open,
    ask_presence as ask_presence,
    balance as balance,
    cells as cells,
)
from .reading import (
    findings_in as findings_in,
    present_in as present_in,
    read_reference as read_reference,
)
from .regimes import (
    Regime as Regime,
    load_regime as load_regime,
    regime_retriever as regime_retriever,
)
from .sample import Study as Study, picture as picture, report as report, studies as studies
from .settings import Knobs as Knobs
