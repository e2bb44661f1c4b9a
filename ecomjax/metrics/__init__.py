"""Predictions and references in, numbers out: no jax, no I/O.

What a well-kept library counts is counted by it: seqeval, rouge-score, sacrebleu,
scikit-learn, scipy.

Every metric is a function of additive statistics: one row per example, summed, then
summarised. The same two functions therefore serve point values, bootstrap resamples and
sums over hosts.
"""
