from . import deep as deep, dicom as dicom, files as files
from .alike import (
    MAX_BITS as MAX_BITS,
    MIN_LIKENESS as MIN_LIKENESS,
    Look as Look,
    fine as fine,
    near_identical as near_identical,
    perceptual_hash as perceptual_hash,
    pixel_hash as pixel_hash,
)
from .dicom import count_frames as count_frames, pictures as pictures, read as read
from .files import (
    decode_image as decode_image,
    load_image as load_image,
    looks_like_dicom as looks_like_dicom,
)
from .noise import apply_noise as apply_noise
from .strip import clean_copy as clean_copy, png_bytes as png_bytes
