"""Reports: what a person sees of an Explanation."""
