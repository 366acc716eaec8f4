"""The one error that a user's mistake raises."""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting that cannot work, told so that the reader knows what to change.

    Attributes:
        what: the flag, key or file and the value it has, e.g. ``--num-attention-heads 6``.
        why: the reason it cannot work.
        fix: what to do instead.
    """

    def __init__(self, what: str, why: str, fix: str) -> None:
        """Joins the three parts to the message."""
        self.what, self.why, self.fix = what, why, fix
        super().__init__(f"{what}: {why}\n  fix: {fix}")

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, str, str]]:
        """Pickles by its three parts, so that it crosses process boundaries whole."""
        return type(self), (self.what, self.why, self.fix)
