"""Math answers: right ones are right, wrong ones wrong, hostile ones cost their deadline."""

import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import math_verify
import pytest
from answers_table import ANSWERS, MATH_VERIFY, RESPONSES
from processes import MATH

from oapl_jax.rewards.math.extraction import MAX_ANSWER, final_answer
from oapl_jax.rewards.math.judge.sympy_equal import GENERATED
from oapl_jax.rewards.math.verifier import (
    MAX_REQUEST_BYTES,
    JudgePool,
    MathVerdict,
    MathVerifier,
    compare_plain,
)

PAIRS = [(rf"It is \boxed{{{said}}}.", wanted, right) for said, wanted, right in ANSWERS]
PAIRS += RESPONSES
LATE = (r"9^{9^{9^{9}}}", r"(10^{9})!", r"\sum_{n=1}^{10^{9}} n^{n}", "1e999999999")
# What is nested so deeply that reading it, or what sympy makes of it, may never end.
DEEP = (
    r"\sqrt{2+" * 60 + "2" + "}" * 60,
    r"\sqrt{1+\sqrt[3]{2}" * 30 + "}" * 30,
    r"\frac{1}{1+" * 60 + "1" + "}" * 60,
    "(" * 450 + "1" + ")" * 450,
    "2^{" * 200 + "2" + "}" * 200,
)
MARGIN = 10.0  # seconds that a busy machine may take for nothing
TOO_LONG = ("1" * 10**6, "x+" * 500_000, "{" * 10**6, "1," * 500_000)


@pytest.fixture(scope="module")
def pool():
    with closing(JudgePool(MATH)) as made:
        yield made


@pytest.fixture(scope="module")
def answers():
    with closing(MathVerifier(MATH)) as made:
        yield made


# The table


def test_the_table_is_judged_right(answers):
    verdicts = answers.verify_many([(response, wanted) for response, wanted, _ in PAIRS])
    judged = list(zip(PAIRS, verdicts, strict=True))
    assert {v.outcome for v in verdicts} == {"right", "wrong"}  # none is late, none an error
    paid = {(a, r) for (a, r, _), v in judged if v.outcome == "right"}
    assert paid == {(a, r) for a, r, right in PAIRS if right}


def test_the_table_is_large_and_has_both_kinds():
    assert len(PAIRS) >= 200
    assert len({(a, r) for a, r, _ in PAIRS}) == len(PAIRS)
    assert sum(not right for _, _, right in PAIRS) >= 100


def test_each_reference_can_be_read(answers):
    """Whatever the answer looks like, no reference is called unreadable."""
    for said in (r"x^{17}y", r"[17, 18)", "x = 17:?"):
        wanted = sorted({r for _, r, _ in PAIRS})
        verdicts = answers.verify_many([(rf"\boxed{{{said}}}", r) for r in wanted])
        assert [(r, v) for r, v in zip(wanted, verdicts, strict=True) if v.outcome != "wrong"] == []


def test_cases_of_math_verify_get_its_verdict_but_for_the_differences(answers):
    verdicts = answers.verify_many([(case["response"], case["reference"]) for case in MATH_VERIFY])
    for case, verdict in zip(MATH_VERIFY, verdicts, strict=True):
        assert (verdict.outcome == "right") == (case["right"] != ("differs" in case)), case
    assert sum("differs" in case for case in MATH_VERIFY) < 0.1 * len(MATH_VERIFY)


@pytest.mark.parametrize(
    "call",
    ["print(1)", "__import__('os').getcwd()", "from sympy import *", "x = open('a')"],
)
def test_generated_code_holds_no_other_names(call):
    head = "def hypsum_1_1_Z_Z_R(coeffs, z, prec, wp, epsshift, magnitude_check, **kwargs):\n"
    assert GENERATED.fullmatch(f"{head}    n = abs(wp)")
    assert not GENERATED.fullmatch(f"{head}    {call}")


# Plain numbers, without a process


