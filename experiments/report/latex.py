"""Tables in LaTeX (booktabs) that compile whatever they hold, with pdfLaTeX's own fonts.

pandas' Styler writes the table; what it leaves open is done here: characters beyond ASCII, which it passes on as they
are, and a `[` at the start of a row, which LaTeX takes for an argument of the line break; columns that wrap; a table
wider than the line, and one longer than a page.
"""

from __future__ import annotations

import math
import re
import unicodedata

import pandas as pd

LINE, LONG, SHORT = 75, 32, 20
"""Characters of a line of LaTeX, and of a column that breaks its lines: a short one does where the table is wider than
the line."""
PAGE = 40
"""Lines of a table that fit a page with its caption."""
SHRUNK = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"


def latex(table: pd.DataFrame, name: str, caption: str) -> str:
    """A table that is never wider than the line: long texts are wrapped, and what is still too wide is shrunk. One that
    is longer than a page comes in parts.

    Needs \\usepackage{array,booktabs,graphicx}.
    """
    texts = table.map(one_line)
    columns = [[one_line(label), *texts.iloc[:, i]] for i, label in enumerate(table.columns)]
    limit = LONG if sum(max(map(len, column)) + 2 for column in columns) <= LINE else SHORT
    widths = [_wrapped_width(column, limit) for column in columns]
    heights = [
        max(_lines(text, width) for text, width in zip(row, widths, strict=True))
        for row in texts.itertuples(index=False)
    ]
    escaped = texts.map(escape).set_axis([escape(label) for label in table.columns], axis="columns")
    parts = _pages(heights)
    floats = []
    for number, rows in enumerate(parts, 1):
        label, of_parts = (name, "") if len(parts) == 1 else (f"{name}_{number}", f" Part {number} of {len(parts)}.")
        styled = escaped.iloc[rows].style.hide(axis="index").to_latex(
            column_format="".join(map(_column_type, columns, widths)),
            caption=escape(caption + of_parts),
            label=f"tab:{label}",
            position="t",
            position_float="centering",
            hrules=True,
        )  # fmt: skip
        body = styled.replace(r"\begin{tabular}", f"{SHRUNK}\n\\begin{{tabular}}")
        floats.append(body.replace(r"\end{tabular}", r"\end{tabular}}"))
    return "% \\usepackage{array,booktabs,graphicx}\n" + "\\clearpage\n".join(floats)


def one_line(value: object) -> str:
    """A cell as one line; empty where there is nothing."""
    return "" if isinstance(value, float) and math.isnan(value) else " ".join(str(value).split())


def _wrapped_width(texts: list[str], limit: int) -> float | None:
    """Width in em of a column that wraps: one with a text beyond `limit` characters, but never so narrow that a word
    would break."""
    longest, word = max(map(len, texts)), max(len(word) for text in texts for word in ["", *text.split()])
    return None if longest <= limit or word == longest else max(min(12, 4 + longest / 16), 0.6 * word)


def _column_type(texts: list[str], width: float | None) -> str:
    """Numbers to the right, texts to the left, wrapped where there is a width."""
    number = all(re.fullmatch(r"[-+−]?[\d.,]*( ± [\d.]+)?", text) for text in texts[1:])
    if width is None:
        return "r" if number else "l"
    return f">{{\\{'raggedleft' if number else 'raggedright'}\\arraybackslash}}p{{{width:.1f}em}}"


def _lines(text: str, width: float | None) -> int:
    """About how many lines a cell takes, at two characters an em."""
    return 1 if width is None else max(1, math.ceil(len(text) / (1.8 * width)))


def _pages(heights: list[int]) -> list[slice]:
    """Consecutive rows that fit a page each, by the lines of every row; a table without rows is one part."""
    starts, filled = [0], 0
    for row, needed in enumerate(heights):
        if filled and filled + needed > PAGE:
            starts.append(row)
            filled = 0
        filled += needed
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], len(heights)], strict=True)]


GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon phi chi psi "
    "omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega"
)
RELATIONS = "pm to leftarrow geq leq approx neq times cdot infty surd mu"
NAMED = dict(zip("αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΦΨΩ", GREEK.split(), strict=True))
NAMED |= dict(zip("±→←≥≤≈≠×·∞√µ", RELATIONS.split(), strict=True))
MATHEMATICS = {c: f"\\{name}" for c, name in NAMED.items()} | {c: c for c in "<>|"}
MATHEMATICS |= {"−": "-", "²": "^2", "³": "^3", "°": r"^\circ"}
COMMANDS = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "–": "--", "—": "---", "…": r"\ldots{}", "“": "``", "”": "''", "‘": "`", "’": "'",
}  # fmt: skip
COMMANDS |= {c: f"{{{c}}}" for c in '[]*`"'}  # after a line break, or doubled, these mean something
COMMANDS |= {c: f"${command}$" for c, command in MATHEMATICS.items()}


def escape(value: object) -> str:
    """A cell as LaTeX that compiles whatever it holds; a character that pdfLaTeX's fonts lack becomes its plain form,
    or its code point."""
    signed = re.sub(r"(?<![\w.)\]])-(?=[\d.])", "−", one_line(value))
    return "".join(map(_character, signed))


def _character(c: str) -> str:
    if c in COMMANDS:
        return COMMANDS[c]
    if c.isascii() or ("À" <= c <= "ÿ" and c not in "ÐðÞþ"):
        return c if c.isprintable() else ""
    plain = unicodedata.normalize("NFKD", c).encode("ascii", "ignore").decode()
    return "".join(COMMANDS.get(each, each) for each in plain) or f"U+{ord(c):04X}"
