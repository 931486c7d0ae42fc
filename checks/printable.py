"""Texts for people and for their programs, in which what comes from data cannot act."""


def printable(text: str) -> str:
    """Escape control characters: evidence can quote a data set, which must not reach a terminal or parser as it is.

    What is left are printable characters and `\\n`: no lone surrogate, nothing that XML or a terminal takes as a sign.
    """
    text = text.replace("\r\n", "\n").replace("\t", "    ")
    return "".join(char if char == "\n" or char.isprintable() else ascii(char)[1:-1] for char in text)
