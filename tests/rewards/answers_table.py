r"""Answers labelled by hand, by mathematics and not by running: (answer, reference, right?).

Conventions that the labels use: a decimal equals a value that it agrees with to six places; a
percent sign, a unit, a currency, a degree sign, `name =` and the brackets of a list of solutions
may be left out or added, but two that differ are two answers; a bare list has no order, a tuple
has one; steps before the last one of a chain of equations must be right, too.
"""

from pathlib import Path

# Contents of \boxed{}: lines of label, answer and reference, with tabs between.
LINES = Path(__file__).with_name("answers.tsv").read_text(encoding="utf-8").splitlines()
ROWS = [line.split("\t") for line in LINES if not line.startswith("# ")]
ANSWERS = [(answer, reference, label == "right") for label, answer, reference in ROWS]

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
]
