"""Engines: who computes the shards of an audit. They change no result."""
