from . import card as card, train as train, trainer as trainer
from .encode import PairTokenizer as PairTokenizer
from .policy import linear_targets as linear_targets
from .prepare import image_tokens as image_tokens, pixel_reader as pixel_reader
from .settings import DpoTraining as DpoTraining
from .train import train_dpo as train_dpo
