"""Plans: what an audit is to do, stated once and in full before it starts."""
