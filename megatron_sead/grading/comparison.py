"""Whether two answers are the same to computer algebra. Runs in the worker process, which imports sympy for it.

Math-Verify's parser reads them, and its `verify` compares sets, inequalities and equations in general. Numbers,
expressions and lists of them are compared here first, as Math-Verify rounds to six decimals and takes for zero whatever
is below 1e-15. Here a difference is zero only when 2000 digits of it are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from latex2sympy2_extended.logic import And
from latex2sympy2_extended.sets import FiniteSet
from math_verify import verify
from math_verify.grader import should_treat_as_complex
from sympy import (
    Add,
    Basic,
    Derivative,
    Dummy,
    Eq,
    Expr,
    Float,
    Function,
    GreaterThan,
    I,
    Intersection,
    Interval,
    LessThan,
    MatrixBase,
    Mod,
    Mul,
    Ne,
    Pow,
    Rational,
    S,
    Set,
    StrictGreaterThan,
    StrictLessThan,
    Symbol,
    Tuple,
    Union,
    binomial,
    ceiling,
    factorial,
    floor,
    nan,
    oo,
    simplify,
    zoo,
)
from sympy import FiniteSet as SympyFiniteSet
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

DIGITS = 2000
_NORMALIZATION = NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="none")
_MISREAD = re.compile(
    r"\d\)?\s*\}?_|\\[lc]?dots|\.\.\.|\b\d+\s+\d"
)  # a numeral's base, what dots stand for, 1 2 as 1 + 2
_LABELLED = re.compile(r"[a-zA-Z\\][^=<>+*/^-]*=([^=]+)")
_QUANTITY = re.compile(  # P(X = 2) = 1/3, whose first sign is no equation's, and functions that the parser computes
    r"(?:(?:P|Pr|E|Var|\\(?:Pr|gcd|max|min|det|deg)(?![a-zA-Z])|\\(?:mathbb|text|operatorname)\s*\{[A-Za-z]+\})"
    r"\s*(?:\([^()]*\)|\[[^\[\]]*\])|\|[A-Z]+\|)\s*=\s*(.+)"
)
_COORDINATES = {"x", "y", "z"}
_REAL = tuple(Rational(*pair) for pair in ((7, 3), (13, 11), (5, 17), (-9, 7), (4, 1), (19, 2), (-6, 1)))
_NATURAL = tuple(Rational(n) for n in (5, 9, 14, 20, 27, 6, 11, 13, 22, 34, 2, 1))


def same(reference: str, given: str) -> bool:
    """Whether two answers in LaTeX are the same. Sympy raises anything at odd input."""
    if any(_MISREAD.search(text) for text in (reference, given)):
        return False
    named, given_named = _QUANTITY.fullmatch(reference), _QUANTITY.fullmatch(given)
    if (named is None) != (given_named is None):  # the other one states the value alone
        reference, given = named[1] if named else reference, given_named[1] if given_named else given
    is_real = not (should_treat_as_complex(reference) or should_treat_as_complex(given))
    gold, answer = _read(reference, is_real), _read_or_right_side(given, is_real)
    if isinstance(answer, FiniteSet) and re.search(r"\bor\b", given) and all(map(_is_inequality, answer.args)):
        answer = Union(*map(_solutions, answer.args))
    return _same(gold, answer)


@lru_cache(maxsize=1000)  # parsing takes longest, and a reference comes once a response
def _read(latex: str, is_real: bool) -> Any:
    return _exact(
        latex2sympy(
            normalize_latex(latex, _NORMALIZATION),
            is_real=is_real,
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )
    )


def _read_or_right_side(latex: str, is_real: bool) -> Any:
    """What stands behind a label that the parser does not know, as in f'(2) = 5."""
    try:
        return _read(latex, is_real)
    except Exception:  # whatever the parser raises
        labelled = _LABELLED.fullmatch(latex)
        if labelled is None:
            raise
        return _read(labelled[1], is_real)


def _exact(value: Any) -> Any:
    """With fractions for decimals, in the order that was written."""
    if isinstance(value, FiniteSet | And):
        return type(value)(*map(_exact, value._unsorted_args))
    if isinstance(value, MatrixBase):
        return value.applyfunc(_exact)
    if isinstance(value, Relational):
        return type(value)(_exact(value.lhs), _exact(value.rhs), evaluate=False)
    return value.xreplace({number: Rational(str(number)) for number in value.atoms(Float)})


