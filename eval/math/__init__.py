"""Grading of mathematical answers: what is a final answer, what it says, and when two say the same. `scoring` is the way in."""
