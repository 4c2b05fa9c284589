"""One notation for what people write: Unicode signs, LaTeX dressing and program spellings.

`tidy` is for reading numbers, words and structure; `to_latex` is for the parser of formulas.
"""

import re
import unicodedata
from collections.abc import Sequence
from fractions import Fraction

_SIGNS = {
    **dict.fromkeys("−–—‐‑‒﹣", "-"),
    **dict.fromkeys("\u00a0\u2002\u2003\u2009\u200a\u202f\u3000\t\n\r", " "),
    **dict.fromkeys("\u200b\u2060\ufeff\u2061\u2062", ""),
    **dict.fromkeys("·⋅∙", r"\cdot "),
    **dict.fromkeys("÷∕⁄", "/"),
    **dict.fromkeys("≤⩽≦", r"\le "),
    **dict.fromkeys("≥⩾≧", r"\ge "),
    **dict.fromkeys("°º", r"^{\circ}"),
    **dict.fromkeys("…⋯", r"\ldots "),
    **dict.fromkeys("“”", '"'),
    **dict.fromkeys("‘’′", "'"),
    **{"×": r"\times ", "✕": r"\times ", "∶": ":", "≠": r"\ne ", "≈": r"\approx ", "±": r"\pm ", "∪": r"\cup "},
    **{"∩": r"\cap ", "∈": r"\in ", "∞": r"\infty ", "∅": r"\emptyset ", "∠": r"\angle ", "△": r"\triangle "},
    **{"、": ",", "。": ".", "ℝ": r"\mathbb{R}", "℃": r"^{\circ}C", "℉": r"^{\circ}F", "√": r"\sqrt ", "∛": r"\sqrt[3] "},
    **{"￥": "¥", "￡": "£", "￠": "¢"},
}
_GREEK = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau phi chi psi omega"
_GREEK_SIGNS = zip("αβγδεζηθικλμνξπρστφχψωΓΔΘΛΞΠΣΦΨΩ", [
    *_GREEK.split(), "Gamma", "Delta", "Theta", "Lambda", "Xi", "Pi", "Sigma", "Phi", "Psi", "Omega"
], strict=True)  # fmt: skip
_SIGNS |= {sign: f"\\{name} " for sign, name in _GREEK_SIGNS}
_FULL_WIDTH = {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
_TABLE = str.maketrans(_FULL_WIDTH | _SIGNS)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_FRACTION_SIGN = re.compile("[¼½¾⅐-⅞]")

_TEXT = r"\\(?:text|mathrm|mbox|textbf|mathbf|textit|mathit|textrm|mathsf|texttt|boldsymbol|operatorname|rm|bf)"
_TEXT_GROUP = re.compile(_TEXT + r"\s*\*?\s*\{([^{}]*)\}")
_BARE_TEXT = re.compile(_TEXT + r"(?![A-Za-z{])")
_SIZES = re.compile(r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits|nolimits)(?![A-Za-z])")
_BLANKS = re.compile(r"(?<!\\)\\[,;:> ]|\\q?quad(?![A-Za-z])|~")
_GROUPS_OF_DIGITS = re.compile(r"(?<=\d)(?:\{,\}|\\[,;:! ]|[ '])(?=\d{3}(?!\d))")
_COMMANDS = {
    **dict.fromkeys([r"\dfrac", r"\tfrac", r"\cfrac"], r"\frac"),
    **dict.fromkeys([r"\leq", r"\leqslant"], r"\le"),
    **dict.fromkeys([r"\geq", r"\geqslant"], r"\ge"),
    **dict.fromkeys([r"\dots", r"\cdots", r"\dotsc", r"\dotsb"], r"\ldots"),
    **dict.fromkeys([r"\lvert", r"\rvert", r"\vert"], "|"),
    **dict.fromkeys([r"\dbinom", r"\tbinom"], r"\binom"),
    **{r"\neq": r"\ne", r"\lt": "<", r"\gt": ">", r"\lbrace": r"\{", r"\rbrace": r"\}", r"\lbrack": "["},
    **{r"\rbrack": "]", r"\degree": r"^{\circ}", r"\varnothing": r"\emptyset", r"\infin": r"\infty"},
    **{r"\land": " and ", r"\lor": " or ", r"\wedge": " and ", r"\vee": " or ", r"\colon": ":"},
    **{r"\euro": "€", r"\pounds": "£", r"\mathop": "", r"\ast": "*", r"\textdollar": "$", r"\div": "/", r"\mid": "|"},
    r"\percent": "%",
}  # fmt: skip
_COMMAND = re.compile(r"\\[A-Za-z]+")
_BOLD = re.compile(r"\*\*(?=\S)(.+?)(?<=\S)\*\*")
_DOLLARS = re.compile(r"(?<!\\)\$\$?([^$]*?[^$\\])\$\$?")
_BRACKETS = re.compile(r"(?<!\\)\\[()\[\]]|`|</?(?:b|i|u|em|strong|span|p|center|div|br)\b[^<>]*>")


def tidy(text: str) -> str:
    """A text without dressing: signs in ASCII or LaTeX, no \\text{}, \\left, thin spaces, dollars and bold."""
    if not text.isascii():
        text = _FRACTION_SIGN.sub(lambda match: f" {_ascii_fraction(match[0])}", text)  # 3½ is 3 1/2
        text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda match: f"^{{{match[0].translate(_SUPERSCRIPTS)}}}", text)
        text = re.sub("[₀-₉]+", lambda match: f"_{{{match[0].translate(_SUBSCRIPTS)}}}", text)
        text = text.translate(_TABLE)
    text = _DOLLARS.sub(r"\1", _BOLD.sub(r"\1", text))
    text = _GROUPS_OF_DIGITS.sub(",", _BRACKETS.sub("", text))
    if "\\" in text:
        text = _SIZES.sub("", text)
        while (plain := _TEXT_GROUP.sub(_contents, text)) != text:
            text = plain
        text = _COMMAND.sub(lambda match: _COMMANDS.get(match[0], match[0]), _BARE_TEXT.sub("", text))
        text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?", r"^{\\circ}", text.replace(r"\!", ""))
        for escaped in "$%#&":
            text = text.replace(f"\\{escaped}", escaped)
        text = _BLANKS.sub(" ", text)
    return re.sub(r"\s+", " ", text).strip()


