r"""Answers labelled by hand, by mathematics and not by running: (answer, reference, right?).

Conventions that the labels use: a decimal equals a value that it agrees with to six places; a
percent sign, a unit, a currency, a degree sign, `name =` and the brackets of a list of solutions
may be left out or added, but two that differ are two answers; a bare list has no order, a tuple
has one; steps before the last one of a chain of equations must be right, too; a list of names is
the tuple of their alphabetical order; h:mm is a time, and a ratio only beside a number or a ratio;
(1,000) is a number, as no part of a pair begins with 0; boxes or formulas joined by a comma, "and",
"or" or nothing are one answer.
"""

import json
from pathlib import Path

# Contents of \boxed{}: lines of label, answer and reference, with tabs between.
LINES = Path(__file__).with_name("answers.tsv").read_text(encoding="utf-8").splitlines()
ROWS = [line.split("\t") for line in LINES if not line.startswith("# ")]
ANSWERS = [(answer, reference, label == "right") for label, answer, reference in ROWS]

# Cases of the tests of math-verify 0.9.0, with its verdict, and why ours "differs".
MATH_VERIFY = [
    json.loads(line)
    for line in Path(__file__)
    .with_name("math_verify.jsonl")
    .read_text(encoding="utf-8")
    .splitlines()
]