def plain_pairs():
    rng = random.Random(0)
    spell = (str, lambda v: f"{v:,}", lambda v: f"{v:.4f}", lambda v: f"{v}.0")
    for _ in range(150):
        value = rng.choice((rng.randint(-20, 20), rng.randint(-(10**7), 10**7)))
        other = value if rng.random() < 0.6 else rng.choice((-value, value + 1, value * 10))
        yield rng.choice(spell)(value), rng.choice(spell)(other)
    yield from (("0.3333333", "0.3333334"), ("0.1234", "0.12341"), ("-0", "0"), (".50", "0.5"))


def test_plain_numbers_get_the_verdict_of_the_judge_and_of_math_verify(pool):
    pairs = list(plain_pairs())
    quick = [compare_plain(*pair) for pair in pairs]
    assert None not in quick
    assert {v.outcome for v in quick if v} == {"right", "wrong"}
    latex = [math_verify.LatexExtractionConfig()]
    parse = lambda text: math_verify.parse(f"${text}$", latex, parsing_timeout=None)  # type: ignore
    for (said, wanted), verdict in zip(pairs, quick, strict=True):
        assert verdict
        # With a factor that is 1, the judge can't take its own way for plain numbers.
        longer = pool.ask((rf"\frac{{{said.replace(',', '')}}}{{1}}", wanted))
        assert longer["reply"][0] == verdict.outcome, (said, wanted)
        theirs = math_verify.verify(parse(wanted), parse(said), timeout_seconds=None)
        assert theirs == (verdict.outcome == "right"), (said, wanted)


def test_two_thousand_plain_numbers_a_second(answers):
    """In CPU time of this process, which other work on the machine hardly moves; on one core."""
    words = "We count the cases. " * 100
    pairs = [(rf"{words}So it is \boxed{{{i:,}}}.", str(i + i % 2)) for i in range(2000)]
    start = time.process_time()
    verdicts = answers.verify_many(pairs)
    assert time.process_time() - start < 1
    assert [v.outcome for v in verdicts] == ["right", "wrong"] * 1000


# Hostile answers


def test_a_hostile_answer_costs_its_deadline_and_nothing_else():
    boxed = lambda texts, wanted="7": [(rf"\boxed{{{text}}}", wanted) for text in texts]
    roots = (rf"\frac{{\sqrt{{{n * n * 2}}}}}{{{n}}}" for n in range(2, 9))
    honest, late, deep, long = boxed(roots, r"\sqrt{2}"), *map(boxed, (LATE, DEEP, TOO_LONG))
    with closing(MathVerifier(replace(MATH, seconds=4.0, memory_bytes=1 << 28))) as answers:
        before = threading.active_count()
        mixed = [*late[:2], *honest[:4], *deep, *long, *late[2:], *honest[4:]]
        verdicts = dict(zip(mixed, answers.verify_many(mixed), strict=True))
        counts = answers.counts()
        assert threading.active_count() <= before + 2
        start = time.monotonic()
        answers.verify(*late[0])
        assert 4.0 <= time.monotonic() - start < 4.0 + MARGIN
        start = time.monotonic()
        assert answers.verify(*honest[0]).outcome == "right"
        assert time.monotonic() - start < MARGIN
    # An answer that runs out of memory before its time is an error, and no verdict on it either.
    assert {verdicts[pair].outcome for pair in late} <= {"timeout", "error"}
    assert verdicts[late[0]] == MathVerdict("timeout", "the deadline passed")
    assert {verdicts[pair].outcome for pair in long} == {"wrong"}
    assert "right" not in {verdicts[pair].outcome for pair in deep}
    assert {verdicts[pair].outcome for pair in honest} == {"right"}
    assert [verdicts[pair].reward for pair in (late[0], long[0], honest[0])] == [0.0, 0.0, 1.0]
    assert sum(counts.values()) == len(mixed)
    unjudged = [pair for pair in deep if verdicts[pair].outcome in ("timeout", "error")]
    assert counts["timeout"] + counts.get("error", 0) == len(late) + len(unjudged)
    assert counts["wrong"] == len(long) + len(deep) - len(unjudged)


