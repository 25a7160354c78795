"""Text for a terminal."""

__all__ = ["printable"]


def printable(text: str) -> str:
    """On one line whatever a file is called: control characters and broken Unicode as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