# Whole responses.
RESPONSES = [
    (r"So it is $\boxed{42}$.", "42", True),
    (r"First \boxed{41}, no: \boxed{42}", "42", True),
    (r"First \boxed{42}, no: \boxed{41}", "42", False),
    (r"It is \boxed{\frac{\sqrt{3}}{2}}", r"\frac{\sqrt{3}}{2}", True),
    (r"\boxed{\boxed{7}}", "7", True),
    (r"\fbox{7}", "7", True),
    (r"Thus \boxed 7", "7", True),
    (r"We get $\boxed{2}$ and $\boxed{3}$.", "2, 3", True),
    (r"We get $\boxed{2}$ and $\boxed{3}$.", "3", False),
    (r"\boxed{\{1, 2\}}", "1, 2", True),
    (r"\boxed{5", "5", False),
    (r"\boxed{}", "5", False),
    ("The answer is 5.", "5", True),
    ("The final answer is $x = 5$.", "5", True),
    ("Therefore the answer is $\\frac{1}{2}$, since both are equal.", "0.5", True),
    ("**Answer:** 12", "12", True),
    ("**Final Answer**\n\n$12$", "12", True),
    ("Final answer: \\(\\sqrt{2}\\)", r"\sqrt{2}", True),
    ("The correct answer is (B).", "B", True),
    ("Natalia sold 72 clips.\n#### 72", "72", True),
    ("Natalia sold 72 clips.\n#### 1,072", "1072", True),
    ("Natalia sold 72 clips.\n#### 73", "72", False),
    ("The answer is 5. Wait.\nThe answer is 6.", "6", True),
    ("The answer is 5. Wait.\nThe answer is 6.", "5", False),
    ("42", "42", True),
    ("$42$", "42", True),
    ("1/2", "0.5", True),
    ("<think>\\boxed{5}</think>\\boxed{6}", "6", True),
    ("<think>\\boxed{5}</think>\\boxed{6}", "5", False),
    ("<think>it is \\boxed{5}", "5", False),
    ("it is \\boxed{4}</think>It is \\boxed{5}.", "5", True),
    ("<think>a</think>\\boxed{5}<think>but then", "5", False),
    ("<think>\\boxed{5}</think>I do not know.\nSorry.", "5", False),
    ("I looked at 5 cases.\nThey are all odd.", "5", False),
    ("", "5", False),
    # Joined boxes, and alternatives
    (r"\boxed{3}/\boxed{4}", "4", False),
    (r"\boxed{3}; alternatively \boxed{4}", "4", False),
    (r"\boxed{3}, but it could also be \boxed{4}", "4", False),
    (r"It could be \boxed{3}. It could be \boxed{4}.", "4", False),
    (r"\boxed{3}, maybe \boxed{4}", "4", False),
    (r"\boxed{3}. No, wait: \boxed{4}", "4", True),
    (r"\boxed{3}, but that is wrong, so \boxed{4}", "4", True),
    (r"We get \boxed{3}. Therefore \boxed{4}", "4", True),
    (r"$\boxed{1}$, $\boxed{2}$ and $\boxed{3}$", "1, 2, 3", True),
    (r"$\boxed{1}$, $\boxed{2}$ and $\boxed{3}$", "2, 3", False),
    (r"The answer is 3 or 4.", "4", False),
    (r"$\boxed{(2, 2)} \quad \text{and} \quad \boxed{(6, 2)}$", "(2, 2), (6, 2)", True),
    (r"$\boxed{(2, 2)} \quad \text{and} \quad \boxed{(6, 2)}$", "(6, 2)", False),
    (r"\boxed{1}\boxed{2}", "1, 2", True),
    (r"\boxed{3} or \boxed{4}", "4", False),
    (r"\boxed{3} or maybe \boxed{4}", "4", False),
    (r"\boxed{3}, \boxed{4}", "4", False),
    ("\\boxed{3}\n\n\\boxed{4}", "4", False),
    ("\\boxed{4}\n\n\\boxed{4}", "4", True),
    ("So \\boxed{4}.\n\n**Final Answer**\n\\boxed{4}", "4", True),
    ("So \\boxed{3}.\n\n**Final Answer**\n\\boxed{4}", "4", True),
    (r"\boxed{\frac12} or \boxed{0.5}", "0.5", True),
    (r"\boxed{\frac12}, or equivalently \boxed{0.5}", "0.5", True),
    (r"\(\boxed{6}\) and \(\boxed{8}\)", "6, 8", True),
    (r"\[\boxed{6} \text{ or } \boxed{8}\]", "6, 8", True),
    (r"\boxed{1} papers and \boxed{2} bins", "1, 2", True),
    (r"\boxed{1} no no no no no \boxed{2}", "1, 2", False),
    (r"\boxed{(3, 3)} \text{ for part (a) and } \boxed{(1, 1)}", "(3,3), (1,1)", True),
    (r"\(y_1 = \boxed{3} \) and \( y_2 = \boxed{4} \)", "3, 4", True),
    (r"$x=\boxed{1}$ and $y=\boxed{2}$", "(1, 2)", True),
    (r"$x=\boxed{1}$ and $y=\boxed{2}$", "2", False),
    (r"The sum is \boxed{3} so the answer is \boxed{4}", "4", True),
    (r"\boxed{A} \text{ or } \boxed{B}", "B", False),
    (r"\boxed{A}, \boxed{C}", "A, C", True),
    ("Final Answer: The final answer is $100$. I hope it is correct.", "100", True),
    ("Final Answer: The final answer is $100$. I hope it is correct.", "101", False),
    ("Final Answer:\nThe final answer is $\\frac{1}{2}$. I hope it is correct.", "0.5", True),
    ("The final answer is $\\boxed{5}$. I hope it is correct.", "5", True),
    ("Answer: The largest $n$ is 34.", "34", True),
    ("Answer: The largest $n$ is $34$.", "34", True),
    ("Answer: There are 12 ways.", "12", True),
    ("Answer: The final answer is: 7", "7", True),
    ("**Answer:** The value of $x$ is $\\sqrt{2}$.", r"\sqrt2", True),
    ("The answer is 5. I hope my answer is right.", "5", True),
    ("The answer is 5. So my answer is 6.", "5", False),
    ("The answer is: \\[ x = 5 \\]", "5", True),
    ("The answer is:\n\\[\nx = 5\n\\]\nDone.", "5", True),
    ("The answer is\n$$\n\\frac{1}{2}\n$$", "0.5", True),
    ("Therefore $x \\geq 5$ is the solution.", r"x \ge 5", True),
    ("I think $5$ or $6$", "6", False),
    ("The answer is (B) 12", "B", True),
    ("Answer: B. 12", "B", True),
    ("Answer: B", "B", True),
    ("The answer is \\$32,348.", "32348", True),
    ("#### $32,348", "32348", True),
    ("#### 32,348 dollars", "32348", True),
    ("The answer is $32,348 dollars.", "32348", True),
    ("The answer is 5 cm. ", "5 \\text{ cm}", True),
    ("The answer is 5:00 p.m.", "5:00 \\text{ p.m.}", True),
    ("The answer is 3.5.", "3.5", True),
    ("Answer: $x=3$ or $x=4$", "3, 4", True),
    ("Answer: The roots are $3$ and $4$.", "3, 4", True),
    ("The answers are $3$ and $4$.", "3, 4", True),
    ("My answer is not 5", "5", False),
    ("Answer: 12 because 3*4 is 12", "12", False),
    ("\\\\boxed{\\\\frac{1}{2}}", "0.5", True),
    ("Answer: no solution", "\\emptyset", True),
    ("**Final Answer:** $\\boxed{12}$", "12", True),
    (r"\boxed{3} (or \boxed{4})", "4", False),
    (r"\boxed{2} = \boxed{\frac{4}{2}}", "2", True),
    (r"$x = \boxed{3} \quad y = \boxed{4}$", "(3, 4)", True),
    (r"\boxed{5} \text{ cm}^2 \text{ and } \boxed{6}", "5, 6", True),
    ("The answer is therefore $5$.", "5", True),
]
