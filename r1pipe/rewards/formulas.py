"""Formulas compared at several points, exactly where all is rational; in the process of symbolic_worker.py.

math-verify's parser (latex2sympy2_extended) reads them, with the case of letters kept. Its own comparison is
not used: it rounds to six decimals, so that 1.6e-19 equals 9.1e-31, and takes R for r.
"""

import math
from typing import Any

import sympy  # noqa: TID253 - nothing else runs in the worker
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig, latex2sympy
from sympy.core.function import AppliedUndef  # noqa: TID253

DIGITS = 40
EXACT, ROUNDED = 1e-25, 1e-6  # relative tolerance; the second where a formula was written with decimals
POINTS = 5
MAX_DIGITS = 1e6  # a number with more is not written out
_READING = ConversionConfig(lowercase_symbols=False)
_NORMAL = NormalizationConfig(basic_latex=True, boxed="none")
_UNBOUND = (sympy.nan, sympy.zoo)


def read(latex: str) -> Any:
    """A formula in sympy's terms, unevaluated; None where it cannot be read or has no value."""
    try:
        formula = latex2sympy(latex, normalization_config=_NORMAL, conversion_config=_READING)
    except Exception:  # noqa: BLE001 - the parser raises bare Exceptions, which all mean the same
        return None
    if isinstance(formula, sympy.Basic) and formula.has(*_UNBOUND):
        return None
    return formula


def equal(gold: Any, answer: Any, relation: str = "") -> bool:
    """Whether two formulas are equal, or two differences vanish, or are negative, at the same points."""
    gold, answer = (each.doit() if isinstance(each, sympy.MatrixExpr) else each for each in (gold, answer))
    if isinstance(gold, sympy.MatrixBase) or isinstance(answer, sympy.MatrixBase):
        same_shape = getattr(gold, "shape", None) == getattr(answer, "shape", ())
        return same_shape and all(equal(a, b) for a, b in zip(gold, answer, strict=True))
    if not (isinstance(gold, sympy.Expr) and isinstance(answer, sympy.Expr)):
        return bool(gold == answer)
    if gold == answer and not relation:
        return True
    if is_too_large(gold) or is_too_large(answer):
        return False
    gold, answer = (_prepared(formula) for formula in (gold, answer))
    if relation:
        return _proportional(gold, answer, positive=relation in ("<", r"\le"))
    if sympy.oo in (gold, answer) or -sympy.oo in (gold, answer):
        return bool(gold == answer)
    if gold == 0 or answer == 0:  # nothing is relatively close to zero
        return (answer if gold == 0 else gold).equals(0) is True
    tolerance = ROUNDED if gold.has(sympy.Float) or answer.has(sympy.Float) else EXACT
    values = [(_value(gold, point), _value(answer, point)) for point in _points(gold, answer)]
    compared = [_close(a, b, tolerance) for a, b in values if a is not None and b is not None]
    return all(compared) if compared else sympy.simplify(gold - answer) == 0


def is_too_large(formula: Any) -> bool:
    """Whether the formula holds a number of more than a million digits."""
    return any(
        isinstance(part, sympy.Pow | sympy.factorial) and abs(_magnitude(part)) > MAX_DIGITS
        for part in sympy.preorder_traversal(formula)
    )


def _magnitude(formula: Any) -> float:
    """About log10 of a number's size; 0 where it is not known."""
    if isinstance(formula, sympy.factorial):
        size = _magnitude(formula.args[0])
        return size * 10.0**size if size < 300 else math.inf
    if isinstance(formula, sympy.Pow):
        base, exponent = formula.args
        if not base.is_number or not exponent.is_number:
            return 0.0
        size = _magnitude(exponent)
        if size > 300:
            return math.inf
        return _magnitude(base) * 10.0**size
    if formula.is_Integer or formula.is_Rational or formula.is_Float:
        value = abs(formula)
        return float(sympy.log(value, 10).evalf(10)) if value > 0 else 0.0
    if formula.is_number and formula.args:
        return sum(abs(_magnitude(part)) for part in formula.args)
    return 0.5


def _prepared(formula: Any) -> Any:
    """Evaluated, with i as the imaginary unit, and f(x) as a name."""
    formula = formula.doit()
    unknown = {function: sympy.Symbol(f"{function}") for function in formula.atoms(AppliedUndef)}
    return formula.xreplace({**unknown, sympy.Symbol("i"): sympy.I})


def _points(*formulas: Any) -> list[dict[Any, Any]]:
    """Values for the names: positive, as most formulas mean it; negative too beside an absolute value."""
    names = sorted({symbol for formula in formulas for symbol in formula.free_symbols}, key=str)
    if not names:
        return [{}]
    points = [
        {
            name: sympy.Rational(101 + 37 * k + 53 * i + 7 * i * k * k, 71 + 11 * k + 3 * i)
            for i, name in enumerate(names)
        }
        for k in range(POINTS)
    ]
    if any(_knows_signs(formula) for formula in formulas):
        points += [{name: -value for name, value in point.items()} for point in points]
    return points


def _knows_signs(formula: Any) -> bool:
    """Whether it holds an absolute value, or a root over an even power, which is one."""
    roots = [part for part in formula.atoms(sympy.Pow) if part.exp == sympy.Rational(1, 2)]
    powers = [power for root in roots for power in root.base.atoms(sympy.Pow)]
    return formula.has(sympy.Abs) or any(power.exp.is_even and not power.is_number for power in powers)


def _value(formula: Any, point: dict[Any, Any]) -> Any:
    """A number, exact where it is rational; None where the formula has none there."""
    value = formula.subs(point)
    if value.is_Rational:
        return value
    value = value.evalf(DIGITS)
    return value if value.is_number and value.is_finite else None


def _close(a: Any, b: Any, tolerance: float) -> bool:
    if a.is_Rational and b.is_Rational and tolerance == EXACT:
        return bool(a == b)
    return bool(abs(a - b) <= tolerance * max(abs(a), abs(b)))


def _proportional(gold: Any, answer: Any, positive: bool) -> bool:
    """Whether one is a constant times the other, so that both vanish together."""
    gold, answer = (
        sympy.together(formula).as_numer_denom()[0] if not positive else formula for formula in (gold, answer)
    )
    ratios = []
    for point in _points(gold, answer):
        a, b = _value(gold, point), _value(answer, point)
        if a is None or b is None:
            continue
        if a == 0 or b == 0:
            if a != b:
                return False
            continue
        ratios.append(a / b)
    if not ratios or (len(ratios) < 2 and (gold.free_symbols or answer.free_symbols)):
        return False
    rounded = gold.has(sympy.Float) or answer.has(sympy.Float)
    same = all(_close(ratio, ratios[0], ROUNDED if rounded else 1e-20) for ratio in ratios)
    return same and (not positive or bool(ratios[0] > 0))
