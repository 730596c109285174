"""What is asked: the problem, its rules, the caller's arrays."""

from flashcore_cupy.problem.attention_problem import AttentionProblem, contiguous_problem, describe

__all__ = ["AttentionProblem", "contiguous_problem", "describe"]
