"""Text as it may be shown: what a model or a file says must not steer a terminal."""

from llmdoctor.harmless import clean

__all__ = ["END", "clean", "one_line", "prompt_end", "quoted", "trimmed", "visible"]

END = "∎"  # stands for a token without text, such as the end of the answer
_PROMPT_SHOWN = 400  # characters


def one_line(text: str) -> str:
    """The cleaned text on one line, every run of white space a single space."""
    return " ".join(clean(text).split())


def quoted(text: str) -> str:
    """A token as the cell of a table: white space made visible, END where there is no text."""
    return clean(text).replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·") or END


def visible(token: str) -> str:
    """A token in a line of text: its line breaks made visible, END where there is no text."""
    return clean(token).replace("\n", "⏎") or END


def prompt_end(prompt: str) -> str:
    """The cleaned prompt; of a long one the end, because that is what the answers answer."""
    prompt = clean(prompt).strip()
    return prompt if len(prompt) <= _PROMPT_SHOWN else f"… {prompt[-_PROMPT_SHOWN:].lstrip()}"


def trimmed(pieces: list[str]) -> list[str]:
    """The pieces without the white space around the whole text; still as many pieces."""
    text = "".join(pieces)
    start, stop = len(text) - len(text.lstrip()), len(text.rstrip())
    kept, at = [], 0
    for piece in pieces:
        kept.append(piece[max(0, start - at) : max(0, stop - at)])
        at += len(piece)
    return kept
