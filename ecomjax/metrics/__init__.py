"""Predictions and references in, numbers out: numpy only, no I/O.

Every metric is a function of additive statistics: one row per example, summed, then
summarised. The same two functions therefore serve point values, bootstrap resamples and
sums over hosts.
"""
