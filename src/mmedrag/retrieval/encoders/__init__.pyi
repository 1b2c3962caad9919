from .base import ahead as ahead
from .load import load_encoder as load_encoder, load_towers as load_towers