def _same(gold: Any, answer: Any) -> bool:
    gold, answer = (Interval(-oo, oo) if value == S.Reals else value for value in _stated(gold, answer))
    if gold is None or answer is None:
        return False
    if isinstance(gold, Eq) and isinstance(answer, Eq):
        return _same_equation(gold, answer)
    if all(isinstance(value, Set | Relational | And) for value in (gold, answer)):
        if gold.free_symbols and answer.free_symbols and gold.free_symbols != answer.free_symbols:
            return False
        bounded, listed = [isinstance(v, Relational | And) for v in (gold, answer)], (gold, answer)
        if any(bounded) and any(isinstance(value, FiniteSet | SympyFiniteSet) for value in listed):
            return False  # 2 < x < 3 and the list 2, 3
        gold, answer = _solutions(gold), _solutions(answer)
        if S.EmptySet in (gold, answer):  # [3, 1] and 3 < x < 1, whatever was meant
            return False
    if isinstance(gold, Relational) and isinstance(answer, Relational):
        return _same_inequality(gold, answer)
    if isinstance(gold, MatrixBase) and isinstance(answer, MatrixBase):
        return gold.shape == answer.shape and _same_in_order(gold.flat(), answer.flat())
    if isinstance(gold, Expr) and isinstance(answer, Expr):
        return _same_expression(gold, answer)
    if isinstance(gold, Interval) and isinstance(answer, Interval):
        brackets = (gold.left_open, gold.right_open) == (answer.left_open, answer.right_open)
        return bool(brackets) and _same_in_order(gold.args[:2], answer.args[:2])
    if isinstance(gold, Union) and isinstance(answer, Union):
        return _same_in_any_order(gold.args, answer.args)
    return _same_list(gold, answer)


def _stated(gold: Any, answer: Any) -> tuple[Any, Any]:
    """Both without what they are called: x = 5 is 5. An equation that calls nothing by a name stays, or states None."""
    sides, answer_sides = _sides(gold), _sides(answer)
    if sides and answer_sides:
        return _ends(sides), _ends(answer_sides)
    return (_last_side(sides) if sides else gold), (_last_side(answer_sides) if answer_sides else answer)


def _sides(value: Any) -> list[Any]:
    """What stands between the equality signs; [] for anything but equations."""
    equations = value._unsorted_args if isinstance(value, And) else [value]
    if not all(isinstance(equation, Eq) for equation in equations):
        return []
    return [equations[0].lhs, *(equation.rhs for equation in equations)]


def _ends(sides: list[Any]) -> Any:
    return Eq(sides[0], sides[-1], evaluate=False)


def _last_side(sides: list[Any]) -> Any:
    """What an equation says something is: 5 for x = 2 + 3 = 5. None when its sides differ, as in 3 = 4 or x + 1 = 0."""
    if len(sides) == 2 and _is_name(sides[1]) and not _is_name(sides[0]):  # 5 = x
        sides = sides[::-1]
    *others, last = sides[1:] if _is_name(sides[0]) else sides
    return last if all(_same(last, other) for other in others) else None


def _is_name(side: Any) -> bool:
    r"""Whether a left side names a quantity: x, f(2), AB, a/b, \sin A, m + n, (x, y). Not x + y or xy, a curve's."""
    if isinstance(side, Symbol | AppliedUndef | Derivative):
        return True
    if isinstance(side, Interval | Tuple):  # a pair (x, y)
        return all(map(_is_name, side.args[:2]))
    if isinstance(side, Pow):
        parts = [side.base] if side.exp == -1 else []
    else:
        parts = list(side.args) if isinstance(side, Add | Mul | Function) else []
    return bool(parts) and all(map(_is_name, parts)) and not _COORDINATES & set(map(str, side.free_symbols))


def _solutions(value: Any) -> Any:
    """The set that inequalities in one unknown describe; anything else as it is."""
    if not _is_inequality(value):
        return value
    parts = value.args if isinstance(value, And) else [value]
    rays = [_ray(part) for part in parts]
    return value.as_set() if None in rays else Intersection(*rays)


def _ray(inequality: Relational) -> Set | None:
    """All x > 3, without the general solver, which takes its second; None for what is written otherwise."""
    if inequality.rhs.is_Symbol:
        inequality = inequality.reversed
    if not inequality.lhs.is_Symbol or not inequality.rhs.is_number:
        return None
    bound, is_open = inequality.rhs, isinstance(inequality, StrictGreaterThan | StrictLessThan)
    if isinstance(inequality, StrictGreaterThan | GreaterThan):
        return Interval(bound, oo, left_open=is_open)
    return Interval(-oo, bound, right_open=is_open) if isinstance(inequality, StrictLessThan | LessThan) else None


def _is_inequality(value: Any) -> bool:
    return isinstance(value, Relational | And) and len(value.free_symbols) == 1


