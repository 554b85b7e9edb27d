"""Engines that compute an audit's groups elsewhere: on the workers of a Ray cluster."""
