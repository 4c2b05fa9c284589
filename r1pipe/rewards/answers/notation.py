"""One notation for what people write: Unicode signs, LaTeX dressing and program spellings.

`tidy` is for reading numbers, words and structure; `to_latex` is for the parser of formulas.
"""

import re
import unicodedata
from collections.abc import Sequence
from fractions import Fraction

_MEANINGS = {  # what is written: the signs for it
    "-": "−–—‐‑‒﹣",
    " ": "\u00a0\u2002\u2003\u2009\u200a\u202f\u3000\t\n\r",
    "": "\u200b\u2060\ufeff\u2061\u2062",
    "/": "÷∕⁄",
    ":": "∶",
    ",": "、",
    ".": "。",
    '"': "“”",
    "'": "‘’′",
    "¥": "￥",
    "£": "￡",
    "¢": "￠",
    r"\cdot ": "·⋅∙",
    r"\times ": "×✕",
    r"\pm ": "±",
    r"\le ": "≤⩽≦",
    r"\ge ": "≥⩾≧",
    r"\ne ": "≠",
    r"\approx ": "≈",
    r"\in ": "∈",
    r"\cup ": "∪",
    r"\cap ": "∩",
    r"\infty ": "∞",
    r"\emptyset ": "∅",
    r"\mathbb{R}": "ℝ",
    r"\sqrt ": "√",
    r"\sqrt[3] ": "∛",
    r"\angle ": "∠",
    r"\triangle ": "△",
    r"\ldots ": "…⋯",
    r"^{\circ}": "°º",
    r"^{\circ}C": "℃",
    r"^{\circ}F": "℉",
}
_GREEK = """
    alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau phi chi psi
    omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega
"""
_GREEK_SIGNS = zip("αβγδεζηθικλμνξπρστφχψωΓΔΘΛΞΠΣΦΨΩ", _GREEK.split(), strict=True)
_SIGNS = {sign: meaning for meaning, signs in _MEANINGS.items() for sign in signs}
_SIGNS |= {sign: f"\\{name} " for sign, name in _GREEK_SIGNS}
_FULL_WIDTH = {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
_TABLE = str.maketrans(_FULL_WIDTH | _SIGNS)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_FRACTION_SIGN = re.compile("[¼½¾⅐-⅞]")

_TEXT = (
    r"\\(?:text|mathrm|mbox|textbf|mathbf|textit|mathit|textrm|mathsf|texttt|"
    r"boldsymbol|bm|underline|overbrace|underbrace|operatorname|ensuremath|ce|rm|bf|tt)"
)
_TEXT_GROUP = re.compile(_TEXT + r"\s*\*?\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_BARE_TEXT = re.compile(_TEXT + r"(?![A-Za-z{])")
_SIZES = re.compile(
    r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits|nolimits|tiny|small|normalsize|large|Large|LARGE|"
    r"huge|Huge|checkmark|therefore|Rightarrow|implies)(?![A-Za-z])"
)
_COLOUR = re.compile(r"\\(?:text)?color\s*\{[^{}]*\}|\\colorbox\s*\{[^{}]*\}(?=\s*\{)")
_SPELLINGS = (  # other ways to write the same
    (re.compile(r"\b(?:the )?empty set\b|空集", re.IGNORECASE), r"\\emptyset"),
    (re.compile(r"\b(?:negative|minus) infinity\b|负无穷大?", re.IGNORECASE), r"-\\infty"),
    (re.compile(r"\\not\s*="), r"\\ne "),
    (re.compile(r"\^\s*\{?\s*\\prime\s*\}?"), "'"),
    (re.compile(r"\\log\s*_\s*\{?e\}?(?![A-Za-z])"), r"\\ln "),
    (re.compile(r"\\dot\s*\{?(\d)\}?(\d*)\\dot\s*\{?(\d)\}?"), r"\\overline{\1\2\3}"),
    (re.compile(r"\{-\}"), "-"),
    (re.compile(r"(?<=\d)\{,\}(?!\d{3}(?!\d))"), ","),
    (re.compile(r"\\bar\s*\{(?=[A-Za-z]\})"), r"\\overline{"),
    (re.compile(r"\\bar\s+([A-Za-z])(?![A-Za-z])"), r"\\overline{\1}"),
    (re.compile(r"\{\s*([^{}]+?)\s*\\choose\s*([^{}]+?)\s*\}"), r"\\binom{\1}{\2}"),
    (re.compile(r"(?:\{\})?_\{?(\d+)\}?C_\{?(\d+)\}?"), r"\\binom{\1}{\2}"),
    (
        re.compile(r"(?<![A-Za-z])C_\{?(\d+)\}?\^\{?(\d+)\}?|(?<![A-Za-z])C\((\d+),\s*(\d+)\)"),
        r"\\binom{\1\3}{\2\4}",
    ),
)
_MAY_BE_RESPELLED = re.compile(r"[\\{]|C[_(]|empty set|infinity|空集|负无穷", re.IGNORECASE)
_CIRCLED = re.compile(r"[①-⑳](?:\s*[、,，和]?\s*[①-⑳])*")
_OVER = re.compile(r"\{\s*([^{}]+?)\s*\\over\s*([^{}]+?)\s*\}")
_ALIGNED = re.compile(r"\\begin\{(aligned|align\*?|gathered|cases)\}(.*?)\\end\{\1\}", re.DOTALL)
_ARRAY = re.compile(r"[\[(]\s*\\begin\{array\}\{[lcr|]*\}(.*?)\\end\{array\}\s*[\])]", re.DOTALL)
_BLANKS = re.compile(r"(?<!\\)\\[,;:> ]|\\q?quad(?![A-Za-z])|~")
_GROUPS_OF_DIGITS = re.compile(r"(?<=\d)(?:\{,\}|\\[,;:! ]|[ '])(?=\d{3}(?!\d))")
_COMMAND_MEANINGS = {
    r"\frac": [r"\dfrac", r"\tfrac", r"\cfrac"],
    r"\binom": [r"\dbinom", r"\tbinom"],
    r"\le": [r"\leq", r"\leqslant"],
    r"\ge": [r"\geq", r"\geqslant"],
    r"\ne": [r"\neq"],
    "<": [r"\lt"],
    ">": [r"\gt"],
    "/": [r"\div"],
    "*": [r"\ast"],
    ":": [r"\colon"],
    "|": [r"\lvert", r"\rvert", r"\vert", r"\mid"],
    "(": [r"\langle"],
    ")": [r"\rangle"],
    r"\{": [r"\lbrace"],
    r"\}": [r"\rbrace"],
    "[": [r"\lbrack"],
    "]": [r"\rbrack"],
    r"\ldots": [r"\dots", r"\cdots", r"\dotsc", r"\dotsb"],
    r"^{\circ}": [r"\degree"],
    r"\emptyset": [r"\varnothing"],
    r"\infty": [r"\infin"],
    " and ": [r"\land", r"\wedge"],
    " or ": [r"\lor", r"\vee"],
    "$": [r"\textdollar"],
    "€": [r"\euro"],
    "£": [r"\pounds"],
    "": [r"\mathop"],
}
_COMMANDS = {command: meaning for meaning, several in _COMMAND_MEANINGS.items() for command in several}
_COMMAND = re.compile(r"\\[A-Za-z]+")
_BOLD = re.compile(r"\*\*(?=\S)(.+?)(?<=\S)\*\*")
_DOLLARS = re.compile(r"(?<!\\)\$\$?([^$]*?[^$\\])\$\$?")
_MARKUP = re.compile(
    r"(?<!\\)\\[()\[\]]|`|[☀-➿\U0001f000-\U0001faff]|</?(?:b|i|u|em|strong|span|p|center|div|br)\b[^<>]*>"
)


def tidy(text: str) -> str:
    """A text without dressing: signs in ASCII or LaTeX, no \\text{}, \\left, dollars and bold."""
    if not text.isascii():
        text = _FRACTION_SIGN.sub(lambda match: f" {_ascii_fraction(match[0])}", text)  # 3½ is 3 1/2
        text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda match: f"^{{{match[0].translate(_SUPERSCRIPTS)}}}", text)
        text = re.sub("[₀-₉]+", lambda match: f"_{{{match[0].translate(_SUBSCRIPTS)}}}", text)
        text = text.translate(_TABLE)
    if not text.isascii():
        text = _CIRCLED.sub(_circled, text)
    text = _DOLLARS.sub(r"\1", _BOLD.sub(r"\1", text))
    text = _GROUPS_OF_DIGITS.sub(",", _MARKUP.sub("", text))
    if "\\" in text:
        text = _OVER.sub(r"\\frac{\1}{\2}", _COLOUR.sub("", _SIZES.sub("", text)))
        text = _ARRAY.sub(r"\\begin{pmatrix}\1\\end{pmatrix}", _ALIGNED.sub(_rows, text))
        while (plain := _TEXT_GROUP.sub(_contents, text)) != text:
            text = plain
        text = _COMMAND.sub(lambda match: _COMMANDS.get(match[0], match[0]), _BARE_TEXT.sub("", text))
        text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?", r"^{\\circ}", text.replace(r"\!", ""))
        for escaped in "$%#&":
            text = text.replace(f"\\{escaped}", escaped)
        text = _BLANKS.sub(" ", text)
    for written, meant in _SPELLINGS if _MAY_BE_RESPELLED.search(text) else ():
        text = written.sub(meant, text)
    text = re.sub(r"\s+", " ", text.removesuffix("\\")).strip(" ~")
    return text[1:-1].strip() if re.fullmatch(r"\{[^{}]*\}", text) else text


def _ascii_fraction(sign: str) -> str:
    return unicodedata.normalize("NFKC", sign).replace("\u2044", "/")


def _circled(match: re.Match[str]) -> str:
    """①③ as "1, 3"."""
    return ", ".join(str(ord(sign) - ord("①") + 1) for sign in re.findall("[①-⑳]", match[0]))


def _rows(match: re.Match[str]) -> str:
    """The rows of an aligned formula or a system as a list; cases with conditions stay as they are."""
    rows = [row.strip() for row in match[2].split(r"\\") if row.strip()]
    if match[1] == "cases" and any("&" in row for row in rows):
        return match[0]
    rows = [row.replace("&", " ").strip() for row in rows]
    return "".join(
        row if row.startswith("=") or not number else f", {row}" for number, row in enumerate(rows)
    )


def _contents(match: re.Match[str]) -> str:
    """Words of a \\text{} apart from what is beside them; a single sign as it is."""
    return f" {match[1]} " if len(match[1].strip()) > 1 else match[1]


_FUNCTION = re.compile(
    r"(?<![\\A-Za-z])(arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|ln|log|exp|sqrt|max|min|gcd|lcm)(?![a-z])"
)
_NAMES = re.compile(r"(?<![\\A-Za-z])(pi|theta|alpha|beta|infty|infinity|inf)(?![A-Za-z])")
REPEATING = re.compile(r"(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\s*\{(\d+)\}|\((\d+)\))")
_DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s*\^\{\\circ\}(?!\s*[CF])")


def repeating(groups: Sequence[str]) -> Fraction:
    """0.1(6) -> 1/6, of what the groups of `REPEATING` hold."""
    whole, fixed, period = groups
    nines = 10 ** len(fixed) * (10 ** len(period) - 1)
    return Fraction(int(whole or "0")) + Fraction(int(fixed + period) - int(fixed or "0"), nines)


# What the parser reads as something else: such formulas are equal only as they are written.
UNREADABLE = re.compile(
    r"\\partial|\\frac\s*\{\s*d\w*\s*\}\s*\{\s*d\w|\\begin\{cases\}|\\(?:land|lor|neg)(?![A-Za-z])|"
    r"(?<![A-Za-z\\])[A-Za-z]\s*\\times\s*[A-Za-z](?![A-Za-z])"
)
_MODULUS = re.compile(r"\\?[pb]?mod(?![A-Za-z])\s*(?:\{\s*(\w+)\s*\}|\(\s*(\w+)\s*\)|(\w+))")


def to_latex(text: str) -> str:
    """A tidy formula in the part of LaTeX that the parser reads."""
    for written, meant in (("**", "^"), ("<=", r"\le "), (">=", r"\ge "), ("!=", r"\ne "), ("*", r"\cdot ")):
        text = text.replace(written, meant)
    text = re.sub(
        r"(\\[A-Za-z]+)|I", lambda match: match[1] or r"\iota ", text
    )  # the parser's imaginary unit
    text = re.sub(r"\^\s*\{?\s*T\s*\}?(?![A-Za-z])", "^{T_{0}}", text)  # which it would drop
    text = _FUNCTION.sub(r"\\\1 ", text)
    text = _NAMES.sub(lambda match: "\\infty " if match[0].startswith("inf") else f"\\{match[0]} ", text)
    text = REPEATING.sub(_repeating_as_latex, text)
    text = _DEGREES.sub(r"(\1 \\cdot \\frac{\\pi}{180})", text)
    text = re.sub("([A-Za-z])('+)", lambda match: f"{match[1]}_{{{'p' * len(match[2])}}}", text)  # f'
    text = _MODULUS.sub(lambda match: rf"+ m_{{od}} \cdot {match[1] or match[2] or match[3]}", text)
    text = re.sub(r"\\lg(?![A-Za-z])", r"\\log_{10}", text)
    text = text.replace(r"\gamma", "g_{amma}")  # which the parser takes for the function
    text = re.sub(r"\\frac\s*(\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\s*(\w)\s*\{", r"\\frac{\1}{", text)
    text = re.sub(r"(\\frac\s*\{[^{}]*\})\s*(\w)", r"\1{\2}", text)
    text = re.sub(r"\\sqrt\s*(\[\d+\])?\s*(\d+|[A-Za-z])(?![\w{])", r"\\sqrt\1{\2}", text)
    text = re.sub(r"\^\s*(-?\d+)", r"^{\1}", text)
    for opening in (r"\sqrt", r"\exp", "^"):
        text = _brace_arguments(text, opening)
    return re.sub(r"\\exp\s*\{", r"e^{", text).strip()


def _repeating_as_latex(match: re.Match[str]) -> str:
    value = repeating([group for group in match.groups() if group is not None])
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _brace_arguments(text: str, opening: str) -> str:
    """\\sqrt(5) -> \\sqrt{5}, e^(x+1) -> e^{x+1}."""
    at = 0
    while match := re.compile(rf"{re.escape(opening)}\s*\(").search(text, at):
        at, depth = match.end(), 1
        for end in range(at, len(text)):
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            if depth == 0:
                text = f"{text[: match.start()]}{opening}{{{text[at:end]}}}{text[end + 1 :]}"
                break
    return text
