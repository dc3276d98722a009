"""Signatures of ops that nobody described, found by running them: see `learning`."""

from attncheck.fixes.synthesis.description import Rejected
from attncheck.fixes.synthesis.learning import Found, Synthesis, choose, synthesise
from attncheck.fixes.synthesis.process import Answer, Refusal, Request, for_operators

__all__ = [
    "Answer",
    "Found",
    "Refusal",
    "Rejected",
    "Request",
    "Synthesis",
    "choose",
    "for_operators",
    "synthesise",
]