PAYLOADS = (  # make a folder if anybody evaluates CALL
    *("CALL", "[CALL, 1][1]", "(lambda: CALL)()", r"\text{CALL}", r"\operatorname{CALL}(x)"),
    *(r"\mathrm{x}_{CALL}", "x_{CALL} = 1", r"\frac{CALL}{1}", r"\sum_{n=1}^{3} CALL", "1 + CALL"),
    r"\begin{pmatrix} CALL \\ 1 \end{pmatrix}",
)


def test_nothing_is_evaluated(answers, pool, tmp_path):
    made = tmp_path / "made"
    call = f"__import__('os').mkdir('{made}')"
    for payload in (text.replace("CALL", call) for text in PAYLOADS):
        for pair in ((payload, "x + 1"), ("x + 1", payload), (payload, payload + " + 0")):
            pool.ask(pair)  # as it is
            answers.verify(rf"\boxed{{{pair[0]}}}", pair[1])
        assert not made.exists(), payload
    # The same text through the parser that is not used:
    code = f"import sympy; sympy.parse_expr({call!r})"
    subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL, check=False)
    assert made.exists()


@pytest.mark.parametrize(
    "text",
    [
        *("\ud800", "\0", "\u0663", "\U0001d7db", "\\", "\\text", "$", "}{", "= = =", "(((", "%"),
        "[1,2",
        *("\\begin{pmatrix}", "1/0", "\\frac{0}{0}", "a" * 999, "½" * 999, "😀" * 999),
        *("\\pm" * 300, "∈" * 200),
    ],
)
def test_no_text_raises(answers, text):
    for pair in ((text, "3"), ("3", text), (rf"\boxed{{{text}}}", text + "x")):
        verdict = answers.verify(*pair)
        assert verdict.outcome in ("right", "wrong", "error")
    assert 12 * 2 * MAX_ANSWER < MAX_REQUEST_BYTES


def test_a_reference_that_can_not_be_read_is_an_error_and_no_wrong_answer(answers):
    for reference in (r"\frac{1}{", "x +", "1" * 2000):
        verdict = answers.verify(r"\boxed{x^2}", reference)
        assert verdict.outcome == "error"
        assert "reference" in verdict.reason


# How it is called


def test_threads_share_it(answers):
    ask = lambda n: answers.verify(rf"\boxed{{\frac{{{n}}}{{3}}}}", rf"\frac{{{n % 5}}}{{3}}")
    with ThreadPoolExecutor(4) as threads:
        verdicts = list(threads.map(ask, range(40)))
    assert [v.outcome for v in verdicts] == ["right"] * 5 + ["wrong"] * 35


def test_what_is_said_in_thinking_does_not_count():
    said = "so \\boxed{5}"
    for response, opened, answer in (
        *((said, False, "5"), (said, True, None), (f"{said}</think>\n\\boxed{{6}}", True, "6")),
        *((f"<think>{said}", False, None), (f"<think>{said}</think>", False, None)),
    ):
        assert final_answer(response, thinking_opened=opened) == answer


def test_a_vote_takes_one_number_for_one(answers):
    vote = answers.final_answer
    for same in (
        (r"\boxed{0.50}", r"\boxed{\frac{1}{2}}", r"\boxed{2/4}", "The answer is .5."),
        (r"\boxed{1,000}", r"\boxed{1000}", r"\boxed{1{,}000.0}"),
        (r"\boxed{ (1, 2) }", r"\boxed{\left(1,2\right)}"),
        ("I do not\nknow.", "<think>\\boxed{5}"),
    ):
        assert len({vote(response) for response in same}) == 1
    assert vote(r"\boxed{0.50}") == "1/2"
    assert vote("I do not\nknow.") == ""
    assert vote(r"\boxed{1}") != vote(r"\boxed{2}")
