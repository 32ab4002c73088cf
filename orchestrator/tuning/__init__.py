"""Searching for better values of recipe fields. Knows neither training nor compression: a trial is a function handed in."""
