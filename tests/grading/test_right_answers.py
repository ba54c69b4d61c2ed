r"""Right answers in the forms that models write them: each row is a reference and responses that must be right."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_sead.grading.grader import Grader


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader() as grader:
        yield grader


def boxes(*answers: str) -> list[str]:
    return [rf"Therefore $\boxed{{{answer}}}$." for answer in answers]


MARKDOWN = [
    "**Answer**: 42", "**Answer:** 42", "**Answer: 42**", "The answer is **42**.", "The answer is __42__",
    "The answer is *42*",
    "The answer is ***42***.", "The answer is `42`.", "#### **42**", "#### 42.", "## Answer: 42",
    "### Answer\n\n**42**",
    "### Final Answer\n42", "#### Final Answer: 42", "#### Final Answer\n42", "**Final Answer:** $42$",
    "> **Answer:** 42",
    "**Final Answer**\n\n42", "- **Answer:** 42", "* **Answer:** 42", "**The answer is: 42**",
    "**The final answer is 42.**",
    "so it is **73**.\n---\n✅ Final Answer: **42**", "**42**", "**Final Answer**\n\n$$\\boxed{42}$$",
    "Answer: **$42$**",
    "The answer is **42**, because **6** times **7** is **42**.",
]  # fmt: skip
PROSE = [
    "Answer:\n42", "Answer:\n\n$$42$$", "Answer - 42", "ANSWER: 42", "ANSWER IS 42", "final answer 42", "Answer = 42",
    "The answer should be 42", "The answer would be 42.", "the answer is therefore 42.", "The correct answer is 42.",
    "The answer equals 42", "The answer is equal to 42.", "The answer to the problem is 42.", "The answer must be 42.",
    "The answer to this question is therefore 42.", "The answer is \\(42\\).", "The answer is\n\\[\n42\n\\]",
    "\\[42\\]",
    "The final answer is: $42$. I hope it is correct.", "The answer is 42.\n\nI hope this answer is helpful.",
    "The answer is 42. This answer is correct.", "The answer is 42. Let me double check: 6*7 = 42.",
    "<answer>42</answer>",
    "The answer is 42, since 6*7=42.", "The answer is 42 because 6*7=42.", "The answer is 42 (since 6*7=42).",
    "The answer is 42, so we are done.", "The answer is 42, which is what we wanted.", "The answer is 42 — done.",
    "The answer is 42 - as we computed.", "The answer is 42 and I am sure of it.", "The answer is 42: we checked.",
    "The answer is 42!", "The answer is 42?", "The answer is 42;", "The answer is 42。", "The answer is：42",
    "答案是42。", "The answer is $42$, where we used x=5.", "The answer is 42, i.e. forty-two.",
    "The answer is indeed 42.",
    "The answer is approximately 42.", "Final answer → 42", "Answer => 42", "Ans: 42", "Answer: 6 * 7 = 42",
    "The answer is x = 42.", "The answer is 42 apples.", "The answer is $42 dollars.", "The answer is \\$42.",
    "#### $42",
    "The answer is 42 m.", "The answer is 42 square units.", "The answer is 42 dollars per hour.", "#### 42 apples",
    "The answer is \"42\".", "Answer: 42 ✅", "Answer: 42 <|im_end|>", "The answer is 42</s>", "Answer: (42)", "42.",
    "Answer: 41. No wait, the answer is 42.", "<think>the answer is 41</think>\nThe answer is 42",
    r"<think>\boxed{41}</think> \boxed{42}",
]  # fmt: skip
CONCLUSIONS = [
    "We get 6*7.\nx = 42", "So\n\\[ x = 42 \\]", "Hence $x = 42$.", "Answer: The total is 42.", "So 42 apples.",
    "```\n42\n```",
    "So, Janet makes $42 every day.", "The total number of apples is 42.", "She has **42** apples.", "6 \\times 7 = 42",
    "**Final Answer:** The value is **42**.", "The answer is 42 (forty-two).", "Thus $m+n = 25+17 = 42$.",
    "Area = 42 cm",
    "Therefore, there are 42 ways.", "So 42 is the answer.", "The answer, then, is 42.",
    "The answer (in dollars) is 42.",
    "The answer turns out to be 42.", "The answer is found to be 42.", "The answer is 42 km/h.",
    '{"answer": "42"}', "f(3) = 42",
    "[ANSWER]42[/ANSWER]", "In total, she spent $42.", "Finally, we get 42.",
]  # fmt: skip
BOXES = [
    r"\boxed 42", r"\boxed {42}", "\\boxed\n{42}", r"\boxed42", r"$\boxed 42$.", r"\fbox 42", r"\fbox {42}",
    r"\framebox{42}",
    r"\boxed{\text{42}}", r"\boxed{\boxed{42}}", r"\boxed{\mathbf{42}}", r"\boxed{**42**}", r"\boxed{$42$}",
    r"\boxed{{42}}",
    r"\boxed{\(42\)}", r"\boxed{\displaystyle 42}", r"\boxed{\color{red}{42}}", r"\boxed{\textcolor{red}{42}}",
    r"\boxed{４２}", r"\boxed{+42}", r"\boxed{42.}", r"\boxed{42\ }", r"\boxed{~42\,}", r"\boxed{x = 42}",
    r"\boxed{f(2)=42}",
    r"\boxed{AB = 42}", r"\boxed{\angle A = 42^\circ}", r"\boxed{a_5 = 42}", r"\boxed{m+n=42}", r"\boxed{40+2=42}",
    r"\boxed{\text{The answer is } 42}", r"\boxed{x \approx 42}", r"\boxed{42 = x}", r"\boxed{\approx 42}",
    r"\boxed{\$42}", r"\boxed{€42}",
    r"\boxed{42\%}", r"\boxed{42°}", r"\boxed{42 cm}", r"\boxed{42cm}", r"\boxed{42\text{ cm}^2}",
    r"\boxed{42~\text{cm}}",
    r"\boxed{42 \, \mathrm{m/s}}", r"\boxed{42 \mbox{ inches}^2}", r"\boxed{42 people}", r"\boxed{42\text{ people}}",
    r"\boxed{\text{Total: }42}", r"\boxed{42^{\text{nd}}}", r"$\boxed{42}$, $\boxed{42}$",
    r"First \boxed{5}. Actually \boxed{42}.", r"\boxed{42}! I hope this answer helps.",
]  # fmt: skip
CHOICES = [
    *boxes(
        r"\textbf{(C) }24", r"\textbf{(C)}\ 24", r"\mathbf{(C)}\, 24", r"\text{(C) }24", "(C) 24", "C) 24", "C. 24",
        "(C)~24",
        r"24 \text{ (C)}", r"(\text{C})\ 24", r"\text{C. }24",
    ),
    "The answer is **(C) 24**.", "The answer is C) 24.", r"The answer is $\textbf{(C) }24$.",
]  # fmt: skip


@pytest.mark.parametrize("response", [*MARKDOWN, *PROSE, *CONCLUSIONS, *BOXES])
def test_an_answer_is_found_in_markdown_prose_and_boxes(grader: Grader, response: str) -> None:
    assert grader.grade(response, ["42"])
    assert not grader.grade(response, ["43"])


@pytest.mark.parametrize("response", CHOICES)
def test_a_choice_is_right_by_its_letter_and_by_its_value(grader: Grader, response: str) -> None:
    assert grader.grade(response, ["C"])
    assert grader.grade(response, [r"\text{(C)}"])
    assert grader.grade(response, ["24"])
    assert not grader.grade(response, ["B"])
    assert not grader.grade(response, ["25"])


@pytest.mark.parametrize(
    ("reference", "responses"),
    [
        (
            "C",
            [
                *boxes("C", "(C)", "C.", r"\text{C}", r"\textbf{C}", r"\text{Option C}", "C: twenty-four"),
                "The answer is C.", "The answer is (C).", "**Answer: C**", "The answer is **(C)**",
                "The answer is option C.",
                "The correct option is C.", "The correct choice is (C).", "The answer is C, because A is wrong.",
                "(C)", "C.",
                "The answer is C, not B.",
            ],
        ),
        (r"\textbf{(C) }24", boxes("C", "24", "(C) 24", r"\text{C}")),
        ("true", [*boxes("True", r"\text{True}", "TRUE", "true.", r"\mathrm{True}", "Yes"), "The answer is True.",
          "True"]),
        ("Yes", boxes("yes", r"\text{Yes}", "YES", r"\text{yes}.")),
        (r"\text{Evelyn}", boxes("Evelyn", r"\text{evelyn}", r"\textbf{Evelyn}")),
        (r"\text{no solution}", boxes("No solution", r"\text{No solution}")),
        (r"\text{A,B,E}", boxes("A, B, E", r"\text{A}, \text{B}, \text{E}")),
        (r"8\!:\!34 \text{ p.m.}", boxes("8:34 PM", r"8:34 \text{ p.m.}", "8:34 p.m.")),
    ],
)  # fmt: skip
def test_letters_and_words(grader: Grader, reference: str, responses: list[str]) -> None:
    assert [response for response in responses if not grader.grade(response, [reference])] == []


@pytest.mark.parametrize(
    ("reference", "given"),
    [
        ("1/3", [r"0.\overline{3}", r"0.\bar{3}", r"0.\dot{3}", "0.(3)", "0.333...", r"0.333\ldots", r"\frac13", "⅓",
          r"{1\over 3}"]),
        (r"0.\overline{3}", ["1/3", r"\frac{1}{3}"]),
        (r"\frac{1}{6}", [r"0.1\overline{6}", "0.1(6)", "0.1666..."]),
        (r"\frac{1}{7}", [r"0.\overline{142857}", "0.142857142857...", r"0.\dot{1}4285\dot{7}"]),
        ("1", [r"0.\overline{9}"]),
        ("1000000", ["1 million", r"1\text{ million}", "1,000 thousand"]),
        ("2.5e-3", [r"2.5 x 10^-3", r"2.5 \times 10^{-3} m"]),
        (r"\log_2 3", [r"\log_{2}{3}", r"\frac{\ln 3}{\ln 2}", r"\log_2(3)"]),
        (r"\sin 30^\circ", [r"\frac12", r"\sin\frac{\pi}{6}", r"\cos(60^\circ)"]),
        (r"\sqrt[3]{2}", [r"\sqrt[3]2", "2^{1/3}"]),
        (r"x \in \mathbb{R}", [r"(-\infty,\infty)", r"\text{all real numbers}"]),
        ("3:4", [r"3\colon 4", r"3\text{ to }4", "6:8"]),
        (r"5\text{ cm}^2", ["5", r"5\text{ square centimeters}"]),
        ("(a) 5 (b) 6", [r"\text{(a) }5\text{ (b) }6", "(a) 5, (b) 6", "5, 6"]),
        ("0.5", ["1/2", "½", ".5", "0.50", r"50\%", "5e-1"]),
        ("1.5", [r"1\frac{1}{2}", "1 1/2", "1½", "3/2"]),
        (r"-\frac{1}{2}", [r"\frac{-1}{2}", r"\frac{1}{-2}", "−½", "-0.5", r"\left(-\frac{1}{2}\right)"]),
        ("1000", ["10^{3}", "1{,}000", "1 000", r"1\,000", r"1.0\times10^3", "1e3", "1,000.00", "１０００"]),
        ("1.45e-5", [r"1.45\times 10^{-5}", "0.0000145", "1.45E-5"]),
        ("17.5%", [r"17.5\%", "17.5", "0.175", r"\frac{7}{40}", r"17.5 \text{ percent}"]),
        (r"11,\! 111,\! 111,\! 100", ["11111111100"]),
        ("2^{64}", ["18446744073709551616", "4^{32}"]),
        ("100!", [r"99! \cdot 100"]),
        (r"\sqrt{2}", ["√2", r"\sqrt 2", "sqrt(2)", "2^{0.5}", r"\frac{2}{\sqrt{2}}"]),
        (r"\dfrac{\pi}{2}", ["pi/2", "π/2", r"0.5\pi", r"\frac{\pi}{2}\text{ radians}"]),
        ("-2*pi", [r"-2\pi", "-2π"]),
        ("-1 + exp(16)", ["e^{16} - 1"]),
        (r"1 - \frac{1}{\mathrm{e}}", [r"1-\frac1e", "1-e^{-1}"]),
        ("14-i", ["14.0 + -1.0i"]),
        ("x^2", ["x²", "f(x)=x^2", r"x \cdot x"]),
        ("x=3", ["3", "3=x"]),
        ("f(x)=x", ["x", "y=x"]),
        ("-7", ["−7", "- 7", "–7"]),
        ("5", ["f'(2)=5", r"\frac{AB}{CD} = 5", r"\text{Area} = 5", "5 = x"]),
        ("y=2x+3", ["2x+3", "f(x)=2x+3", "2x - y + 3 = 0"]),
        (r"\sqrt{1/n}", [r"\frac{1}{\sqrt{n}}"]),
        (r"\lceil\frac{n}{2}\rceil", [r"\lfloor\frac{n+1}{2}\rfloor"]),
        ("5x - 7y + 11z + 4 = 0", ["5x - 7y + 11z = -4", "10x-14y+22z+8=0"]),
        (r"\pm 3", ["3, -3", r"x = \pm 3", r"\{-3,3\}", "±3"]),
        (r"\{1,2\}", ["2, 1", r"x = 1 \text{ or } x = 2", r"1 \text{ and } 2"]),
        (r"x \in [-2,7]", ["[-2,7]", r"-2 \le x \le 7", "-2 ≤ x ≤ 7"]),
        (r"(-\infty, 2) \cup (3, \infty)", [r"x<2 \text{ or } x>3", r"(3,\infty)\cup(-\infty,2)", "(-∞,2)∪(3,∞)"]),
        ("1, 2, \\ldots, n", [r"1,2,\dots,n", "1, 2, ..., n", "1, 2, …, n"]),
        (r"\{1, 2, \ldots, n\}", [r"\{1,2,\dots,n\}", "1,2,...,n"]),
        ("2516_8", ["2516_{8}", "(2516)_8", r"2516_{\text{eight}}"]),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", [r"\begin{bmatrix} 1.0 \\ \frac42 \end{bmatrix}"]),
        (r"\emptyset", [r"\varnothing", "∅", r"\text{empty set}"]),
        (r"12\pi", [r"12\pi\text{ cm}^3"]),
    ],
)  # fmt: skip
def test_values(grader: Grader, reference: str, given: list[str]) -> None:
    assert [answer for answer in given if not grader.grade(rf"\boxed{{{answer}}}", [reference])] == []


@pytest.mark.parametrize(
    "response",
    ["x=2 or x=3", r"\boxed{2} and \boxed{3}", r"$x=\boxed{3}$ or $x=\boxed{2}$", "The solutions are 2 and 3."],
)
@pytest.mark.parametrize("reference", ["2,3", r"\{2,3\}"])
def test_several_values_that_words_join_are_a_list(grader: Grader, response: str, reference: str) -> None:
    assert grader.grade(response, [reference])
    assert not grader.grade(response, ["3"])
    assert not grader.grade(response, ["2,3,4"])
