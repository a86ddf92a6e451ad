"""Verifiers of the synthetic tasks: (response text, answer) -> 1.0 if right, else 0.0.

A response is hostile until proven otherwise: it never reaches eval, exec or a parser that evaluates
(reasoning_gym's verifier of countdown calls eval, by sympy's parse_expr, and is not used), its
length is bounded first, and no response makes a verifier raise.
"""

import ast
import re
from collections.abc import Callable
from fractions import Fraction

MAX_CHARACTERS = 4096
MAX_EXPRESSION = 512  # far below what exhausts the stack of Python's parser
MAX_DEPTH = 64
INTEGER = re.compile(r"(?<![0-9])-?[0-9]{1,32}")  # after a digit, a minus is an operator
EXPRESSION = re.compile(r"[0-9+\-*/() ]+")


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
    numbers = [_integer(part) for part in response.split(",")]
    return float(numbers == [int(part) for part in answer.split(",")])


def countdown(response: str, answer: str) -> float:
    """Evaluates an expression of + - * / that uses each of the given numbers once.

    Args:
      response: the expression and nothing else.
      answer: numbers and target, "3 4 5 -> 17".
    """
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


VERIFIERS: dict[str, Callable[[str, str], float]] = {
    "chain_sum": chain_sum,
    "number_sorting": number_sorting,
    "countdown": countdown,
}

# Final answers of responses, for a vote; equal strings are equal answers.
_without_blanks: Callable[[str], str] = lambda response: response.replace(" ", "")
FINAL_ANSWERS: dict[str, Callable[[str], str]] = {
    "chain_sum": lambda response: (INTEGER.findall(response[-MAX_CHARACTERS:]) or [""])[-1],
    "number_sorting": _without_blanks,
    "countdown": _without_blanks,
}


def _integer(text: str) -> int | None:
    text = text.strip(" \n")
    return int(text) if INTEGER.fullmatch(text) else None


def _value(node: ast.expr, depth: int) -> Fraction:
    """Exact value of integers joined by + - * / and negation; ValueError for anything else."""
    if depth == 0:
        raise ValueError("nested too deeply")
    match node:
        case ast.Constant(value=int(value)):
            return Fraction(value)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, depth - 1)
        case ast.BinOp(left=left, op=op, right=right):
            a, b = _value(left, depth - 1), _value(right, depth - 1)
            match op:
                case ast.Add():
                    return a + b
                case ast.Sub():
                    return a - b
                case ast.Mult():
                    return a * b
                case ast.Div():
                    return a / b
    raise ValueError(f"{type(node).__name__} is not allowed")
