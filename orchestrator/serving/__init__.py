"""Answering over HTTP: the contract, the predictor, the numbers that scale it, and the gateway."""