def _same_equation(gold: Eq, answer: Eq) -> bool:
    """The same quantity with the same value, or two equations of which one is a multiple of the other."""
    functions = sum(isinstance(side, AppliedUndef) for side in (gold.lhs, answer.lhs))
    if gold.lhs == answer.lhs or (functions == 1 and "y" in map(str, (gold.lhs, answer.lhs))):  # y = 2x is f(x) = 2x
        return _same(gold.rhs, answer.rhs)
    if not all(isinstance(side, Expr) for side in (*gold.args, *answer.args)):
        return False
    left, right = gold.lhs - gold.rhs, answer.lhs - answer.rhs
    if left.free_symbols != right.free_symbols:
        return False
    for point in _points(left, right):
        ratio = (left / right).xreplace(point).doit()
        if ratio.is_finite and ratio.is_nonzero:
            return _same_expression(left, ratio * right)
    return False


def _same_inequality(gold: Relational, answer: Relational) -> bool:
    """In several unknowns, with both sides as they were written or exchanged."""
    if isinstance(gold, Ne | Eq) or isinstance(answer, Ne | Eq):
        return type(gold) is type(answer) and {gold.lhs, gold.rhs} == {answer.lhs, answer.rhs}
    strict = [isinstance(side, StrictGreaterThan | StrictLessThan) for side in (gold, answer)]
    return strict[0] == strict[1] and _same_expression(gold.gts - gold.lts, answer.gts - answer.lts)


def _same_expression(gold: Expr, answer: Expr) -> bool:
    gold, answer = gold.doit(), answer.doit()
    if gold.has(oo, -oo, zoo, nan) or answer.has(oo, -oo, zoo, nan):
        return gold == answer and gold in (oo, -oo)
    if gold == answer:
        return True
    functions = {call: Dummy(real=True) for call in (gold - answer).atoms(AppliedUndef)}
    gold, answer = gold.xreplace(functions), answer.xreplace(functions)
    if gold.is_number and answer.is_number:
        return _is_zero(gold - answer)
    agreed, is_real = 0, not (gold.has(I) or answer.has(I))
    for point in _points(gold, answer):
        same = _same_at(gold.xreplace(point), answer.xreplace(point), is_real)
        if same is False:
            return False
        agreed += same is True
    return agreed >= 4


def _points(*expressions: Expr) -> list[dict[Basic, Rational]]:
    """Values for every unknown: of all signs, or natural numbers where parts and factorials are taken."""
    symbols = sorted(set().union(*(expression.free_symbols for expression in expressions)), key=str)
    counted = any(expression.has(floor, ceiling, Mod, factorial, binomial) for expression in expressions)
    values = _NATURAL if counted else _REAL
    return [
        {symbol: values[(first + 3 * i) % len(values)] for i, symbol in enumerate(symbols)}
        for first in range(len(values))
    ]


def _same_at(gold: Expr, answer: Expr, is_real: bool) -> bool | None:
    """Whether two numbers are the same; None where real answers are both outside of their domain."""
    gold, answer = gold.doit(), answer.doit()
    if any(value.has(nan, zoo, oo) for value in (gold, answer)):
        return None
    if _is_zero(gold - answer):
        return True
    return None if is_real and not _is_real(gold) and not _is_real(answer) else False


def _is_zero(number: Expr) -> bool:
    """Whether a number is zero to `DIGITS` digits: sympy takes more of them until one is not zero."""
    parts = number.evalf(5, maxn=DIGITS).as_real_imag()
    if not all(part.is_Number for part in parts):
        return bool(simplify(number) == 0)
    return all(part == 0 or part._prec == 1 for part in parts)


def _is_real(number: Expr) -> bool:
    imaginary = number.evalf(5, maxn=DIGITS).as_real_imag()[1]
    return bool(imaginary == 0 or (imaginary.is_Number and imaginary._prec == 1))


def _same_list(gold: Any, answer: Any) -> bool:
    (golds, gold_is_pair), (answers, answer_is_pair) = _members(gold), _members(answer)
    if (golds, answers) == ([gold], [answer]):
        return bool(verify(gold, answer, timeout_seconds=None))
    compare = _same_in_order if gold_is_pair or answer_is_pair else _same_in_any_order
    return compare(golds, answers)


def _members(value: Any) -> tuple[list[Any], bool]:
    """The members of a list, and whether their order matters."""
    if isinstance(value, FiniteSet):
        return list(value._unsorted_args), False
    if isinstance(value, Interval) and value.left_open and value.right_open:  # (1, 2) may be a pair
        return list(value.args[:2]), True
    if isinstance(value, Tuple | SympyFiniteSet):
        return list(value.args), isinstance(value, Tuple)
    return [value], False


def _same_in_order(golds: Sequence[Any], answers: Sequence[Any]) -> bool:
    return len(golds) == len(answers) and all(map(_same, golds, answers))


def _same_in_any_order(golds: Sequence[Any], answers: Sequence[Any]) -> bool:
    left = list(answers)
    for gold in golds:
        match = next((i for i, answer in enumerate(left) if _same(gold, answer)), None)
        if match is None:
            return False
        del left[match]
    return not left
