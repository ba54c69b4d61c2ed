r"""Wrong answers that rounding, dropped signs or half-read text would make right: references and wrong answers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_sead.grading.grader import Grader


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader() as grader:
        yield grader


@pytest.mark.parametrize(
    ("reference", "given"),
    [
        (r"\frac{2^{100}+1}{3\cdot 2^{100}}", [r"\frac{1}{3^{100}}", r"\frac13", r"\frac{2^{101}+1}{3\cdot 2^{101}}"]),
        (r"\frac{1}{2004!}", [r"\frac{1}{2006!}", "1/2005!", "0"]),
        ("10^{20}", ["10^{20}+1", "100000000000000000001", r"\sqrt{10^{40}+1}", "10^{20}-10^{-20}"]),
        ("2^{64}", ["18446744073709551615", r"1.8446744073709552\times 10^{19}"]),
        ("1", [r"\frac{10^{30}+1}{10^{30}}", "1-10^{-30}", "0.99999999999999999999", r"\tanh(1000)"]),
        ("100!", ["100!+1", "99!"]),
        (r"e^{\pi\sqrt{163}}", ["262537412640768744"]),
        ("0.0000001", ["0.0000002", "0", "1e-8"]),
        ("10^{-20}", [r"2\cdot 10^{-20}", "0"]),
        (r"\frac{\sqrt{2}}{10^{20}}", [r"\frac{\sqrt{3}}{10^{20}}", "0"]),
        ("10^{-10}", [r"\sin(10^{-10})"]),
        (r"\pi", [r"\pi+10^{-100}", "3.141592653589793", r"\frac{355}{113}"]),
        (r"\sqrt{2}", ["1.41421356", "1.4142135623730951"]),
        ("1/3", ["0.333", "0.3333333333", r"0.\overline{33}4"]),
        ("0.333", ["1/3", "0.3333", "0.3330001", r"\frac{1}{3} \approx 0.333"]),
        ("1.45e-5", ["1.45e-6", "0", "1.46e-5"]),
        ("x+10^{-20}", ["x", "x+10^{-21}"]),
        ("2^{1000}x", ["(2^{1000}+1)x"]),
        ("1.0000001x", ["x", "1.0000002x"]),
        ("1+2i", ["1+2i+10^{-20}", "1-2i"]),
        ("(10^{-20},1)", [r"(2\cdot10^{-20},1)"]),
        (r"\{\sqrt2\cdot10^{-20},1\}", [r"\{\sqrt3\cdot10^{-20},1\}"]),
        ("[0, 10^{-20}]", [r"[0, 2\cdot 10^{-20}]"]),
        (r"(0,10^{-20}) \cup (1,2)", [r"(0,2\cdot 10^{-20}) \cup (1,2)"]),
        (r"\begin{pmatrix} 0.0000001 \\ 1 \end{pmatrix}", [r"\begin{pmatrix} 0.0000002 \\ 1 \end{pmatrix}"]),
        ("x > 0.0000001", ["x > 0.0000002"]),
        ("y = 0.0000001x", ["y = 0.0000002x"]),
        ("x + 10^{-20} > y", ["x > y"]),
    ],
)
def test_close_to_the_reference_is_not_the_reference(grader: Grader, reference: str, given: list[str]) -> None:
    assert [answer for answer in given if grader.grade(rf"\boxed{{{answer}}}", [reference])] == []


@pytest.mark.parametrize(
    ("reference", "given"),
    [
        (r"1, 2, \ldots, n", [r"2, 4, \ldots, 2n", r"1, 3, 5, \ldots, 2n-1", "1,2,n", r"1,2,\ldots,m",
          r"1, 2, \ldots"]),
        (r"\{1, 2, \ldots, n\}", [r"\{1,3,\dots,n\}", r"\{1,2,n\}"]),
        (r"1+2+\cdots+n", [r"2+4+\cdots+2n", "1+n"]),
        ("2516_8", ["2516_9", "2516_{16}", "2516", "1358", "2517_8"]),
        ("2516", ["2516_8"]),
        ("A3_{16}", ["A3_{12}", "A4_{16}"]),
        ("0", ["5x - 7y + 11z + 4 = 0", "x+1=0", "2=0", "f(x)-1=0"]),
        ("5x - 7y + 11z + 4 = 0", ["0", "5x-7y+11z+4", "5x - 7y + 11z + 5 = 0", "12", "x=0"]),
        ("4", ["3=4", "x^2=4", "4x", "4t", "4m", r"4\sqrt(2)", "4!", r"4\pi", "x=3=4", "4, 5", "4 1", "3 1",
          r"4 \text{ or } 5"]),
        ("4", ["4 million", r"4\text{ thousand}", "4i", "|4|+1", r"\ge 4", "x > 4", r"\pm 4", "(4,4)", "4:30",
          r"4 \times 10^1"]),
        ("5", [r"\infty", "nan", "zoo", r"\text{undefined}", r"\frac{5}{0}", "i", r"\text{}"]),
        (r"\infty", [r"-\infty", "100", r"\frac{1}{0}"]),
        ("1,-2", ["(-2,1)", "1,2"]),
        ("[3,1]", ["[4,2]"]),
        ("3 < x < 1", ["5 < x < 2"]),
        ("4", ["xy=4", "|x|=4", "2x=4", "4=x+1"]),
        ("1", ["x^2+y^2=1", "x+y=1", "2x+3y=1"]),
        ("x=3", ["y=3", "x=4", "x>3"]),
        ("f(x)=x^2", ["f(x)=x^3", "f(x)=2x^2"]),
        ("n=k+4", ["n=k+5", "k=n+4"]),
        ("n=2, 3, 4", ["n=1, 2, 3"]),
        ("D = (0, 1)", ["D = (0, 1.5)"]),
        (r"\frac{1}{m} t", [r"\frac{1}{m}", "t"]),
        ("2 ab", ["2", "ab"]),
        ("12:00", ["1:00", "12:30", "12"]),
        (r"8:34 \text{ p.m.}", [r"8:34 \text{ a.m.}", "8:43 p.m."]),
        ("(3,4)", ["(4,3)", "[3,4]", r"\{3,4\}", "3,4,5"]),
        ("[0,1]", ["(0,1)", "[0,1)", "0 < x < 1", r"\{0,1\}"]),
        (r"\pm 3", ["3", "-3", r"\pm 4"]),
        ("x > 3", ["x < 3", r"x \ge 3", "3 > x", "y > 3"]),
        ("x", ["X", "|x|", r"\sqrt{x^2}", "y"]),
        ("a_n", ["a_{n+1}", "a"]),
        ("0.5", [r"0.5\%", "5"]),
        (r"\lfloor\frac{n}{2}\rfloor", [r"\frac{n}{2}", r"\lceil\frac{n}{2}\rceil", r"\frac{n-1}{2}"]),
        ("2,3", ["2<x<3", "2.3", "2:3"]),
        (r"5\text{ cm}", [r"5\text{ m}", r"5\text{ cm}^2", "5 inches"]),
        (r"10\text{ minutes}", [r"10\text{ hours}", "10 seconds"]),
        ("(a) 5 (b) 6", ["(a) 6 (b) 5", "(b) 5 (a) 6", "(a) 5", "30ab", "6, 5"]),
        (r"\log_2 3", [r"\log_3 2", "1.585"]),
        (r"\sin 1", [r"\sin 1^\circ"]),
        (r"\text{(C)}", ["(C) and (D)", "(C) or (D)", "(C)+1", r"\text{(C)} \text{ or } 77"]),
        ("C", ["B", r"\textbf{(B) }24", r"\textbf{(D) }\text{C}", "(A), (C)", r"\text{C and D}", "AC",
          r"\text{not C}", "c^2"]),
        (r"\textbf{(C) }24", ["D", "25", "(C) 25", "(D) 24"]),
        ("true", ["False", r"\text{No}", "not true"]),
        (r"\text{east}", [r"\text{seat}", "seat", "west"]),
        (r"\text{Evelyn}", ["Carla", r"\text{Not Evelyn}"]),
    ],
)  # fmt: skip
def test_half_of_an_answer_is_not_the_answer(grader: Grader, reference: str, given: list[str]) -> None:
    assert [answer for answer in given if grader.grade(rf"\boxed{{{answer}}}", [reference])] == []


@pytest.mark.parametrize(
    "response",
    [
        r"\boxed{42} so then \boxed{7", r"\boxed{42}. Hmm, \boxed{", r"\boxed{42} wait \boxed{42",
        r"\boxed{42} ... \fbox{6",
        r"\boxed{42} and \boxed", r"The answer is 42. So \boxed{\frac{1}", "The answer is 42. No wait, the answer is",
        r"<think>\boxed{42}", r"<think>\boxed{42}</think> The answer is 43", "The answer is 142.", "The answer is 420",
        "The answer is 42.5", "The answer is -42", "The answer is not 42.", "The answer is 42 or 43.",
        "The answer is 42, 43.",
        "The answer is 42x", "The answer is 42/3", "The answer is 42^2.", "The answer is 42,000",
        "The answer is 42 + 1",
        "The answer is 42 + 1 = 43", "The answer is 42 million.", "The answer is more than 42.",
        "The answer is 42 to 43.",
        "The answer is between 42 and 50", "The answer is 42. No, the answer is 43.",
        "I cannot find it. There are 42 of them",
        r"\boxed{42} or \boxed{43}", "So x is not 42.", "Suppose x = 42.", "Let's try x = 42.", "So 2x = 42",
        "x^2 = 42",
        "xy = 42", "Thus x > 42.", "x = 42 and y = 3", "x = 42/5", "So 42 million", "So 42 out of 50", "So f(42) = 3",
        "So 42 is too small.", "Thus 42 divides n.", "**42** is not possible.", "The first number is 42.", "So -42",
        "Answer: The total is 42 and the rest is 7.", "We have 42.", "So there are more than 42.",
        "The answer is 42 3/4", "#### 42 or 43", r"\boxed{}", "",
    ],
)  # fmt: skip
def test_42_is_not_what_this_response_answers(grader: Grader, response: str) -> None:
    assert not grader.grade(response, ["42"])