def _ascii_fraction(sign: str) -> str:
    return unicodedata.normalize("NFKC", sign).replace("\u2044", "/")


def _contents(match: re.Match[str]) -> str:
    """Words of a \\text{} apart from what is beside them; a single sign as it is."""
    return f" {match[1]} " if len(match[1].strip()) > 1 else match[1]


_FUNCTIONS = "arcsin arccos arctan sinh cosh tanh sin cos tan cot sec csc ln log exp sqrt max min gcd lcm".split()
_FUNCTION = re.compile(rf"(?<![\\A-Za-z])({'|'.join(_FUNCTIONS)})(?![a-z])")
_NAMES = re.compile(r"(?<![\\A-Za-z])(pi|theta|alpha|beta|infty|infinity|inf)(?![A-Za-z])")
REPEATING = re.compile(r"(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\s*\{(\d+)\}|\((\d+)\))")
_DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s*\^\{\\circ\}(?!\s*[CF])")
_FRACTION = re.compile(r"\\frac\s*(\{|\d|[A-Za-z]|\\[A-Za-z]+)\s*")


def repeating(groups: Sequence[str]) -> Fraction:
    """0.1(6) -> 1/6, of what the groups of `REPEATING` hold."""
    whole, fixed, period = groups
    nines = 10 ** len(fixed) * (10 ** len(period) - 1)
    return Fraction(int(whole or "0")) + Fraction(int(fixed + period) - int(fixed or "0"), nines)


def to_latex(text: str) -> str:
    """A tidy formula in the part of LaTeX that the parser reads."""
    for written, meant in (("**", "^"), ("<=", r"\le "), (">=", r"\ge "), ("!=", r"\ne "), ("*", r"\cdot ")):
        text = text.replace(written, meant)
    text = _FUNCTION.sub(r"\\\1 ", text)
    text = _NAMES.sub(lambda match: "\\infty " if match[0].startswith("inf") else f"\\{match[0]} ", text)
    text = REPEATING.sub(lambda match: _as_latex(repeating([g for g in match.groups() if g is not None])), text)
    text = _DEGREES.sub(r"(\1 \\cdot \\frac{\\pi}{180})", text)
    text = text.replace(r"\gamma", "g_{amma}")  # which the parser takes for the function
    text = re.sub(r"\\frac\s*(\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\s*(\w)\s*\{", r"\\frac{\1}{", text)
    text = re.sub(r"(\\frac\s*\{[^{}]*\})\s*(\w)", r"\1{\2}", text)
    text = re.sub(r"\\sqrt\s*(\[\d+\])?\s*(\d+|[A-Za-z])(?![\w{])", r"\\sqrt\1{\2}", text)
    text = re.sub(r"\^\s*(-?\d+)", r"^{\1}", text)
    for opening in (r"\sqrt", r"\exp", "^"):
        text = _brace_arguments(text, opening)
    return re.sub(r"\\exp\s*\{", r"e^{", text).strip()


def _as_latex(value: Fraction) -> str:
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
