from . import lite as lite
from .base import Towers as Towers, ahead as ahead
from .load import (
    encoder_of_folder as encoder_of_folder,
    is_installed as is_installed,
    load_encoder as load_encoder,
    load_towers as load_towers,
)
