"""Plans: what an audit does, and on which images, stated in full before it starts."""
