"""What to say of a word that is none of those accepted."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

FIELD_WORDS = {
    "vae": "codec", "autoencoder": "codec", "transformer": "denoiser", "unet": "denoiser", "dit": "denoiser",
    "text_encoder": "text", "image_encoder": "image", "learning_rate": "lr", "max_steps": "steps", "batch_size": "batch",
}  # fmt: skip
"""What others call a key, and what it is called here."""


def nearest(word: str, accepted: Iterable[str]) -> str:
    """The accepted words, and the one that was probably meant."""
    accepted = list(accepted)
    plain = word.lower().replace("-", "_")
    close = difflib.get_close_matches(word, accepted, n=1, cutoff=0.6) or [
        a for a in accepted if a.lower().replace("_", "") == plain.replace("_", "")
    ]
    if FIELD_WORDS.get(plain) in accepted:
        close = [FIELD_WORDS[plain]]
    choices = f"accepted: {', '.join(accepted) or 'nothing'}"
    return f"did you mean {close[0]}? ({choices})" if close else choices
