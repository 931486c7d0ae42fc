"""Documents that a command line names: text files, or stdin."""

from pathlib import Path

import typer

from d2l.inference.documents import read_text

STDIN = "-"


def read_document(name: str, advice: str = "pass a text file, or - for stdin") -> str:
    """Read the text of a document.

    Args:
        name: a file, or `-` for stdin.
        advice: what to change where there is no such file.

    Raises:
        DataError: the file cannot be read, is too large, or is not text.
    """
    from d2l.data.document import decode_document

    if name == STDIN:
        return decode_document(typer.get_binary_stream("stdin").read(), "stdin")
    return read_text(Path(name), advice)
