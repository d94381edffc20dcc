"""Evaluation of a student: perplexity, answers, calibration, external benchmarks."""
