"""Verifiers of the synthetic tasks: (response text, answer) -> 1.0 if right, else 0.0.

Responses are untrusted input: its length is bounded first, it never reaches eval or
exec (as in reasoning_gym's verifier of countdown), and no response makes a verifier raise.
"""

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

from oapl_jax.config import WORD_TASKS

MAX_CHARACTERS = 4096
MAX_EXPRESSION = 512  # far below what exhausts the stack of Python's parser
MAX_DEPTH = 64
INTEGER = re.compile(r"(?<![0-9])-?[0-9]{1,32}")  # after a digit, a minus is an operator
WORD = re.compile(r"\w[\w'-]*(?:[.,]\d+)*")  # or a number
EXPRESSION = re.compile(r"[0-9+\-*/() ]+")
OPERATORS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def chain_sum(response: str, answer: str) -> float:
    """Compares the last integer of the response with the answer."""
    if len(response) > MAX_CHARACTERS:
        return 0.0
    numbers = INTEGER.findall(response)
    return float(bool(numbers) and int(numbers[-1]) == int(answer))


def number_sorting(response: str, answer: str) -> float:
    """Compares comma-separated numbers with those of the answer, in order."""
    if len(response) > MAX_CHARACTERS:
        return 0.0
    parts = [part.strip(" \n") for part in response.split(",")]
    numbers = [int(part) if INTEGER.fullmatch(part) else None for part in parts]
    return float(numbers == [int(part) for part in answer.split(",")])


def countdown(response: str, answer: str) -> float:
    """Evaluates a bare expression of + - * / that uses each number of "3 4 5 -> 17" once."""
    numbers, target = answer.split(" -> ")
    if len(response) > MAX_EXPRESSION:
        return 0.0
    response = response.strip(" \n")
    if not EXPRESSION.fullmatch(response):
        return 0.0
    # Before anything is computed: the numbers bound how large an intermediate value can become.
    used = sorted(re.findall(r"[0-9]+", response))
    if used != sorted(numbers.split()):
        return 0.0
    try:
        value = _value(ast.parse(response, mode="eval").body, MAX_DEPTH)
    except (ValueError, SyntaxError, ZeroDivisionError, RecursionError, MemoryError):
        return 0.0
    return float(value == int(target))


def word_problem(response: str, answer: str) -> float:
    """Compares the first word of the response with the answer, case aside: more may follow."""
    return float(_first_word(response) == answer.lower())


VERIFIERS = {verify.__name__: verify for verify in (chain_sum, number_sorting, countdown)}
VERIFIERS |= dict.fromkeys(WORD_TASKS, word_problem)
# Final answers of responses, for a vote; equal strings are equal answers.
FINAL_ANSWERS: dict[str, Callable[[str], str]] = {
    "chain_sum": lambda response: (INTEGER.findall(response[-MAX_CHARACTERS:]) or [""])[-1],
    "number_sorting": lambda response: response.replace(" ", ""),
    "countdown": lambda response: response.replace(" ", ""),
    **dict.fromkeys(WORD_TASKS, lambda response: _first_word(response)),
}


def _first_word(response: str) -> str:
    word = WORD.search(response[:MAX_CHARACTERS])
    return word[0].lower() if word else ""


def _value(node: ast.expr, depth: int) -> Fraction:
    """Exact value of integers joined by + - * / and negation; ValueError for anything else."""
    if depth == 0:
        raise ValueError("nested too deeply")
    match node:
        case ast.Constant(value=int(value)):
            return Fraction(value)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, depth - 1)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(left, depth - 1), _value(right, depth - 1))
    raise ValueError(f"{type(node).__name__} is not allowed")
