"""What the operator of a server decides."""

from dataclasses import dataclass, field

__all__ = ["MEBIBYTE", "Settings"]

MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Settings:
    """Of one server."""

    model: str
    """The name by which requests know the model."""
    max_new_tokens: int = 4096
    """Most tokens of a reply; who asks for more is refused."""
    max_body: int = 16 * MEBIBYTE
    """Most bytes of a request."""
    max_prompts: int = 256
    """Most prompts of one request."""
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """Who knows one may ask; none: everybody."""
    rate_limit: float | None = None
    """Requests a minute from one key or address, as many at once; None: any."""
    cors_origins: tuple[str, ...] = ()
    """Pages of these origins may ask from a browser; `*`: all."""
    log_prompts: bool = False
    """Whether log lines hold what was asked."""
    max_weighed: int = 1 << 16
    """Most tokens of prompts that `echo` gives back with log-probabilities in one request; each takes some 2 KB."""
