"""One random stream per purpose, so that logging or evaluating more changes no other result."""

import hashlib


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Return a seed for one purpose, independent of the seeds for all others.

    Example: ``derive_seed(recipe.seed, "rollout", step)``.
    """
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
